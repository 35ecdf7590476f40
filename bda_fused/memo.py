"""Results that do not depend on the image, kept while a model is frozen, and nowhere else.

They live in the context of `frozen` (so in the thread that entered it), not in the modules: copies, pickles and
replicas of a frozen model know nothing of them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


class Memo:
    """Results by name, each valid while the tensors that it came from are the same and unchanged."""

    def __init__(self) -> None:
        self._known: dict[Hashable, tuple[tuple[Tensor, ...], list[Hashable], object]] = {}

    def get(self, name: Hashable, compute: Callable[[], T], tensors: tuple[Tensor, ...]) -> T:
        states = [_state(x) for x in tensors]
        if name in self._known:
            then, states_then, result = self._known[name]
            same = len(then) == len(tensors) and all(a is b for a, b in zip(then, tensors, strict=True))
            if same and states == states_then:
                return result  # type: ignore[return-value]
        result = compute()
        self._known[name] = (tensors, states, result)
        return result


def _state(x: Tensor) -> Hashable:
    """What changes when the tensor is written to, or given other memory or another dtype by ``x.data = ...``."""
    return (0 if x.is_inference() else x._version, x.data_ptr(), x.dtype)


_NOTHING: Mapping[nn.Module, Memo] = MappingProxyType({})
_memos: ContextVar[Mapping[nn.Module, Memo]] = ContextVar("bda_fused.memos", default=_NOTHING)


@contextmanager
def remembering(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside the context ``once`` remembers for these modules."""
    known = _memos.get()
    token = _memos.set({**known, **{module: known.get(module) or Memo() for module in modules}})
    try:
        yield
    finally:
        _memos.reset(token)


def _memo_of(module: nn.Module) -> Memo | None:
    """The module's memo, unless what it computes now is to be differentiated, trained or traced."""
    if module.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    return _memos.get().get(module)


def once(module: nn.Module, name: Hashable, compute: Callable[[], T], *inputs: Tensor) -> T:
    """``compute()``, remembered while ``module`` is frozen if its inputs are shared by all images (at most 2-D)."""
    memo = _memo_of(module)
    if memo is None or any(x.dim() > 2 for x in inputs):
        return compute()
    return memo.get(name, compute, (*inputs, *module.parameters()))


def is_frozen(module: nn.Module) -> bool:
    """Whether ``once`` remembers for the module now."""
    return _memo_of(module) is not None
