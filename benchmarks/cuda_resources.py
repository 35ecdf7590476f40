"""Registers and stack of every CUDA kernel as the assembler reports them: ``python -m benchmarks.cuda_resources``.

Writes docs/gpu_resources_cuda.md from the extension module as it is built.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

from bda_fused import _native

DOCUMENT = Path(__file__).parents[1] / "docs" / "gpu_resources_cuda.md"


def cuobjdump(*options: str) -> str:
    """What NVIDIA's cuobjdump, of the toolkit or of triton, prints for the CUDA module."""
    triton = find_spec("triton")
    bundled = Path(triton.origin or "").parent / "backends/nvidia/bin/cuobjdump" if triton else None
    command = shutil.which("cuobjdump") or bundled
    if command is None:
        raise RuntimeError("no cuobjdump on PATH, and triton, which brings one, is not installed")
    module = _native.module("_cuda").__file__
    return subprocess.run([str(command), *options, str(module)], capture_output=True, text=True, check=True).stdout


def usage() -> dict[str, dict[str, tuple[int, int]]]:
    """Kernel -> architecture -> (registers of a thread, bytes of stack, which is where spills go)."""
    found: dict[str, dict[str, tuple[int, int]]] = {}
    arch = ""
    for line in cuobjdump("--dump-resource-usage").splitlines():
        if match := re.match(r"arch = (sm_\w+)", line):
            arch = match[1]
        elif match := re.match(r" Function ((?:residual_attention|summed_product|ordered_sum|pack_rows)\w*):", line):
            name = match[1]
        elif (match := re.match(r"\s+REG:(\d+) STACK:(\d+)", line)) and "name" in locals():
            found.setdefault(name, {})[arch] = int(match[1]), int(match[2])
            del name
    return found


def report() -> str:
    """The document."""
    built = _native.build_info()["_cuda"]
    rows = usage()
    arches = built["arches"]
    lines = [
        "# Registers of the CUDA kernels",
        "",
        "Written by `python -m benchmarks.cuda_resources` from a module built with",
        f"{built['toolkit']}. Registers of a thread, and the stack where there is one, which is",
        "where spills go. Shared memory depends on the problem: `bda_fused/backends/cuda_plan.py` counts it.",
        "",
        f"| kernel | {' | '.join(arches)} |",
        f"| --- |{' ---: |' * len(arches)}",
    ]
    for name in sorted(rows):
        cells = [f"{rows[name][a][0]}" + (f" + {rows[name][a][1]} B" if rows[name][a][1] else "") for a in arches]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    DOCUMENT.write_text(report())
    print(f"wrote {DOCUMENT}")
