"""Registers, spills, shared memory and occupancy of the kernels at released sizes: ``python -m tests.gpu_resources``.

Writes docs/gpu_resources.md from what the assembler says. No GPU is needed and nothing is executed.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch
import triton
from bda_fused.kernels import launch as launching
from bda_fused.kernels.launch import KIB, Launch, Target

from bda_fused import functional as F
from bda_fused.backends import triton as backend
from tests.attention_cases import Case, make_operands

DOCUMENT = Path(__file__).parent.parent / "docs/gpu_resources.md"
COLUMNS = ("GPU", "case", "kernel", "warps", "registers", "spilled bytes", "shared KiB", "warps per SM")

# Compute capability, opt-in shared memory of a block, shared memory of an SM.
GPUS = {"sm_80": (80, 163, 164), "sm_90": (90, 227, 228), "sm_100": (100, 227, 228), "sm_120": (120, 99, 100)}


def _ssa(attributes: int, dim: int, **options: object) -> Case:
    return Case((2, 196, dim), (attributes, dim), (attributes, dim), "query", (attributes,), **options)


def _vsa(attributes: int, dim: int, regions: int = 196, **options: object) -> Case:
    return Case((attributes, dim), (2, regions, dim), None, None, **options)


def _rsa(regions: int, dim: int, **options: object) -> Case:
    shape = (2, regions, dim)
    return Case(shape, shape, None, None, (regions, regions), **options)


def _long(dim: int, **options: object) -> Case:
    return Case((2, 49, dim), (600, dim), (600, dim), (2, 49, dim), (600,), **options)


CASES = {
    **{f"SSA, A={a}, C=350": _ssa(a, 350) for a in (85, 102, 312)},
    "SSA, A=85, C=300": _ssa(85, 300),
    "VSA, A=85, C=300": _vsa(85, 300),
    **{f"SSA, A=312, C={c}": _ssa(312, c) for c in (300, 377, 437, 500, 512, 2048)},
    "SSA, A=102, C=350, dropout": _ssa(102, 350, dropout_p=0.1),
    "SSA, A=312, C=350, dropout": _ssa(312, 350, dropout_p=0.1),
    "SSA, A=312, C=377, dropout": _ssa(312, 377, dropout_p=0.1),
    "SSA, A=312, C=437, dropout": _ssa(312, 437, dropout_p=0.1),
    "VSA, A=312, C=350": _vsa(312, 350),
    "VSA, A=312, C=350, dropout": _vsa(312, 350, dropout_p=0.1),
    "VSA, A=312, C=437, dropout": _vsa(312, 437, dropout_p=0.1),
    "VSA, A=85, C=2048, HW=49": _vsa(85, 2048, 49),
    "RSA, C=350": _rsa(196, 350),
    "RSA, C=350, dropout": _rsa(196, 350, dropout_p=0.1),
    "RSA, C=350, fp32": _rsa(196, 350),
    "S=600": _long(64),
    "SSA, A=102, C=350, fp32": _ssa(102, 350),
    "SSA, A=312, C=350, fp32": _ssa(312, 350),
    "VSA, A=312, C=350, fp32": _vsa(312, 350),
    # What no released model runs, for the other entries of tiles.py.
    "SSA, A=102, C=350, dropout, fp32": _ssa(102, 350, dropout_p=0.1),
    "SSA, A=312, C=350, dropout, fp32": _ssa(312, 350, dropout_p=0.1),
    "VSA, A=312, C=350, dropout, fp32": _vsa(312, 350, dropout_p=0.1),
    **{f"SSA, A={a}, C=350{kind}": _ssa(a, 350) for a in (208, 256, 400, 512) for kind in ("", ", fp32")},
    **{
        f"SSA, A={a}, C=350, dropout{kind}": _ssa(a, 350, dropout_p=0.1)
        for a in (208, 256, 400, 512)
        for kind in ("", ", fp32")
    },
    "SSA, A=16, C=350, dropout": _ssa(16, 350, dropout_p=0.1),
    "SSA, A=128, C=350, fp32": _ssa(128, 350),
    "SSA, A=128, C=350, dropout, fp32": _ssa(128, 350, dropout_p=0.1),
    "SSA, A=304, C=350": _ssa(304, 350),
    "SSA, A=304, C=350, dropout": _ssa(304, 350, dropout_p=0.1),
    "SSA, A=192, C=350, dropout, fp32": _ssa(192, 350, dropout_p=0.1),
    **{f"SSA, A=384, C=350{kind}": _ssa(384, 350) for kind in ("", ", fp32")},
    "SSA, A=384, C=350, dropout": _ssa(384, 350, dropout_p=0.1),
    **{f"S=600, C=350{kind}": _long(350) for kind in ("", ", fp32")},
    **{f"S=600, C=350, dropout{kind}": _long(350, dropout_p=0.1) for kind in ("", ", fp32")},
    # The same entries with keys per image, with a bias by row and with a gradient of the map.
    "VSA, A=312, C=350, HW=312": _vsa(312, 350, 312),
    "VSA, A=312, C=350, HW=312, dropout": _vsa(312, 350, 312, dropout_p=0.1),
    "SSA, A=312, C=350, map": _ssa(312, 350, need_weights=True),
    "SSA, A=312, C=350, map, dropout": _ssa(312, 350, need_weights=True, dropout_p=0.1),
    "VSA, A=312, C=350, HW=400": _vsa(312, 350, 400),
    "VSA, A=312, C=350, HW=400, dropout": _vsa(312, 350, 400, dropout_p=0.1),
    "RSA, C=350, HW=304, dropout": _rsa(304, 350, dropout_p=0.1),
    "RSA, C=350, HW=400": _rsa(400, 350),
    "RSA, C=350, HW=400, dropout": _rsa(400, 350, dropout_p=0.1),
    "RSA, C=350, HW=512": _rsa(512, 350),
    "RSA, C=350, HW=512, dropout": _rsa(512, 350, dropout_p=0.1),
    "RSA, C=350, HW=256, fp32": _rsa(256, 350),
}


def launches(case: Case, dtype: torch.dtype, target: Target) -> list[Launch]:
    """What a training step launches, without launching it; keys and values have the padded rows of folded ones."""
    planned: list[Launch] = []
    run, can_run, of = Launch.run, backend.can_run, launching.Target.of
    Launch.run = lambda launch: planned.append(launch)  # type: ignore[method-assign]
    backend.can_run = lambda problem: None
    Target.of = lambda device: target  # type: ignore[method-assign]
    try:
        operands = [None if x is None else x.requires_grad_() for x in make_operands(case.but(dtype=dtype)).values()]
        query, key, value, residual, bias = operands
        shared = case.residual == "query"
        if shared:
            key, value = (None if x is None else _padded(x) for x in (key, value))
        y, weights, _ = F.attend(
            query, key, value, residual, attn_bias=bias, dropout_p=case.dropout_p, residual_is_query=shared,
            need_weights=case.need_weights, backend="triton",
        )  # fmt: skip
        loss = y.sum() if weights is None else y.sum() + (weights * weights).sum()
        torch.autograd.grad(loss, [x for x in operands if x is not None], allow_unused=True)
    finally:
        Launch.run, backend.can_run, Target.of = run, can_run, of  # type: ignore[method-assign]
    return planned


def _padded(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % 32))[..., : x.shape[-1]]


@cache
def _usage(gpu: str, key: str) -> tuple[int, int, int]:
    launch = _pending[key]
    capability, limit, _ = GPUS[gpu]
    kernel = launch.compile(Target(capability, limit * KIB))
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        report = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"REG:(\d+)", report)[1]), int(re.search(r"STACK:(\d+)", report)[1]), kernel.metadata.shared


_pending: dict[str, Launch] = {}


def rows(gpu: str, name: str) -> list[dict[str, str]]:
    """The rows of the table for one case on one GPU, a kernel once for each way in which the case needs it."""
    capability, limit, per_sm = GPUS[gpu]
    dtype = torch.float32 if name.endswith("fp32") else torch.bfloat16
    table = {}
    for launch in launches(CASES[name], dtype, Target(capability, limit * KIB)):
        key = f"{launch.kernel.__name__} {launch.specialization()!r} {launch.options!r}"
        _pending[key] = launch
        registers, stack, shared = _usage(gpu, key)
        warps = launch.options["num_warps"]
        blocks = min(
            65536 // (-(-registers // 8) * 8 * 32 * warps),
            per_sm * KIB // (shared + KIB),
            (48 if gpu == "sm_120" else 64) // warps,
        )
        kernel = launch.kernel.__name__.removeprefix("residual_attention_").replace("_", " ")
        values = (gpu, name, kernel, warps, registers, stack, f"{shared / KIB:.1f}", blocks * warps)
        table[key] = dict(zip(COLUMNS, map(str, values), strict=True))
    return list(table.values())


def read() -> list[dict[str, str]]:
    """The rows of the document."""
    lines = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("| sm_")]
    return [dict(zip(COLUMNS, (cell.strip() for cell in line.split("|")[1:-1]), strict=True)) for line in lines]


def main() -> None:
    lines = [
        "# GPU resources of the Triton kernels",
        "",
        "What the assembler says of every kernel of a training step, at released sizes and at sizes that take the other",
        "entries of kernels/tiles.py, in bf16 unless it says fp32. Written by",
        "`python -m tests.gpu_resources`; tests compare it. Nothing here was timed, and nothing ran on a GPU. Warps per SM is what registers, shared",
        "memory and the SM's limit of warps allow. Spilled bytes are per thread: nothing spills.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for gpu in GPUS:
        for name in CASES:
            lines += ["| " + " | ".join(row.values()) + " |" for row in rows(gpu, name)]
            print(gpu, name, file=sys.stderr, flush=True)
    DOCUMENT.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
