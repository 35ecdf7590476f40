"""What the compiler makes of the CUDA kernels: registers, instructions of the inner loops, and counts of the simulator."""

import re

import pytest

from bda_fused import _native
from benchmarks import cuda_resources
from benchmarks.gpu_model import GPUS, Problem, bounds, count, floor

BUILT = _native.build_info().get("_cuda", {})
pytestmark = pytest.mark.skipif(not BUILT.get("built"), reason="the CUDA module was not built")
A100, H100 = GPUS


def test_nothing_is_spilled():
    usage = cuda_resources.usage()
    assert set(usage) == set(_native.module("_cuda").kernels())
    for name, by_arch in usage.items():
        assert set(by_arch) == set(BUILT["arches"])
        assert all(stack == 0 for _, stack in by_arch.values()), name


def test_document_says_what_the_assembler_says():
    document = cuda_resources.DOCUMENT.read_text()
    if BUILT["toolkit"] not in document or f"| kernel | {' | '.join(BUILT['arches'])} |\n" not in document:
        pytest.skip("the module was built by another compiler, or for other architectures, than the document's")
    assert document == cuda_resources.report(), "run python -m benchmarks.cuda_resources"


def sass(kernel, arch):
    """The kernel's instructions, and where each lies."""
    text = cuda_resources.cuobjdump("-arch", arch, "-fun", kernel, "--dump-sass")
    return {int(address, 16): line for address, line in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]+);", text)}


def inner_loops(instructions):
    """The instructions of every loop that has tensor-core instructions and no such loop in it."""
    addresses = list(instructions)
    loops = []
    for address, line in instructions.items():
        target = re.search(r"\bBRA(?:\.\w+)* .*?0x([0-9a-f]+)", line)
        if target and int(target[1], 16) <= address:
            body = [instructions[a] for a in addresses if int(target[1], 16) <= a <= address]
            if any("HMMA" in x for x in body):
                loops.append((int(target[1], 16), address, body))
    return [
        body
        for first, last, body in loops
        if not any((a, b) != (first, last) and first <= a and b <= last for a, b, _ in loops)
    ]


@pytest.mark.parametrize("kernel", ["96x320", "80x320"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_inner_loops_are_lean(direction, kernel):
    """Both products: tensor-core instructions, 16-byte copies, no local memory, few instructions beside."""
    if "sm_80" not in BUILT["arches"]:
        pytest.skip("the module was not built for sm_80")
    instructions = sass(f"residual_attention_{direction}_bf16_{kernel}", "sm_80")
    loops = inner_loops(instructions)
    assert len(loops) == 2  # scores and values
    for body in loops:
        assert len(body) / sum("HMMA.16816.F32.BF16" in x for x in body) <= 3.5
    assert any("LDGSTS.E.BYPASS.128" in x for x in instructions.values())
    assert not any(re.search(r"\b(LDL|STL)\b", x) for x in instructions.values())


# Kernel, width, and at most: MACs over useful ones, wavefronts and PTX instructions for each tensor-core instruction,
# load and store sectors over ideal ones. The values are those of docs/gpu_model.md, rounded up.
COUNTS = [
    ("SSA", 350, A100, 1.03, 1.86, 6.5, 1.07, 1.24),
    ("SSA", 512, A100, 1.03, 1.88, 6.3, 1.01, 1.01),
    ("VSA", 350, A100, 1.08, 2.75, 10.0, 1.08, 1.24),
    ("SSA", 377, A100, 1.05, 2.12, 8.3, 1.07, 1.24),
]


@pytest.mark.parametrize(("kind", "width", "gpu", "macs", "wavefronts", "ptx", "loads", "stores"), COUNTS)
def test_counts(kind, width, gpu, macs, wavefronts, ptx, loads, stores):
    problem = Problem(kind, "CUB", width)
    tile = problem.tile(gpu)
    counts = count(problem, tile)
    groups, rows = problem.groups
    assert counts.macs * groups * -(-rows // tile.rows) <= macs * problem.macs
    assert counts.wavefronts <= wavefronts * counts.mma
    assert counts.instructions <= ptx * counts.mma
    assert counts.loads[1] <= loads * counts.loads[0]
    assert counts.stores[1] <= stores * counts.stores[0]


def test_model_is_a_lower_bound_with_the_aims():
    problem = Problem("SSA", "CUB", 350)
    tile = problem.tile(A100)
    resources = bounds(problem, count(problem, tile), tile, A100)
    assert floor(problem, A100) <= max(resources.values()) <= 1.5 * floor(problem, A100)
