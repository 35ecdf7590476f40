"""The Triton backend for GPUs from sm_80 up."""

from __future__ import annotations

from importlib.util import find_spec

from bda_fused.backends.problem import Problem


def availability() -> str | None:
    """None, or one sentence that says why this backend cannot run here."""
    if find_spec("triton") is None:
        return "triton is not installed: it comes with the CUDA builds of torch for Linux"
    return "the triton backend has no residual-attention kernel in this version"


def can_run(problem: Problem) -> str | None:
    """None, or one sentence that says why this backend cannot take the problem."""
    if problem.device.type != "cuda":
        return f"the triton backend takes CUDA tensors, got {problem.device}"
    return availability()
