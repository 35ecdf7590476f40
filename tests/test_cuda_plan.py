"""What the CUDA kernels are launched with: structs, tiles, shared memory; and one object for the driver and the tests."""

import contextlib
import ctypes
from types import SimpleNamespace

import pytest
import torch

from bda_fused import _native, backends
from bda_fused.backends import cuda, cuda_plan
from bda_fused.backends.batch_sum import batch_sum
from bda_fused.backends.cuda_plan import Device, PackArguments, RowArguments, Tile
from bda_fused.backends.cuda_products import ProductArguments, SumArguments
from bda_fused.backends.problem import Problem
from tests import attention_cases as cases
from tests.attention_cases import rsa, ssa, vsa
from tests.cuda_device import simulated

A100, H100, CONSUMER = Device(108, 163 * 1024), Device(132, 227 * 1024), Device(84, 99 * 1024)
BF16 = torch.bfloat16

needs_module = pytest.mark.skipif(
    not _native.build_info().get("_cuda", {}).get("built"), reason="the CUDA module was not built"
)


@needs_module
def test_every_planned_kernel_is_built_and_takes_these_arguments():
    built = _native.module("_cuda").kernels()
    planned = {
        f"residual_attention_{direction}_{element}_{tile.name}": ctypes.sizeof(RowArguments)
        for element, directions in cuda_plan.TILES.items()
        for direction, tiles in directions.items()
        for tile in tiles
    }
    planned |= {
        f"summed_product_{form}_{element}": ctypes.sizeof(ProductArguments)
        for form in ("keys", "queries")
        for element in cuda_plan.TILES
    }
    planned |= {"pack_rows": ctypes.sizeof(PackArguments), "ordered_sum": ctypes.sizeof(SumArguments)}
    assert built == planned


@needs_module
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("no_kernel", b""), "there is no kernel named no_kernel"),
        (("pack_rows", b"1234"), f"pack_rows takes {ctypes.sizeof(PackArguments)} bytes of arguments, got 4"),
    ],
)
def test_launch_refuses(arguments, sentence):
    name, packed = arguments
    with pytest.raises(ValueError, match=sentence):
        _native.module("_cuda").launch(name, 1, 256, 0, packed, stream=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the launch succeeds")
@needs_module
def test_failed_launch_names_the_kernel():
    with pytest.raises(RuntimeError, match="pack_rows did not launch: "):
        _native.module("_cuda").launch("pack_rows", 1, 256, 0, bytes(PackArguments()), stream=0)


@pytest.mark.gpu
@needs_module
def test_failed_launch_is_not_blamed_on_the_next():
    with pytest.raises(RuntimeError, match="pack_rows did not launch: "):
        _native.module("_cuda").launch("pack_rows", 1, 256, 2**20, bytes(PackArguments()), stream=0)
    assert batch_sum(torch.ones(2, 3, device="cuda")).eq(2).all()


@pytest.mark.parametrize(
    ("device", "groups", "rows", "keys", "expected"),
    [
        (A100, 1, 9800, 312, 96),  # one wave of 103 blocks; 80 rows would be two
        (H100, 1, 9800, 312, 80),  # one wave of 123
        (A100, 1, 9800, 102, 96),
        (A100, 50, 312, 196, 80),  # two waves of 200
        (H100, 50, 312, 196, 64),  # two waves of 250
        (A100, 1, 10, 312, 32),
        (A100, 1, 9800, 400, 32),
        (CONSUMER, 1, 9800, 312, 64),
    ],
)
def test_row_tile_is_chosen_by_waves_and_shared_memory(device, groups, rows, keys, expected):
    tiles = cuda_plan.TILES["bf16"]["forward"]
    assert cuda_plan.choose_tile(tiles, groups, rows, keys, 2, device).rows == expected


@pytest.mark.parametrize("element", cuda_plan.TILES)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_99_kib_are_enough_for_every_problem(element, direction):
    itemsize = 4 if element.startswith("tf32") else 2
    most = max(cuda_plan.key_groups(2000))
    for keys in range(1, most + 1):
        tile = cuda_plan.choose_tile(cuda_plan.TILES[element][direction], 1, 9800, keys, itemsize, CONSUMER)
        assert tile.shared_bytes(itemsize) <= 99 * 1024


@pytest.mark.parametrize(
    ("device", "keys", "width", "stay"),
    [(H100, 312, 350, True), (H100, 312, 512, True), (H100, 312, 2048, False), (A100, 312, 350, False)],
)
def test_rows_that_are_added_stay_on_chip_where_they_fit(device, keys, width, stay):
    x, shared = torch.zeros(1, 1, 9800, width, dtype=BF16), torch.zeros(1, 1, keys, width, dtype=BF16)
    problem = cuda_plan.RowProblem(device, "forward", (1, 1, 9800, keys), x, shared, shared, x, x.clone(), None, 1.0)
    (launch,) = problem.launches()
    assert (launch.arguments.added_kind == cuda_plan.LEFT) == stay
    assert ("added" not in launch.tensors) == stay
    assert launch.shared <= device.shared_limit


@pytest.mark.parametrize(
    ("width", "units"), [(350, [22]), (377, [24]), (437, [16, 12]), (500, [16, 16]), (2048, [24] * 5 + [8]), (1, [1])]
)
def test_passes_are_even_rounds_over_the_warps(width, units):
    step, total = Tile(96, 128).pass_units(width, 2), -(-width // 16)
    assert [min(step, total - first) for first in range(0, total, step)] == units


def test_the_driver_gets_what_the_simulator_runs(monkeypatch):
    case = vsa(2, 12, 21, 21, bias=(12,), dropout_p=0.3)
    with simulated() as device:
        cases.run(cases.make_operands(case), case, "cuda")
    launched = []
    module = SimpleNamespace(launch=lambda *arguments, stream: launched.append((*arguments, stream)))
    monkeypatch.setattr(_native, "module", lambda name: module)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=7))
    cuda._run(device.launches, torch.device("cuda"))
    # Keys and values packed, the forward; values packed again, the backward; gradients of keys and values, of queries.
    assert len(launched) == 7
    assert launched == [(x.kernel, x.grid, x.block, x.shared, bytes(x.arguments), 7) for x in device.launches]


def test_failure_names_the_operands(monkeypatch):
    def launch(*_, **__):
        raise RuntimeError("pack_rows did not launch: out of luck")

    monkeypatch.setattr(_native, "module", lambda name: SimpleNamespace(launch=launch))
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=7))
    _, packing = cuda_plan.pack(torch.zeros(2, 1, 5, 7))
    sentence = r"out of luck; its operands: source \(2, 1, 5, 7\), packed \(2, 1, 5, 8\)"
    with pytest.raises(RuntimeError, match=sentence):
        cuda._run([packing], torch.device("cuda"))


def kernels(case):
    with simulated() as device:
        cases.run(cases.make_operands(case), case, "cuda")
    return [launch.kernel.split("_bf16")[0] for launch in device.launches]


FORWARD, BACKWARD = "residual_attention_forward", "residual_attention_backward"
KEYS, QUERIES, SUM = "summed_product_keys", "summed_product_queries", "ordered_sum"


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (ssa(1, 9, 8, 16, needs=""), [FORWARD]),  # aligned rows are read where they are
        (ssa(1, 9, 8, 15, needs=""), ["pack_rows", "pack_rows", FORWARD]),
        (ssa(1, 9, 8, 15, needs="").but(value=None), ["pack_rows", FORWARD]),  # the key is the value
        (ssa(1, 9, 8, 16, needs="q"), [FORWARD, BACKWARD]),
        (ssa(1, 9, 8, 16, needs="v"), [FORWARD, KEYS]),  # P is at hand
        (ssa(1, 9, 8, 16, needs="k"), [FORWARD, BACKWARD, KEYS]),
        (ssa(1, 9, 8, 16, needs="kv"), [FORWARD, BACKWARD, KEYS]),  # both in one
        (ssa(2, 900, 8, 16, needs="kv"), [FORWARD, BACKWARD, KEYS, SUM, SUM]),  # in splits
        (vsa(2, 9, 8, 16, needs="q"), [FORWARD, BACKWARD, QUERIES]),
        (vsa(2, 9, 8, 16, needs="q").but(residual="query"), [FORWARD, BACKWARD, QUERIES, SUM]),
        (ssa(1, 9, 8, 16, needs="r"), [FORWARD]),
        (ssa(1, 9, 8, 16, needs="b", bias=(9, 1)), [FORWARD]),  # cannot matter
        (rsa(1, 9, 16, needs="b"), [FORWARD, BACKWARD]),
        (ssa(1, 9, 600, 16, needs=""), [FORWARD] * 4),  # two groups of keys, twice
    ],
)
def test_no_kernel_runs_in_vain(case, expected):
    assert kernels(case) == expected


def test_maps_lie_in_rows_that_copies_of_16_bytes_can_read():
    """Whatever the number of keys: the map that was kept, P * M and dS, which the long products read."""
    for dropout_p in (0.0, 0.3):
        case = ssa(2, 9, 13, 16, needs="kv", dropout_p=dropout_p)
        with simulated() as device:
            cases.run(cases.make_operands(case), case, "cuda")
        (products,) = (launch.arguments.products for launch in device.launches if "summed_product" in launch.kernel)
        assert [product.left_unit for product in products] == [16, 16]


def test_nobody_is_written_who_is_not_needed():
    case = ssa(2, 9, 8, 16, bias=(8,), needs="q")
    with simulated() as device:
        cases.run(cases.make_operands(case), case, "cuda")
    assert set(device.launches[-1].tensors) == {"left", "first", "second", "out", "weights"}


def test_forward_without_gradient_holds_no_map():
    case = ssa(2, 9, 8, 16, needs="")
    with simulated() as device:
        cases.run(cases.make_operands(case), case, "cuda")
    assert set(device.launches[-1].tensors) == {"left", "first", "second", "added", "out"}


# Refusals


def problem(device="cuda", dtype=BF16, result=None, scores=(1, 1, 2, 2)):
    return Problem(scores, dtype, result or dtype, torch.device(device), (8, 8))


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (problem("cpu"), "the cuda backend takes CUDA tensors, got cpu"),
        (problem(dtype=torch.float64), "the cuda backend computes in float32, bfloat16 and float16, got float64"),
        (problem(result=torch.float64), "the cuda backend computes in float32, bfloat16 and float16, got float64"),
        (
            problem(scores=(2**15, 1, 2**14, 2)),
            "the cuda backend takes up to 268435456 rows, keys and columns, got scores (32768, 1, 16384, 2)",
        ),
    ],
)
def test_refusals_of_a_problem(given, sentence):
    assert cuda.can_run(given) == sentence


@pytest.mark.parametrize(
    ("driver", "capability", "sentence"),
    [
        (0, (8, 0), "the cuda backend needs an NVIDIA driver, and there is none"),
        (
            13000,
            (9, 0),
            "the cuda backend was built for sm_80, sm_100, and this GPU has compute capability 9.0; "
            "install again with it in TORCH_CUDA_ARCH_LIST",
        ),
        (12080, (8, 0), "the cuda backend was built with CUDA 13, and the driver runs CUDA 12 at most"),
        (13000, (7, 5), "the cuda backend needs compute capability 8.0 or newer, got 7.5"),
        (13000, (8, 0), None),
    ],
)
def test_refusals_of_a_machine(driver, capability, sentence, monkeypatch):
    module = SimpleNamespace(runtime_version=lambda: 13000, driver_version=lambda: driver)
    monkeypatch.setattr(_native, "status", lambda name: None)
    monkeypatch.setattr(_native, "module", lambda name: module)
    monkeypatch.setattr(_native, "build_info", lambda: {"_cuda": {"arches": ["sm_80", "sm_100"], "ptx": []}})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert cuda.can_run(problem()) == sentence


@pytest.mark.parametrize(
    ("capability", "arches", "ptx", "runs"),
    [
        ((8, 0), ["sm_80"], [], True),
        ((8, 9), ["sm_80"], [], True),
        ((8, 0), ["sm_86"], [], False),
        ((9, 0), ["sm_80"], [], False),
        ((9, 0), ["sm_80"], ["compute_80"], True),
        ((12, 1), ["sm_80", "sm_120"], [], True),
        ((10, 0), ["sm_90", "sm_120"], [], False),
        ((8, 0), ["sm_90"], ["compute_86"], False),
        ((13, 0), ["sm_80"], ["compute_80"], True),
    ],
)
def test_code_runs_on_its_own_generation_and_ptx_on_all_later_ones(capability, arches, ptx, runs):
    assert cuda.has_code_for(capability, tuple(arches), tuple(ptx)) is runs


def test_missing_module_is_the_reason(monkeypatch):
    monkeypatch.setattr(_native, "status", lambda name: "the extension module bda_fused._cuda was not built: no luck")
    assert cuda.can_run(problem()) == "the extension module bda_fused._cuda was not built: no luck"


def test_auto_passes_over_fused_kernels_where_the_model_says_that_they_lose(monkeypatch):
    for name in ("cuda", "triton"):
        monkeypatch.setattr(backends.module(name), "can_run", lambda problem: None)
    shapes = [(2, 9, 1024), (256, 1024), (256, 1024)]
    operands = [torch.zeros(shape, dtype=BF16) for shape in shapes]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    explanation = backends.explain(*operands)
    assert explanation.backend == "eager"
    for name in ("cuda", "triton"):
        reason = f"for 256 keys of width 1024 two matrix products are faster than the {name} backend on this GPU"
        assert explanation.refused[name].startswith(reason)
        assert backends.explain(*operands, backend=name).backend == name
    assert backends.explain(operands[0], *(x[129:] for x in operands[1:])).backend == "cuda"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert backends.explain(*operands).backend == "cuda"


def test_named_backend_does_not_fall_back():
    with pytest.raises(backends.BackendError, match="cannot run: the cuda backend takes CUDA tensors, got cpu"):
        cases.run(cases.make_operands(ssa(1, 3, 2, 4)), ssa(1, 3, 2, 4), "cuda")
