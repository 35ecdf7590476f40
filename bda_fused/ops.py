"""The raw operators: schemas, implementations and fakes. Public code calls them through autograd.py.

All operands are 4-D: query (B|1, H|1, L, Dk), key (B|1, H|1, S, Dk), value (B|1, H|1, S, Dv), residual
(B|1, H|1, L, Dv), attn_bias any 4-D shape that broadcasts to (B, H, L, S). A batch axis of size 1 is shared.

    Y = R + M * softmax(scale * Q K^T + attn_bias) V

``value`` None: the key is the value. ``residual_is_query``: the query is the residual. Each is then one operand, read
once and with one gradient. ``seed``: an int64 tensor of shape () from which the dropout mask M follows, None without
dropout. The forward returns

    y        (B, H, L, Dv)
    weights  the softmax before dropout, (b, h, L, S) in the value's dtype, where b and h are the broadcast of query,
             key and attn_bias alone; shape (0,) unless it is asked for or a gradient is and the backend keeps it (then
             in rows of the backend's pitch)
    row_sum  (B, H, L), the row sums of M * weights, float32 or float64; shape (0,) unless asked for
    lse      (b, h, L), the log-sum-exp of the scores, where a gradient is asked for and the backend recomputes the
             weights; else (0,)

The backend is chosen inside the operator, so a traced graph does not depend on it.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from bda_fused import backends
from bda_fused.backends.problem import BackwardOptions, Options, Problem
from bda_fused.numerics import softmax_dtype, without_autocast
from bda_fused.shapes import batch_of, padded_rows

_library = torch.library.Library("bda_fused", "DEF")
_library.define(
    "residual_attention(Tensor query, Tensor key, Tensor? value, Tensor? residual, Tensor? attn_bias, Tensor? seed, "
    "float scale, float dropout_p, bool residual_is_query, bool need_weights, bool need_row_sum, bool need_grad, "
    "str backend) -> (Tensor y, Tensor weights, Tensor row_sum, Tensor lse)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "residual_attention_backward(Tensor grad_y, Tensor? grad_weights, Tensor? grad_row_sum, Tensor query, Tensor key, "
    "Tensor? value, Tensor? attn_bias, Tensor weights, Tensor lse, Tensor? seed, float scale, float dropout_p, "
    "bool residual_is_query, bool[] needs, str backend) "
    "-> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_bias)",
    tags=(torch.Tag.pt2_compliant_tag,),
)

residual_attention = torch.ops.bda_fused.residual_attention.default
residual_attention_backward = torch.ops.bda_fused.residual_attention_backward.default


@torch.library.impl(_library, "residual_attention", "CompositeExplicitAutograd")
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    residual: Tensor | None,
    attn_bias: Tensor | None,
    seed: Tensor | None,
    *given: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    options = Options(*given)
    value = key if value is None else value
    residual = query if options.residual_is_query else residual
    problem = Problem.of(query, key, value, residual, attn_bias)
    chosen = backends.select(problem, options.backend)
    with without_autocast(query.device):
        return chosen.forward(problem, query, key, value, residual, attn_bias, seed, options)


@torch.library.register_fake("bda_fused::residual_attention", lib=_library)
def _forward_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    residual: Tensor | None,
    attn_bias: Tensor | None,
    seed: Tensor | None,
    *given: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    options = Options(*given)
    value = key if value is None else value
    residual = query if options.residual_is_query else residual
    problem = Problem.of(query, key, value, residual, attn_bias)
    chosen = backends.select(problem, options.backend)
    keeps = chosen.KEEPS_WEIGHTS
    pitch = chosen.WEIGHTS_PITCH if keeps and not options.need_weights else 1
    scored = [query, key] if attn_bias is None else [query, key, attn_bias]
    batch = batch_of(*scored)
    *outer, rows, keys = problem.scores
    statistics = softmax_dtype(problem.dtype)
    return (
        query.new_empty((*outer, rows, value.shape[3]), dtype=problem.result_dtype),
        padded_rows(value, (*batch, rows, keys), pitch)
        if options.need_weights or (options.need_grad and keeps)
        else value.new_empty(0),
        query.new_empty((*outer, rows) if options.need_row_sum else 0, dtype=statistics),
        query.new_empty((*batch, rows) if options.need_grad and not keeps else 0, dtype=statistics),
    )


@torch.library.impl(_library, "residual_attention_backward", "CompositeExplicitAutograd")
def _backward(
    grad_y: Tensor,
    grad_weights: Tensor | None,
    grad_row_sum: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    attn_bias: Tensor | None,
    weights: Tensor,
    lse: Tensor,
    seed: Tensor | None,
    *given: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    options, key_is_value = BackwardOptions(*given), value is None
    value = key if value is None else value
    problem = Problem.of(query, key, value, grad_y, attn_bias)
    chosen = backends.select(problem, options.backend)
    with without_autocast(query.device):
        return chosen.backward(
            problem,
            grad_y,
            grad_weights,
            grad_row_sum,
            query,
            key,
            value,
            attn_bias,
            weights,
            lse,
            seed,
            key_is_value,
            options,
        )


@torch.library.register_fake("bda_fused::residual_attention_backward", lib=_library)
def _backward_fake(
    grad_y: Tensor,
    grad_weights: Tensor | None,
    grad_row_sum: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    attn_bias: Tensor | None,
    weights: Tensor,
    lse: Tensor,
    seed: Tensor | None,
    *given: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    needs, value = BackwardOptions(*given).needs, key if value is None else value
    bias = query if attn_bias is None else attn_bias
    query_grad, key_grad, value_grad, bias_grad = (
        x.new_empty(x.shape if need else 0) for x, need in zip((query, key, value, bias), needs, strict=True)
    )
    return query_grad, key_grad, value_grad, bias_grad


def _refuse_gradient(*_: object) -> NoReturn:
    raise RuntimeError(
        "the raw bda_fused operators have no gradient of their own: call bda_fused.functional.residual_attention"
    )


for _name in ("residual_attention", "residual_attention_backward"):
    torch.library.register_autograd(f"bda_fused::{_name}", _refuse_gradient, lib=_library)
