"""The CUDA C++ backend for GPUs from sm_80 up."""

from __future__ import annotations

from bda_fused import _native
from bda_fused.backends.problem import Problem


def availability() -> str | None:
    """None, or one sentence that says why this backend cannot run here."""
    return _native.status("_cuda") or "the cuda backend has no residual-attention kernel in this version"


def can_run(problem: Problem) -> str | None:
    """None, or one sentence that says why this backend cannot take the problem."""
    if problem.device.type != "cuda":
        return f"the cuda backend takes CUDA tensors, got {problem.device}"
    return availability()
