"""What a test of these kernels needs: the one rule of numerics, and dropout masks that can be replayed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from bda_fused import dropout
from bda_fused.dropout import philox_keep

__all__ = ["assert_close", "error_bound", "philox_keep", "philox_masks", "record_seeds", "replay_masks"]

OUTPUT_FACTOR, GRADIENT_FACTOR = 2.0, 3.0


def error_bound(truth: Tensor, yardstick: Tensor, *, factor: float, largest_term: float = 0.0) -> float:
    """How far a result may be from the truth.

    truth: the reference in float64. yardstick: the natural formulation, unfolded and unfused, in the result's dtype
    with its softmax in float32, on the same device. The bound is ``factor`` times the yardstick's own error, plus 4
    eps of the truth's largest entry, plus eps of the largest summed term (which matters only where the truth is 0).
    """
    eps = torch.finfo(yardstick.dtype).eps
    error = _largest(yardstick.double() - truth)
    return factor * error + 4 * eps * _largest(truth) + eps * largest_term


def assert_close(
    result: Tensor,
    truth: Tensor,
    yardstick: Tensor,
    *,
    gradient: bool = False,
    largest_term: float = 0.0,
    name: str = "result",
) -> None:
    """AssertionError unless ``result`` is as good as the rule of numerics asks: one rule for all tests."""
    assert result.shape == truth.shape, f"{name} has shape {tuple(result.shape)}, expected {tuple(truth.shape)}"
    assert yardstick.shape == truth.shape, f"the yardstick of {name} has shape {tuple(yardstick.shape)}"
    assert result.dtype == yardstick.dtype, f"{name} has dtype {result.dtype}, expected {yardstick.dtype}"
    assert bool(yardstick.isfinite().all() and truth.isfinite().all()), f"{name} has no finite yardstick and truth"
    error = _largest(result.double() - truth)
    factor = GRADIENT_FACTOR if gradient else OUTPUT_FACTOR
    bound = error_bound(truth, yardstick, factor=factor, largest_term=largest_term)
    assert error <= bound, f"{name} is off by {error:.3e}, the rule allows {bound:.3e}"


def _largest(x: Tensor) -> float:
    return float(x.detach().abs().max()) if x.numel() else 0.0


@contextmanager
def philox_masks() -> Iterator[None]:
    """Inside the context the eager backend draws its masks by Philox, as kernels do, on every device."""
    before, dropout.philox_everywhere = dropout.philox_everywhere, True
    try:
        yield
    finally:
        dropout.philox_everywhere = before


@contextmanager
def record_seeds() -> Iterator[list[Tensor]]:
    """Collects the seeds of the attention maps' dropout that are drawn inside the context, in their order."""
    before, dropout.seed_log = dropout.seed_log, []
    try:
        yield dropout.seed_log
    finally:
        dropout.seed_log = before


def replay_masks(seeds: Sequence[Tensor]) -> Callable[[Tensor, float, bool], Tensor]:
    """A stand-in for ``reference.map_dropout`` that applies the masks of recorded seeds, one call after the other."""
    remaining = iter(seeds)

    def map_dropout(weights: Tensor, p: float, training: bool) -> Tensor:
        if not training or p == 0:
            return weights
        return weights * dropout.mask(next(remaining), p, weights.shape, weights.dtype)

    return map_dropout
