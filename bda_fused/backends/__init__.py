"""The backends of residual attention, and the choice between them.

``auto`` takes the first of CHOICES that can run the problem and whose ``advice``, if it has one, does not say that
another is faster. A backend that is named runs or raises the one sentence that ``explain`` gives: nothing falls back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from types import ModuleType

from torch import Tensor

from bda_fused import _checks
from bda_fused.backends.problem import Problem
from bda_fused.shapes import lift, lift_bias

# In the order of preference.
CHOICES = ("cuda", "triton", "cpu", "eager")
NAMES = ("auto", *CHOICES)


class BackendError(RuntimeError):
    """A backend that was named cannot run the problem."""


@dataclass(frozen=True)
class Explanation:
    """Which backend would run a problem, and why the others would not.

    backend: its name, None where the named one cannot run. refused: name -> one sentence.
    """

    backend: str | None
    refused: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.backend or 'none'} runs"]
        return "\n".join(lines + [f"{name}: {reason}" for name, reason in self.refused.items()])


@lru_cache
def module(name: str) -> ModuleType:
    """A backend's module, imported when it is first asked for."""
    return import_module(f"bda_fused.backends.{name}")


def availability() -> dict[str, str | None]:
    """Backend -> None where it can run on this machine, else the one sentence that says why not."""
    return {name: module(name).availability() for name in CHOICES}


def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    residual: Tensor | None = None,
    *,
    attn_bias: Tensor | None = None,
    backend: str = "auto",
) -> Explanation:
    """Which backend ``residual_attention`` would use for these tensors, and why the others would not run them.

    Raises:
        TypeError, ValueError: as ``residual_attention`` does for the same tensors.
    """
    _checks.check_options(None, 0.0, False, backend, NAMES)
    query, key, value = _checks.checked_operands(query, key, value, residual, attn_bias)
    bias = None if attn_bias is None else lift_bias(attn_bias, heads=query.dim() == 4)
    problem = Problem.of(lift(query), lift(key), lift(value), None if residual is None else lift(residual), bias)
    backend = current(backend)
    reasons = {name: _reason(name, problem, chosen_by_us=backend == "auto") for name in CHOICES}
    refused = {name: reason for name, reason in reasons.items() if reason is not None}
    candidates = CHOICES if backend == "auto" else (backend,)
    return Explanation(next((name for name in candidates if name not in refused), None), refused)


_default = "auto"


@contextmanager
def use(name: str) -> Iterator[None]:
    """Inside the context ``auto`` means the backend ``name``, for the modules too and in all threads.

    Raises:
        ValueError: there is no backend of that name.
    """
    _checks.check_options(None, 0.0, False, name, NAMES)
    global _default
    before, _default = _default, name
    try:
        yield
    finally:
        _default = before


def current(backend: str) -> str:
    """The backend's name, with what ``use`` makes of "auto" now."""
    return _default if backend == "auto" else backend


def _reason(name: str, problem: Problem, *, chosen_by_us: bool) -> str | None:
    """Why a backend cannot run the problem, or should not where the choice is ours; None where it should."""
    reason: str | None = module(name).can_run(problem)
    if reason is None and chosen_by_us:
        advice = getattr(module(name), "advice", None)
        reason = None if advice is None else advice(problem)
    return reason


def select(problem: Problem, backend: str) -> ModuleType:
    """The module of the backend that runs the problem; BackendError with its reason where a named one cannot."""
    backend = current(backend)
    for name in CHOICES if backend == "auto" else (backend,):
        reason = _reason(name, problem, chosen_by_us=backend == "auto")
        if reason is None:
            return module(name)
    raise BackendError(f"backend={backend!r} cannot run: {reason}")
