"""What the compiler makes of the CUDA kernels: registers, instructions of the inner loops, and counts of the simulator."""

import re
from functools import cache

import pytest

from bda_fused import _native
from bda_fused.backends import cuda_plan
from benchmarks import cuda_resources
from benchmarks.gpu_model import GPUS, Problem, bounds, count, floor

BUILT = _native.build_info().get("_cuda", {})
pytestmark = pytest.mark.skipif(not BUILT.get("built"), reason="the CUDA module was not built")
A100, _ = GPUS


def test_nothing_is_spilled():
    usage = cuda_resources.usage()
    assert set(usage) == set(_native.module("_cuda").kernels())
    for name, by_arch in usage.items():
        assert set(by_arch) == set(BUILT["arches"])
        assert all(stack == 0 for _, stack in by_arch.values()), (name, by_arch)


def test_document_says_what_the_assembler_says():
    document = cuda_resources.DOCUMENT.read_text()
    if BUILT["toolkit"] not in document or f"| kernel | {' | '.join(BUILT['arches'])} |\n" not in document:
        pytest.skip("the module was built by another compiler, or for other architectures, than the document's")
    assert document == cuda_resources.report(), "run python -m benchmarks.cuda_resources"


def sass(kernel, arch):
    """The kernel's instructions, and where each lies."""
    text = cuda_resources.cuobjdump("-arch", arch, "-fun", kernel, "--dump-sass")
    return {int(address, 16): line for address, line in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]+);", text)}


def branches(instructions):
    """(where it stands, where it goes to) of every branch."""
    for address, line in instructions.items():
        if target := re.search(r"\b(?:BRA|BSSY)(?:\.\w+)* .*?0x([0-9a-f]+)", line):
            yield address, int(target[1], 16)


def inner_loops(instructions):
    """The instructions of every loop that has tensor-core instructions and no such loop in it."""
    found = []
    for last, first in branches(instructions):
        body = {address: line for address, line in instructions.items() if first <= address <= last}
        if any("HMMA" in line for line in body.values()):
            found.append(body)
    return [body for body in found if not any(other is not body and other.items() <= body.items() for other in found)]


def straight_lines(body, targets):
    """The instructions of a loop from one branch, barrier or target of a branch to the next."""
    blocks = [[]]
    for address, line in body.items():
        if address in targets:
            blocks.append([])
        blocks[-1].append(line)
        if re.search(r"\b(BRA|BAR|BSYNC)\b", line):
            blocks.append([])
    return blocks


def products(lines):
    return sum("HMMA" in line for line in lines)


@pytest.mark.parametrize("tile", [cuda_plan.Tile(96, 320), cuda_plan.Tile(80, 320)], ids=lambda tile: tile.name)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_inner_loops_are_lean(direction, tile):
    """Tensor-core instructions, copies past the registers, no local memory, and little beside.

    A loop's straight lines without products copy left rows, once for many products: what they cost is in the counts of
    PTX. Warps that have two blocks or units count: others have too few products to hide anything.
    """
    if "sm_80" not in BUILT["arches"]:
        pytest.skip("the module was not built for sm_80")
    instructions = sass(f"residual_attention_{direction}_bf16_{tile.name}", "sm_80")
    targets = {target for _, target in branches(instructions)}
    loops = [x for x in inner_loops(instructions) if products(x.values()) >= 4 * tile.rows // 16]
    assert len(loops) >= 2  # scores and values, for every number of a warp's columns
    for body in loops:
        lines = [line for block in straight_lines(body, targets) if products(block) for line in block]
        assert len(lines) <= 3.5 * products(lines)
    assert any("LDGSTS" in x for x in instructions.values())
    assert not any(re.search(r"\b(LDL|STL)\b", x) for x in instructions.values())


# Kernel, width, and at most: MACs over useful ones, wavefronts and PTX instructions for each tensor-core instruction,
# load and store sectors over ideal ones, unique bytes over those of the operands.
COUNTS = [
    ("SSA", 350, 1.02, 1.8, 5.2, 1.07, 1.24, 1.07),
    ("SSA", 2048, 1.02, 1.8, 5.2, 1.07, 1.24, 1.07),
    ("SSA", 377, 1.04, 1.8, 6.5, 1.07, 1.24, 1.07),
    ("VSA", 350, 1.13, 2.1, 7.8, 1.07, 1.24, 1.07),
    ("VSA", 437, 1.13, 3.1, 11.8, 1.07, 1.24, 1.07),
]


@cache
def counted(problem, tile):
    return count(problem, tile, A100.device.shared_limit)


@pytest.mark.parametrize(("kind", "width", "macs", "wavefronts", "ptx", "loads", "stores", "unique"), COUNTS)
def test_counts(kind, width, macs, wavefronts, ptx, loads, stores, unique):
    problem = Problem(kind, "CUB", width)
    tile = problem.tile(A100)
    counts = counted(problem, tile)
    groups, rows = problem.groups
    assert counts.macs * groups * -(-rows // tile.rows) <= macs * problem.macs
    assert counts.wavefronts <= wavefronts * counts.mma
    assert counts.instructions <= ptx * counts.mma
    assert counts.loads[1] <= loads * counts.loads[0]
    assert counts.stores[1] <= stores * counts.stores[0]
    assert counts.unique <= unique


@pytest.mark.parametrize(("kind", "width", "aim"), [("SSA", 350, 1.5), ("VSA", 437, 1.9)])
def test_model_is_a_lower_bound_with_the_aims(kind, width, aim):
    problem = Problem(kind, "CUB", width)
    tile = problem.tile(A100)
    resources = bounds(problem, counted(problem, tile), tile, A100)
    assert floor(problem, A100) <= max(resources.values()) <= aim * floor(problem, A100)
