"""The extension modules: the reduction over the batch, and how they are found, loaded and reported."""

import json
import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from bda_fused import _native
from bda_fused.backends.batch_sum import batch_sum
from tests.process import run_python

PACKAGE = Path(_native.__file__).parent
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture
def threads():
    """Sets torch's number of threads, which the reduction takes, and restores it."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def copied_package(tmp_path):
    """A copy of the installed package, to be broken."""
    copy = tmp_path / "site" / "bda_fused"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


def assert_sum(x):
    """|y - sum| <= gamma_(B-1) sum |x|, the bound of a recursive sum of B numbers (Higham 2002, section 4.2)."""
    y = batch_sum(x)
    wide = x.double()
    unit = torch.finfo(y.dtype).eps / 2
    steps = max(x.shape[0] - 1, 0)
    bound = steps * unit / (1 - steps * unit) * wide.abs().sum(0)
    # The float64 sum that it is compared with has an error of its own, of the same form.
    bound += x.shape[0] * torch.finfo(torch.float64).eps * wide.abs().sum(0)
    assert y.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
    assert y.shape == x.shape[1:]
    assert ((y.double() - wide.sum(0)).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (64, 3), (7, 511), (5, 512), (9, 1537), (1000, 17)])
def test_batch_sum_is_the_sum(dtype, shape):
    assert_sum(torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_images_are_added_from_first_to_last(dtype):
    x = torch.randn(33, 700, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = torch.zeros(700, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    for row in x:
        expected += row
    assert torch.equal(batch_sum(x), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_number_of_threads_changes_no_bit(dtype, threads):
    x = torch.randn(50, 5003, generator=torch.Generator().manual_seed(2)).to(dtype)
    sums = []
    for count in (1, 2, 7):
        threads(count)
        sums.append(batch_sum(x))
    assert torch.equal(sums[0], sums[1])
    assert torch.equal(sums[0], sums[2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_instruction_set_changes_no_bit(dtype):
    x = torch.randn(50, 1001, generator=torch.Generator().manual_seed(4)).to(dtype)
    sums = [batch_sum(x), torch.zeros_like(batch_sum(x))]
    arguments = (x.data_ptr(), sums[1].data_ptr(), str(dtype).removeprefix("torch."), *x.shape, x.stride(0))
    _native.module("_cpu").batch_sum(*arguments, num_threads=1, portable=True)
    assert torch.equal(*sums)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_may_be_apart_or_shared(dtype):
    x = torch.randn(6, 40, 5, generator=torch.Generator().manual_seed(3)).to(dtype)
    for view in (x[:, 3], x[::2, 0], x[0, :1].expand(9, 5), x[:, :, :1].flatten(1).T[:, :1], x.flatten(1)[:, 7:]):
        assert_sum(view)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sum_of_no_image_is_zero(dtype):
    assert batch_sum(torch.empty(0, 600, dtype=dtype)).eq(0).all()
    assert batch_sum(torch.empty(4, 0, dtype=dtype)).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_number_is_widened_exactly(dtype):
    """Subnormal numbers, signed zeros, infinities and NaN too: one image, so that the sum is 0 + x."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    torch.testing.assert_close(batch_sum(x[None]), x.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities_and_nan_stay_in_their_columns(dtype):
    inf, nan = torch.inf, torch.nan
    x = torch.tensor([[1, inf, -inf, inf, nan], [2, 1, 1, -inf, 1]], dtype=dtype)
    expected = torch.tensor([3, inf, -inf, nan, nan])
    torch.testing.assert_close(batch_sum(x).float(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("x", "error", "sentence"),
    [
        (torch.ones(2, 3, dtype=torch.int32), TypeError, "float32, float64, bfloat16 or float16, got torch.int32"),
        (torch.ones(3), ValueError, r"takes a \(B, n\) tensor, got shape \(3,\)"),
        (torch.ones(2, 3).T, ValueError, "column stride is 1, got 3"),
        (torch.ones(2, 3, device="meta"), ValueError, "CPU or CUDA tensors, got meta"),
    ],
)
def test_batch_sum_refuses(x, error, sentence):
    with pytest.raises(error, match=sentence):
        batch_sum(x)


def test_instruction_set_is_that_of_the_processor():
    expected = "avx2" if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") else "portable"
    assert _native.module("_cpu").instruction_set() == expected


def test_one_openmp_runtime_is_loaded(tmp_path):
    code = """
import re, torch
from bda_fused.backends.batch_sum import batch_sum
torch.set_num_threads(2)
batch_sum(torch.ones(4, 4096))
print(*sorted({m for m in re.findall(r"/\\S*/(lib(?:gomp|iomp|omp)\\S*)", open("/proc/self/maps").read())}))
"""
    process = run_python(code, path=PACKAGE.parent, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert len(process.stdout.split()) == 1, process.stdout


def extension(package, name):
    return next(package.glob(f"{name}.*.so"))


def test_broken_module_is_reported_as_broken(copied_package, tmp_path):
    file = extension(copied_package, "_cpu")
    file.write_bytes(file.read_bytes()[:40])  # within the ELF header: of a longer rest the loader itself dies
    process = run_python(
        "from bda_fused import _native; print(_native.status('_cpu'))", path=copied_package.parent, cwd=tmp_path
    )
    assert process.stdout.startswith(f"the extension module {file.name} was built but does not load: "), process.stderr
    assert "file too short" in process.stdout


def test_module_that_was_not_built_is_reported_with_the_reason(copied_package, tmp_path):
    for file in copied_package.glob("_cuda.*.so"):
        file.unlink()
    (copied_package / "_build_info.json").write_text(json.dumps({"_cuda": {"built": False, "reason": "no such luck"}}))
    process = run_python(
        "from bda_fused import _native; print(_native.status('_cuda'))", path=copied_package.parent, cwd=tmp_path
    )
    assert process.stdout == "the extension module bda_fused._cuda was not built: no such luck\n", process.stderr


def test_module_of_an_uninstalled_package_is_reported(copied_package, tmp_path):
    extension(copied_package, "_cpu").unlink()
    (copied_package / "_build_info.json").unlink()
    code = "import torch; from bda_fused.backends.batch_sum import batch_sum; batch_sum(torch.ones(1, 1))"
    process = run_python(code, path=copied_package.parent, cwd=tmp_path)
    sentence = "bda_fused._cpu was not built: the package was not installed by its setup.py"
    assert process.stderr.strip().endswith(sentence)


def cuobjdump(option):
    """What NVIDIA's cuobjdump, of the toolkit or of triton, says of the CUDA module."""
    triton = find_spec("triton")
    bundled = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump" if triton else None
    command = shutil.which("cuobjdump") or bundled
    assert command is not None, "the CUDA module cannot be inspected: no cuobjdump on PATH, and triton is not installed"
    file = extension(PACKAGE, "_cuda")
    return subprocess.run([command, option, file], capture_output=True, text=True, check=True).stdout


def test_cuda_module_is_what_the_build_says():
    built = _native.build_info()["_cuda"]
    if not built["built"]:
        assert _native.status("_cuda") == f"the extension module bda_fused._cuda was not built: {built['reason']}"
        return
    assert _native.status("_cuda") is None
    assert set(re.findall(r"batch_sum\.(sm_\w+)\.cubin", cuobjdump("--list-elf"))) == set(built["arches"])
    ptx = {target.replace("sm", "compute") for target in re.findall(r"\.(sm_\w+)\.ptx", cuobjdump("--list-ptx"))}
    assert ptx == set(built["ptx"])
    usage = re.findall(r"batch_sum_kernel.*\n.* STACK:(\d+) .*LOCAL:(\d+)", cuobjdump("--dump-resource-usage"))
    assert usage == [("0", "0")] * (len(DTYPES) * len(built["arches"]))
