"""A model of the CUDA kernels' time on GPUs, from counts of the PTX simulator: ``python -m benchmarks.gpu_model``.

Writes docs/gpu_model.md. No number in it is a measured time: one tile of rows is simulated, its counts are multiplied
by the tiles that the fullest processor runs, and each resource of a GPU gives a lower bound.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from bda_fused.backends import cuda_plan
from bda_fused.backends.cuda_plan import Device, Tile
from tests import attention_cases as cases
from tests.attention_cases import Case
from tests.cuda_device import simulated

DOCUMENT = Path(__file__).parents[1] / "docs" / "gpu_model.md"
IMAGES, REGIONS = 50, 196
ATTRIBUTES = {"CUB": 312, "SUN": 102, "AWA2": 85}
WIDTHS = (350, 377, 512, 2048)
CUB_WIDTHS = (350, 377, 437, 512, 2048)  # 437: two passes over the columns of an odd width
ELEMENT, ITEMSIZE = "bf16", 2
MMA_MACS = 16 * 8 * 16


@dataclass(frozen=True)
class Gpu:
    """What a GPU does in a second; the rates marked "assumed" in the document are not from a data sheet.

    macs: dense bfloat16 multiply-adds of a processor and clock; mma_share: how much of it mma.sync reaches.
    """

    name: str
    device: Device
    clock: float
    macs: int
    mma_share: float
    dram: float
    l2: float

    @property
    def tensor_rate(self) -> float:
        return self.device.processors * self.macs * self.clock


GPUS = (
    Gpu("A100", Device(108, 163 * 1024), 1.41e9, 1024, 1.0, 0.9 * 2.04e12, 5.0e12),
    Gpu("H100", Device(132, 227 * 1024), 1.83e9, 2048, 0.62, 0.9 * 3.35e12, 6.0e12),
)
ISSUE = 4  # warp instructions of a processor and clock
LAUNCH = 1.5e-6  # seconds, assumed
GEMM_SHARE = 0.8  # of the tensor rate that a library's product reaches, assumed


@dataclass(frozen=True)
class Problem:
    """One attention in one direction over the whole batch."""

    kind: str
    data_set: str
    width: int
    backward: bool = False

    @property
    def keys(self) -> int:
        return ATTRIBUTES[self.data_set] if self.kind == "SSA" else REGIONS

    @property
    def groups(self) -> tuple[int, int]:
        """(groups of rows that meet the same keys, rows in each)."""
        return (1, IMAGES * REGIONS) if self.kind == "SSA" else (IMAGES, ATTRIBUTES[self.data_set])

    @property
    def macs(self) -> int:
        """Useful multiply-adds of the row kernel: two products, of which VSA's backward has one in the kernel."""
        products = 1 if self.backward and self.kind == "VSA" else 2
        groups, rows = self.groups
        return products * groups * rows * self.keys * self.width

    @property
    def unique_bytes(self) -> int:
        """Every operand and result of the row kernel once."""
        groups, rows = self.groups
        map_bytes = groups * rows * self.keys * ITEMSIZE
        row_bytes, key_bytes = groups * rows * self.width * ITEMSIZE, groups * self.keys * self.width * ITEMSIZE
        shared_rows = ATTRIBUTES[self.data_set] * self.width * ITEMSIZE
        if self.kind == "SSA":
            return 2 * row_bytes + 2 * key_bytes + (2 * map_bytes if self.backward else 0)
        return row_bytes + key_bytes + (2 * map_bytes if self.backward else shared_rows)

    def tile(self, gpu: Gpu) -> Tile:
        tiles = cuda_plan.TILES[ELEMENT]["backward" if self.backward else "forward"]
        return cuda_plan.choose_tile(tiles, *self.groups, self.keys, ITEMSIZE, gpu.device)

    def case(self, tile: Tile) -> Case:
        """One tile of SSA, or one image of VSA."""
        if self.kind == "SSA":
            case = cases.ssa(1, tile.rows, self.keys, self.width).but(residual="query")
        else:
            case = cases.vsa(1, self.keys, ATTRIBUTES[self.data_set], self.width).but(value=None)
        return case.but(needs=("q" if self.kind == "SSA" else "k") if self.backward else "")


@dataclass(frozen=True)
class Counts:
    """Of one block. loads, stores: ideal and real sectors of 32 bytes. unique: bytes touched over those of operands."""

    mma: float
    macs: float
    wavefronts: float
    instructions: float
    loads: tuple[float, float]
    stores: tuple[float, float]
    unique: float


@contextmanager
def only(tile: Tile, direction: str) -> Iterator[None]:
    tiles = cuda_plan.TILES[ELEMENT]
    before, tiles[direction] = tiles[direction], (tile,)
    try:
        yield
    finally:
        tiles[direction] = before


def count(problem: Problem, tile: Tile, shared_limit: int) -> Counts:
    """The simulator's counts of the row kernel, on a GPU with so much shared memory for a block."""
    case = problem.case(tile)
    direction = "backward" if problem.backward else "forward"
    with simulated(shared_limit=shared_limit) as device, only(tile, direction):
        cases.run(cases.make_operands(case), case, "cuda")
    launch, report = next(
        (launch, report)
        for launch, report in zip(device.launches, device.reports, strict=True)
        if direction in launch.kernel
    )
    load, store = report.global_load, report.global_store
    operands = {x.data_ptr(): x.numel() * x.element_size() for x in launch.tensors.values()}
    return Counts(
        report.mma / launch.grid,
        report.macs / launch.grid,
        report.shared.wavefronts / launch.grid,
        report.warp_instructions / launch.grid,
        (load.ideal_sectors / launch.grid, load.sectors / launch.grid),
        (store.ideal_sectors / launch.grid, store.sectors / launch.grid),
        (load.unique_bytes + store.unique_bytes) / sum(operands.values()),
    )


def bounds(problem: Problem, counts: Counts, tile: Tile, gpu: Gpu) -> dict[str, float]:
    """Resource -> seconds that the row kernel takes at least."""
    groups, rows = problem.groups
    blocks = groups * -(-rows // tile.rows)
    waves = -(-blocks // gpu.device.processors)
    sectors = blocks * (counts.loads[1] + counts.stores[1])
    return {
        "tensor": waves * counts.mma * MMA_MACS / (gpu.macs * gpu.mma_share) / gpu.clock,
        "shared": waves * counts.wavefronts / gpu.clock,
        "issue": waves * counts.instructions / ISSUE / gpu.clock,
        "L2": 32 * sectors / gpu.l2,
        "DRAM": problem.unique_bytes / gpu.dram,
    }


def floor(problem: Problem, gpu: Gpu) -> float:
    """No kernel is faster: unique bytes, or useful products at the data sheet's rate."""
    return max(problem.unique_bytes / gpu.dram, problem.macs / gpu.tensor_rate)


def unfused(problem: Problem, gpu: Gpu, *, expanded: bool) -> float:
    """Scores, softmax and values as three kernels; with ``expanded``, SDPA's math path: the residual apart too."""
    groups, rows = problem.groups
    entries = groups * rows * problem.keys
    product = max(
        problem.macs / 2 / (GEMM_SHARE * gpu.tensor_rate),
        (problem.unique_bytes / 2 + ITEMSIZE * entries) / gpu.dram,
    )
    softmax = 2 * ITEMSIZE * entries / gpu.dram
    residual = (3 * groups * rows * problem.width * ITEMSIZE / gpu.dram + LAUNCH) if expanded else 0.0
    return 2 * product + softmax + residual + 3 * LAUNCH


def triton_l2() -> float:
    """Seconds that an H100 moves what Triton's largest tiles ask of L2 at least, for SSA of CUB at C = 2048."""
    rows, tile_rows = IMAGES * REGIONS, 128
    tile_bytes = (2 * ATTRIBUTES["CUB"] + 3 * tile_rows) * 2048 * ITEMSIZE
    return -(-rows // tile_rows) * tile_bytes / GPUS[1].l2


def rows_of(problems: list[Problem]) -> Iterator[str]:
    for problem in problems:
        for gpu in GPUS:
            tile = problem.tile(gpu)
            counts = count(problem, tile, gpu.device.shared_limit)
            resources = bounds(problem, counts, tile, gpu)
            limiter, bound = max(resources.items(), key=lambda item: item[1])
            least = floor(problem, gpu)
            useful = problem.macs / (problem.groups[0] * -(-problem.groups[1] // tile.rows))
            cells = [
                f"{problem.kind} {problem.data_set}",
                str(problem.width),
                gpu.name,
                tile.name,
                f"{counts.macs / useful:.3f}",
                f"{counts.wavefronts / counts.mma:.2f}",
                f"{counts.instructions / counts.mma:.1f}",
                f"{counts.loads[1] / counts.loads[0]:.2f}",
                f"{counts.stores[1] / counts.stores[0]:.2f}",
                f"{counts.unique:.3f}",
                f"{1e6 * least:.1f}",
                f"{1e6 * (bound + LAUNCH):.1f} ({limiter})",
                f"{1e6 * (sum(resources.values()) + LAUNCH):.1f}",
                f"{(bound + LAUNCH) / least:.2f}",
            ]
            if not problem.backward:
                cells += [f"{1e6 * unfused(problem, gpu, expanded=e):.1f}" for e in (False, True)]
            yield f"| {' | '.join(cells)} |"


HEADER = [
    "kernel",
    "C",
    "GPU",
    "tile",
    "MACs / useful",
    "wavefronts / MMA",
    "PTX / MMA",
    "load sectors",
    "store sectors",
    "unique bytes",
    "floor, us",
    "bound, us",
    "no overlap, us",
    "bound / floor",
]


def table(problems: list[Problem]) -> list[str]:
    header = HEADER + ([] if problems[0].backward else ["unfused, us", "SDPA, us"])
    return [f"| {' | '.join(header)} |", "| --- |" + " ---: |" * (len(header) - 1), *rows_of(problems)]


INTRODUCTION = """# A model of the CUDA kernels' time

Written by `python -m benchmarks.gpu_model`. **No time here was measured.** The PTX simulator of `tests/ptxsim` runs
one tile of rows (SSA), or one image (VSA), of the compiled kernel; what it counts is multiplied by the tiles that
the fullest processor runs at B = 50 and HW = 196, in bfloat16.

- *MACs / useful*: multiply-adds of the tensor cores over those of the problem, rows that a last tile lacks
  included. *wavefronts / MMA*: passes of shared memory per tensor-core instruction. *PTX / MMA*: all warp
  instructions of the kernel's PTX, which the assembler shortens. *load, store sectors*: 32-byte sectors over the
  fewest that the same bytes need. *unique bytes*: distinct bytes that a tile touches over those of its operands.
- *floor*: the larger of unique bytes over DRAM bandwidth and useful products over the data sheet's tensor rate.
  *bound*: the largest of the five resources' times, all overlapped, plus {launch:.1f} us; *no overlap*: their sum.
  A kernel lies between the two.
- Rates: A100 SXM 312 TFLOP/s, 2.04 TB/s; H100 SXM 989 TFLOP/s, 3.35 TB/s, data sheets. Assumed, not measured: 90 %
  of DRAM bandwidth, 5 and 6 TB/s between L2 and the processors, mma.sync at 62 % of H100's rate, {launch:.1f} us a
  launch, library products at {share:.0f} % of the tensor rate.
- *unfused*: two library products and a softmax, scores in bfloat16, the residual in the second product. *SDPA*: its
  math path, which such widths take, with the residual apart.
- *auto* passes over fused kernels on Hopper and newer from 128 keys and C = 1024 on: the two products are faster
  there. Triton's kernels are not in the table, but have tiles of 128 rows at most, each of which reads all keys and
  values, and its rows three times: for SSA of CUB at C = 2048 {triton:.0f} us between L2 and the processors of an H100.
- Rows whose length is no multiple of 16 bytes are packed once a call, keys and values alone; that kernel is not in
  the table. It moves their bytes twice: 0.2 MB for shared keys of CUB at C = 350, 6.9 MB for 50 images.
"""


def report() -> str:
    """The document."""
    forward = [
        Problem(kind, name, width)
        for kind in ("SSA", "VSA")
        for name in ATTRIBUTES
        for width in (CUB_WIDTHS if name == "CUB" else WIDTHS)
    ]
    backward = [
        Problem(kind, name, width, True) for kind in ("SSA", "VSA") for name in ATTRIBUTES for width in (350, 512)
    ]
    return "\n".join(
        [
            INTRODUCTION.format(launch=1e6 * LAUNCH, share=100 * GEMM_SHARE, triton=1e6 * triton_l2()),
            "## Forward",
            "",
            *table(forward),
            "",
            "## Backward: the row kernel (dS, and dQ of SSA)",
            "",
            *table(backward),
            "",
        ]
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    DOCUMENT.write_text(report())
    print(f"wrote {DOCUMENT}")
