"""``python -m tests.ptxsim.measure``: the numbers of the README."""

from pathlib import Path

import torch

from tests.ptxsim import run_triton
from tests.ptxsim.probes import triton_kernels
from tests.ptxsim.test_removals import STAGES, TILES, Study

FOLDER = Path(__file__).parent
SIMULATOR = ("parser", "cfg", "lower", "launch", "report", "faults", "compile", "core", "__init__")


def speed() -> None:
    q, k, v, out = (torch.randn(128, 64).bfloat16() for _ in range(4))
    arguments = (q, k, v, out, 128, 0.18)
    runs = [run_triton(triton_kernels.flash_attention, 1, *arguments, BM=64, BN=64, D=64) for _ in range(20)]
    best = min(runs, key=lambda report: report.seconds)
    print(f"flash attention, one block of 64 rows, 128 keys, D = 64, bf16, 4 warps: {1e3 * best.seconds:.2f} ms")
    print(
        f"{best.warp_instructions} warp instructions, {best.warp_instructions / best.seconds / 1e6:.1f} million a second"
    )
    print(f"{best.thread_instructions / best.seconds / 1e6:.0f} million thread instructions a second, all checks on")


def removals() -> None:
    print("stages  tile  removed  found  unnoticed (PTX line: text)")
    total = found = 0
    for stages in STAGES:
        for tile in TILES:
            study = Study(stages, tile)
            lines = study.kernel.ptx.splitlines()
            unnoticed = study.unnoticed()
            removed = len(study.synchronisations)
            total, found = total + removed, found + removed - len(unnoticed)
            quoted = ", ".join(f"{line + 1}: {' '.join(lines[line].split())}" for line in unnoticed)
            print(f"{stages:6}  {tile:4}  {removed:7}  {removed - len(unnoticed):5}  {quoted}")
    print(f"found {found} of {total}")


def lines_of_code() -> None:
    files = [FOLDER / f"{name}.py" for name in SIMULATOR] + sorted((FOLDER / "core").iterdir())
    counts = {file.name: file.read_text().splitlines() for file in files}
    for name, lines in counts.items():
        print(f"{name:15} {len(lines):4}")
    every = [line.strip() for lines in counts.values() for line in lines]
    code = [line for line in every if line and not line.startswith(("//", "#"))]
    print(f"{len(every)} lines, {len(code)} without blank lines and comments")


if __name__ == "__main__":
    speed()
    removals()
    lines_of_code()
