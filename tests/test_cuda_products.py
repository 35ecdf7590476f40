"""Long products of the CUDA backend: gradients of keys, values and shared queries, run by the simulator."""

import re
import shutil
from dataclasses import dataclass

import pytest
import torch

from bda_fused import testing
from bda_fused.backends import cuda_products
from bda_fused.backends.cuda_plan import Device
from bda_fused.backends.cuda_products import Sum
from benchmarks import gpu_products
from benchmarks.gpu_model import GPUS
from tests import cuda_device, ptxsim
from tests.cuda_device import SOURCES, simulated

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Case:
    """One launch: B, H images of L rows, S keys and C columns. kept: the batch axes that are not summed.

    gaps: elements behind the rows of left and right. results: two share a launch. terms: products in one sum. added: a
    summand of out's own shape and all images. shared: the right operand is the same for all images.
    """

    form: str
    sizes: tuple[int, int, int, int, int]
    dtype: torch.dtype = BF16
    kept: tuple[bool, bool] = (False, False)
    gaps: tuple[int, int] = (0, 0)
    results: int = 1
    terms: int = 1
    added: bool = False
    shared: bool = False

    def sums(self) -> list[Sum]:
        b, h, rows, keys, columns = self.sizes
        generator = torch.Generator().manual_seed(0)

        def draw(*shape, gap=0):
            x = torch.randn(*shape[:-1], shape[-1] + gap, generator=generator).to(self.dtype)
            x[..., shape[-1] :] = torch.nan
            return x[..., : shape[-1]]

        batch = [size if keep else 1 for size, keep in zip((b, h), self.kept, strict=True)]
        of_keys = self.form == "keys"
        made = []
        for _ in range(self.results):
            terms = [
                (
                    draw(b, h, rows, keys, gap=self.gaps[0]),
                    draw(
                        *((1, 1) if self.shared else (b, h)),
                        rows if of_keys else keys,
                        columns + len(made),
                        gap=self.gaps[1],
                    ),
                )
                for _ in range(self.terms)
            ]
            shape = keys if of_keys else rows, columns + len(made)
            added = draw(b, h, *shape) if self.added else None
            made.append(Sum(terms, torch.full((*batch, *shape), torch.nan, dtype=self.dtype), added))
        return made

    def run(self, **options) -> tuple[list[Sum], cuda_device.SimulatedDevice]:
        sums = self.sums()
        with simulated(**options) as device:
            device.run(cuda_products.launches(self.form, sums, self.sizes[:2], device.facts), torch.device("cpu"))
        return sums, device

    def check(self, **options) -> cuda_device.SimulatedDevice:
        """By the rule of numerics, with the operands' dtype's own products as the yardstick."""
        sums, device = self.run(**options)
        for x in sums:
            truth, yardstick = (self.natural(x, dtype) for dtype in (torch.float64, self.dtype))
            testing.assert_close(x.out, truth, yardstick.to(self.dtype), gradient=True)
        return device

    def natural(self, x: Sum, dtype: torch.dtype) -> torch.Tensor:
        images = self.sizes[:2]
        total = torch.zeros(*images, *x.out.shape[2:], dtype=dtype)
        for left, right in x.terms:
            left, right = left.to(dtype), right.to(dtype)
            total = total + (left.mT if self.form == "keys" else left) @ right
        if x.added is not None:
            total = total + x.added.to(dtype)
        return total.sum_to_size(x.out.shape)


CASES = {
    # All images' rows are one sum; every image has its own; heads are kept, or images; a shared right operand.
    "keys": Case("keys", (3, 1, 70, 20, 40)),
    "keys per image": Case("keys", (3, 1, 70, 20, 40), kept=(True, False)),
    "keys per head": Case("keys", (2, 3, 70, 13, 21), kept=(False, True)),
    "keys of all heads": Case("keys", (2, 3, 21, 13, 21), kept=(True, False)),
    "keys, queries shared": Case("keys", (3, 1, 70, 20, 40), shared=True),
    "queries": Case("queries", (3, 1, 70, 20, 40)),
    "queries per head": Case("queries", (2, 3, 17, 20, 40), kept=(False, True)),
    "queries per image": Case("queries", (2, 3, 17, 20, 40), kept=(True, False)),
    # Dtypes.
    **{f"{form} {dtype}": Case(form, (2, 1, 50, 33, 24), dtype) for form in ("keys", "queries") for dtype in (FP16, FP32)},
    # Widths: rows that copies of 16 bytes, of 4 and of none can read; several tiles, one block of columns in some.
    **{f"keys, {c} columns": Case("keys", (2, 1, 70, 312, c)) for c in (1, 7, 64, 193, 350, 377)},
    **{f"keys, {s} keys": Case("keys", (2, 1, 70, s, 20)) for s in (1, 85, 102, 161, 196, 600)},
    **{f"queries, {s} keys": Case("queries", (2, 1, 85, s, 37)) for s in (1, 64, 65, 196)},
    "float32, odd": Case("keys", (2, 1, 70, 133, 129), FP32),
    "queries of float32, odd": Case("queries", (2, 1, 133, 45, 129), FP32),
    "gaps": Case("keys", (2, 1, 70, 20, 40), gaps=(3, 1)),
    "queries, gaps": Case("queries", (2, 1, 70, 20, 40), gaps=(1, 3)),
    # What is summed beside a product.
    "two terms": Case("keys", (2, 1, 70, 20, 40), terms=2),
    "two results": Case("keys", (2, 1, 300, 20, 40), results=2),
    "added": Case("queries", (3, 1, 70, 20, 40), added=True),
    "added per head": Case("queries", (3, 2, 7, 20, 21), added=True, kept=(False, True)),
    "everything": Case("keys", (2, 1, 300, 33, 45), results=2, terms=2, added=True),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_parity(case):
    case.check()


@pytest.mark.parametrize(
    "case", [CASES["two results"], Case("queries", (40, 1, 33, 49, 40), added=True)], ids=["keys", "queries"]
)
def test_order_of_blocks_changes_no_bit(case):
    runs = [case.run(seed=seed) for seed in (0, 1, 2)]
    first, device = runs[0]
    assert device.launches[0].arguments.products[0].splits > 1
    assert device.launches[1].kernel == "ordered_sum"
    for sums, _ in runs[1:]:
        assert all(torch.equal(x.out, y.out) for x, y in zip(first, sums, strict=True))


def test_no_shared_memory_beyond_99_kib():
    """What consumer cards have: no tile depends on the device."""
    for tile in cuda_products.TILES.values():
        assert max(tile.shared(form) for form in ("keys", "queries")) <= 99 * 1024


@pytest.mark.parametrize(
    ("processors", "blocks", "steps", "expected"),
    [
        (108, 8, 154, 13),  # [dV | dK] of CUB, all images in one sum: 104 blocks
        (132, 8, 154, 16),
        (108, 200, 5, 1),  # of 50 images: no partial sums
        (108, 4, 200, 25),  # dQ of VSA: 27 would have as many stages each
        (108, 1, 1, 1),
    ],
)
def test_splits_fill_the_device(processors, blocks, steps, expected):
    assert cuda_products._splits(blocks, steps, Device(processors, 163 * 1024)) == expected


# Case, and at most: MACs over useful ones, wavefronts and PTX instructions for each tensor-core instruction, load and
# store sectors over ideal ones. 12 stages of every split, as on an A100 at B = 50.
COUNTS = {
    "CUB, C = 350": (Case("keys", (12, 1, 196, 312, 350)), 1.04, 1.9, 6.6, 1.20, 1.10),
    "CUB, C = 377": (Case("keys", (12, 1, 196, 312, 377)), 1.05, 1.8, 10.8, 1.18, 1.10),
    "VSA's queries, C = 350": (Case("queries", (12, 1, 312, 196, 350)), 1.10, 1.95, 8.3, 1.21, 1.10),
}


@pytest.mark.parametrize(("case", "macs", "wavefronts", "ptx", "loads", "stores"), COUNTS.values(), ids=COUNTS)
def test_counts(case, macs, wavefronts, ptx, loads, stores):
    device = case.check(processors=12)
    report = device.reports[0]
    b, h, rows, keys, columns = case.sizes
    assert report.macs <= macs * b * h * rows * keys * columns
    assert report.shared.wavefronts <= wavefronts * report.mma
    assert report.warp_instructions <= ptx * report.mma
    assert report.global_load.sectors <= loads * report.global_load.ideal_sectors
    assert report.global_store.sectors <= stores * report.global_store.ideal_sectors
    print(
        f"MACs {report.macs / (b * h * rows * keys * columns):.3f}, wavefronts {report.shared.wavefronts / report.mma:.2f}, "
        f"PTX {report.warp_instructions / report.mma:.2f}, "
        f"loads {report.global_load.sectors / report.global_load.ideal_sectors:.3f}, "
        f"stores {report.global_store.sectors / report.global_store.ideal_sectors:.3f}"
    )


def test_document_says_what_the_simulator_counts():
    """One row of it, of the smallest problem."""
    assert gpu_products.row(gpu_products.Products("VSA dQ", "AWA2", 350), GPUS[0]) in gpu_products.DOCUMENT.read_text()


# What is wrong, file, what the file says, what it says instead, the case that must fail, and how.
MUTATIONS = [
    ("a stage is read before it arrives", "summed_product.cuh", "    wait_for_copies();\n    __syncthreads();\n", "    __syncthreads();\n", CASES["keys"], ptxsim.Fault),
    ("a warp overtakes another", "summed_product.cuh", "    wait_for_copies();\n    __syncthreads();\n", "    wait_for_copies();\n", Case("keys", (3, 1, 70, 20, 40)), ptxsim.Fault),
    ("a split begins where another does", "summed_product.cuh", "all * split / product.splits", "all * 0 / product.splits", CASES["two results"], AssertionError),
    ("the second term is the first", "summed_product.cuh", "  ++term;", "  term = 0;", CASES["two terms"], AssertionError),
    ("images are not summed", "ordered_sum.cu", "+ batch * args.added.batch", "", CASES["added"], AssertionError),
    ("the last partial sum is lost", "ordered_sum.cu", "part < args.parts", "part < args.parts - 1", CASES["two results"], AssertionError),
    ("what lies behind a row is multiplied", "summed_product.cuh", "if (!whole) x = cut(x, valid(row(piece), byte));", "", CASES["queries, gaps"], AssertionError),
    ("rows behind the last are read", "summed_product.cuh", "return row < rows ?", "return row < rows + 1 ?", Case("keys", (2, 1, 70, 20, 40), kept=(True, False), gaps=(3, 1)), AssertionError),
]  # fmt: skip


@pytest.fixture
def copied_sources(tmp_path, monkeypatch):
    """The CUDA sources in a folder, with one product kernel of each form."""
    shutil.copytree(SOURCES, tmp_path / "cuda")
    source = tmp_path / "cuda" / "summed_product.cu"
    source.write_text(re.sub(r"  DO\(\w+, (?!bf16).*\n", "", source.read_text()).replace("Bfloat16)  \\", "Bfloat16)"))
    monkeypatch.setattr(cuda_device, "SOURCES", tmp_path / "cuda")
    cuda_device.module.cache_clear()
    yield tmp_path / "cuda"
    cuda_device.module.cache_clear()


def test_without_an_edit_every_case_passes(copied_sources):
    for case in {id(m[4]): m[4] for m in MUTATIONS}.values():
        case.check()


@pytest.mark.parametrize(
    ("file", "original", "mutant", "case", "error"), [m[1:] for m in MUTATIONS], ids=[m[0] for m in MUTATIONS]
)
def test_mutation_is_noticed(file, original, mutant, case, error, copied_sources):
    source = copied_sources / file
    text = source.read_text()
    assert text.count(original) == 1, f"{file} no longer has exactly one {original!r}: the mutation tests nothing"
    source.write_text(text.replace(original, mutant))
    with pytest.raises(error):
        case.check()
