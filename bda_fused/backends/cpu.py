"""The C++ backend for CPU tensors."""

from __future__ import annotations

from bda_fused import _native
from bda_fused.backends.problem import Problem


def availability() -> str | None:
    """None, or one sentence that says why this backend cannot run here."""
    return _native.status("_cpu") or "the cpu backend has no residual-attention kernel in this version"


def can_run(problem: Problem) -> str | None:
    """None, or one sentence that says why this backend cannot take the problem."""
    if problem.device.type != "cpu":
        return f"the cpu backend takes CPU tensors, got {problem.device}"
    return availability()
