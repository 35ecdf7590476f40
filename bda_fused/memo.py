"""Results that do not depend on the image, kept while a model is frozen, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeVar

from torch import Tensor, nn

T = TypeVar("T")


class Memo:
    """Results by name, each valid while the tensors that it came from are the same and unchanged."""

    def __init__(self) -> None:
        self._known: dict[Hashable, tuple[tuple[Tensor, ...], tuple[int, ...], object]] = {}

    def get(self, name: Hashable, compute: Callable[[], T], tensors: tuple[Tensor, ...]) -> T:
        versions = tuple(0 if x.is_inference() else x._version for x in tensors)
        if name in self._known:
            then, versions_then, result = self._known[name]
            same = len(then) == len(tensors) and all(a is b for a, b in zip(then, tensors, strict=True))
            if same and versions == versions_then:
                return result  # type: ignore[return-value]
        result = compute()
        self._known[name] = (tensors, versions, result)
        return result


def once(module: nn.Module, name: Hashable, compute: Callable[[], T], *inputs: Tensor) -> T:
    """``compute()``, remembered while ``module`` is frozen if its inputs are shared by all images (at most 2-D)."""
    memo = module.__dict__.get("_memo")
    if memo is None or any(x.dim() > 2 for x in inputs):
        return compute()
    return memo.get(name, compute, (*inputs, *module.parameters()))


def is_frozen(module: nn.Module) -> bool:
    return module.__dict__.get("_memo") is not None
