"""A model of the CUDA backend's long products, from counts of the PTX simulator: ``python -m benchmarks.gpu_products``.

Writes docs/gpu_products.md. No number in it is a measured time: one result of every launch, or one image's where each
has its own, is simulated at full size, and each resource of a GPU gives a lower bound, as in gpu_model.py, whose GPUs
and assumptions these are.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch

from bda_fused.backends import cuda, cuda_products
from bda_fused.backends.cuda_plan import Launch
from bda_fused.backends.cuda_products import Sum
from bda_fused.shapes import padded_rows
from benchmarks.gpu_model import ATTRIBUTES, GPUS, IMAGES, ISSUE, ITEMSIZE, LAUNCH, MMA_MACS, REGIONS, Gpu
from tests import ptxsim
from tests.cuda_device import SimulatedDevice

DOCUMENT = Path(__file__).parents[1] / "docs" / "gpu_products.md"
WIDTHS = (350, 377, 512)
KINDS = {
    "SSA dV and dK": "keys and values that all images share",
    "VSA dX": "each image's keys, which are its values: two terms",
    "VSA dQ": "queries that all images share",
}


@dataclass(frozen=True)
class Products:
    """One launch of summed products at B = 50 and HW = 196, in bfloat16."""

    kind: str
    data_set: str
    width: int

    @property
    def macs(self) -> int:
        """Useful multiply-adds."""
        products = 1 if self.kind == "VSA dQ" else 2
        return products * IMAGES * REGIONS * ATTRIBUTES[self.data_set] * self.width

    def plan(self, gpu: Gpu) -> list[Launch]:
        attributes = ATTRIBUTES[self.data_set]
        rows, keys = (REGIONS, attributes) if self.kind == "SSA dV and dK" else (attributes, REGIONS)
        left = padded_rows(torch.empty(0, dtype=torch.bfloat16), (IMAGES, 1, rows, keys), cuda.WEIGHTS_PITCH).zero_()
        right = torch.zeros(IMAGES, 1, keys if self.kind == "VSA dQ" else rows, self.width, dtype=torch.bfloat16)
        if self.kind == "SSA dV and dK":
            sums = [Sum([(left, right)], right.new_empty(1, 1, keys, self.width)) for _ in range(2)]
        elif self.kind == "VSA dX":
            sums = [Sum([(left, right), (left, right)], right.new_empty(IMAGES, 1, keys, self.width))]
        else:
            sums = [Sum([(left, right)], right.new_empty(1, 1, rows, self.width))]
        form = "queries" if self.kind == "VSA dQ" else "keys"
        return cuda_products.launches(form, sums, (IMAGES, 1), gpu.device)

    def unique_bytes(self, plan: list[Launch]) -> int:
        """Every operand and result once, and partial results twice."""
        tensors = {x.data_ptr(): x for x in plan[0].tensors.values()}.values()
        total = sum(x.numel() * x.element_size() for x in tensors)
        if self.kind == "SSA dV and dK":  # P and dS, dY and U: the plan has one of each
            total += sum(
                x.numel() * x.element_size() for name, x in plan[0].tensors.items() if name in ("left00", "right00")
            )
        elif self.kind == "VSA dX":  # P and dS
            total += plan[0].tensors["left00"].numel() * ITEMSIZE
        for launch in plan[1:]:
            total += sum(x.numel() * x.element_size() for x in launch.tensors.values())
        return total


def count(launch: Launch) -> tuple[ptxsim.Report, int]:
    """The simulator's counts of the blocks of one result of one group, and how many they are."""
    one = launch.arguments.products[0]
    blocks = one.row_tiles * one.column_tiles * one.splits
    device = SimulatedDevice(shared_limit=227 * 1024)
    device.run([Launch(launch.kernel, blocks, launch.shared, launch.arguments, launch.tensors)], torch.device("cpu"))
    return device.reports[0], blocks


def bounds(report: ptxsim.Report, blocks: int, plan: list[Launch], problem: Products, gpu: Gpu) -> dict[str, float]:
    """Resource -> seconds that the products take at least, the sum of partial results included."""
    waves = -(-plan[0].grid // gpu.device.processors)
    sectors = (report.global_load.sectors + report.global_store.sectors) / blocks * plan[0].grid
    summed = sum(x.numel() * x.element_size() for launch in plan[1:] for x in launch.tensors.values())
    return {
        "tensor": waves * report.mma / blocks * MMA_MACS / (gpu.macs * gpu.mma_share) / gpu.clock,
        "shared": waves * report.shared.wavefronts / blocks / gpu.clock,
        "issue": waves * report.warp_instructions / blocks / ISSUE / gpu.clock,
        "L2": (32 * sectors + summed) / gpu.l2,
        "DRAM": problem.unique_bytes(plan) / gpu.dram,
    }


def row(problem: Products, gpu: Gpu) -> str:
    """The document's row of one launch on one GPU."""
    plan = problem.plan(gpu)
    report, blocks = count(plan[0])
    resources = bounds(report, blocks, plan, problem, gpu)
    limiter, bound = max(resources.items(), key=lambda item: item[1])
    launches = LAUNCH * (2 if len(plan) > 1 else 1)
    load, store = report.global_load, report.global_store
    cells = [
        f"{problem.kind} {problem.data_set}",
        str(problem.width),
        gpu.name,
        f"{plan[0].grid} ({plan[0].arguments.products[0].splits})",
        f"{report.macs / blocks * plan[0].grid / problem.macs:.3f}",
        f"{report.shared.wavefronts / report.mma:.2f}",
        f"{report.warp_instructions / report.mma:.1f}",
        f"{load.sectors / load.ideal_sectors:.2f}",
        f"{store.sectors / store.ideal_sectors:.2f}",
        f"{1e6 * problem.macs / gpu.tensor_rate:.1f}",
        f"{1e6 * (bound + launches):.1f} ({limiter})",
        f"{1e6 * (sum(resources.values()) + launches):.1f}",
    ]
    return f"| {' | '.join(cells)} |"


HEADER = (
    "product", "C", "GPU", "blocks (splits)", "MACs / useful", "wavefronts / MMA", "PTX / MMA", "load sectors",
    "store sectors", "tensor floor, us", "bound, us", "no overlap, us",
)  # fmt: skip
INTRODUCTION = """# A model of the CUDA backend's long products

Written by `python -m benchmarks.gpu_products`. **No time here was measured.** The PTX simulator runs the blocks of one
result, or of one image's, at B = 50 and HW = 196 in bfloat16; columns, GPUs and assumptions are those of
[gpu_model.md](gpu_model.md). *blocks (splits)*: of the launch, and into how many parts each sum is cut. *tensor floor*:
useful products at the data sheet's rate. The bound includes the sum of the
partial results, whose bytes count as DRAM's although they fit into L2, and its launch.
"""


def report() -> str:
    """The document."""
    kinds = [f"- *{kind}*: {words}." for kind, words in KINDS.items()]
    problems = [Products(*of) for of in product(KINDS, ATTRIBUTES, WIDTHS)]
    rows = [row(problem, gpu) for problem in problems for gpu in GPUS]
    lines = [f"| {' | '.join(HEADER)} |", "| --- |" + " ---: |" * (len(HEADER) - 1), *rows]
    return "\n".join([INTRODUCTION, *kinds, "", *lines, ""])


if __name__ == "__main__":
    torch.set_num_threads(1)
    DOCUMENT.write_text(report())
    print(f"wrote {DOCUMENT}")
