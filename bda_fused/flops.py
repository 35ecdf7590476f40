"""FLOPs of the operators for torch.utils.flop_counter: import this module to have them counted.

torch's counter sees one operator and nothing of what runs inside. Not imported with the package, because the counter
imports Triton where it is installed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch.utils.flop_counter import register_flop_formula

from bda_fused import ops

__all__ = ["ops"]

Shape: TypeAlias = Sequence[int]


@register_flop_formula(torch.ops.bda_fused.residual_attention)
def _forward_flops(
    query: Shape, key: Shape, value: Shape | None, residual: Shape | None, attn_bias: Shape | None, *_: Any, **__: Any
) -> int:
    """2 per multiply-add of Q K^T, over the batch of its operands alone, and of P V."""
    value = key if value is None else value
    scored = [shape for shape in (query, key, attn_bias) if shape is not None]
    everything = [shape for shape in (*scored, value, residual) if shape is not None]
    per_row = 2 * query[2] * key[2]
    return per_row * (_images(scored) * query[3] + _images(everything) * value[3])


@register_flop_formula(torch.ops.bda_fused.residual_attention_backward)
def _backward_flops(
    grad_y: Shape, _map: Any, _sums: Any, query: Shape, key: Shape, value: Shape | None, attn_bias: Shape | None,
    *rest: Any, **_kwargs: Any,
) -> int:  # fmt: skip
    """dP and dV over the whole batch, dQ and dK over the batch of the scores, as far as they are needed."""
    needs = rest[-2]
    need_query, need_key, need_value, need_bias = needs
    key_is_value = value is None
    value = key if value is None else value
    scored = [shape for shape in (query, key, attn_bias) if shape is not None]
    products_with_value = (need_query or need_key or need_bias) + (need_value or (need_key and key_is_value))
    per_row = 2 * query[2] * key[2]
    whole = _images([*scored, value, grad_y]) * value[3] * products_with_value
    return per_row * (whole + _images(scored) * query[3] * (need_query + need_key))


def _images(shapes: list[Shape]) -> int:
    batch, heads = (max(shape[axis] for shape in shapes) for axis in (0, 1))
    return batch * heads
