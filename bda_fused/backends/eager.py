"""The eager backend: residual attention in plain torch ops, forward and explicit backward, on any device.

The twin that every kernel is compared with. It never expands a shared operand in memory: a product with one is a
single GEMM over all images, or a batched GEMM with stride 0, and the gradient of one is a long GEMM over all images.
All operands are 4-D, (B or 1, H or 1, rows, width); ops.py has the contract.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bda_fused import dropout
from bda_fused.backends._gemm import gradient, product, score_product
from bda_fused.backends.problem import BackwardOptions, Options, Problem
from bda_fused.numerics import LOW_PRECISION, cast, gemm_dtype, softmax_dtype

# The backward reads the map; a backend without this recomputes it from the log-sum-exp.
KEEPS_WEIGHTS = True
WEIGHTS_PITCH = 1


def availability() -> str | None:
    """None: torch is all that this backend needs."""
    return None


def can_run(problem: Problem) -> str | None:
    """None: every problem is taken."""
    return None


def forward(
    problem: Problem,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    residual: Tensor | None,
    attn_bias: Tensor | None,
    seed: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Y, the map before dropout, its row sums after dropout, and an empty log-sum-exp: this backend keeps the map."""
    dtype = gemm_dtype(query.dtype, query.device)
    q, k, v = cast(query, dtype), cast(key, dtype), cast(value, dtype)
    weights = softmax_map(q, k, attn_bias, options.scale)
    dropped = weights
    if seed is not None:
        dropped = weights * dropout.mask(seed, options.dropout_p, problem.scores, weights.dtype)
    p = cast(dropped, dtype)
    if residual is None:
        y = product(p, v)
    elif torch.promote_types(dtype, problem.result_dtype) == dtype:
        y = product(p, v, add=cast(residual, dtype))
    else:
        y = residual + cast(product(p, v), problem.result_dtype)
    return (
        _not_a_view(cast(y, problem.result_dtype)),
        cast(weights, value.dtype) if options.need_weights or options.need_grad else value.new_empty(0),
        dropped.sum(-1).expand(problem.scores[:3]).contiguous() if options.need_row_sum else weights.new_empty(0),
        weights.new_empty(0),
    )


def backward(
    problem: Problem,
    grad_y: Tensor,
    grad_weights: Tensor | None,
    grad_row_sum: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None,
    weights: Tensor,
    lse: Tensor,
    seed: Tensor | None,
    key_is_value: bool,
    options: BackwardOptions,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and attn_bias, of their shapes; empty where ``options.needs`` says no.

    With ``residual_is_query`` the query's gradient includes the residual's, with ``key_is_value`` the key's includes
    the value's.
    """
    scale, dropout_p, residual_is_query, (need_query, need_key, need_value, need_bias), _ = options
    dtype = gemm_dtype(query.dtype, query.device)
    q, k, v, dy = cast(query, dtype), cast(key, dtype), cast(value, dtype), cast(grad_y, dtype)
    p = cast(weights, softmax_dtype(weights.dtype))
    if p.dtype != weights.dtype:
        # Rounded weights do not sum to 1, and dS would take the difference for a part of dP: in a peaked row that is
        # larger than dS itself.
        p = p / p.sum(-1, keepdim=True).clamp_min(torch.finfo(p.dtype).tiny)
    grad_q: Tensor | None = None
    grad_k: Tensor | None = None
    grad_v: Tensor | None = None
    grad_bias: Tensor | None = None

    mask = None
    if seed is not None:
        mask = dropout.mask(seed, dropout_p, problem.scores, p.dtype)
    if need_value or (need_key and key_is_value):
        dropped = p if mask is None else p * mask
        grad_v = gradient(cast(dropped, dtype).mT, dy, v.shape)
    if need_query or need_key or need_bias:
        dp = cast(product(dy, v.mT), p.dtype)
        if grad_row_sum is not None:
            dp = dp + grad_row_sum[..., None]
        if mask is not None:
            dp = dp * mask
        dp = dp.sum_to_size(p.shape)
        if grad_weights is not None:
            dp = dp + grad_weights
        ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)
        if need_bias:
            assert attn_bias is not None
            grad_bias = ds.sum_to_size(attn_bias.shape)
        if dtype in LOW_PRECISION:  # scaled before it is rounded, so that float16 sums do not overflow
            ds, scale = ds.mul(scale).to(dtype), 1.0
        if need_query:
            grad_q = gradient(ds, k, q.shape, add=dy if residual_is_query else None, alpha=scale)
        if need_key:
            grad_k = gradient(ds.mT, q, k.shape, add=grad_v if key_is_value else None, alpha=scale)
    return (
        _result(grad_q, query),
        _result(grad_k, key),
        _result(grad_v if need_value else None, value),
        _result(grad_bias, query if attn_bias is None else attn_bias),
    )


def _result(grad: Tensor | None, operand: Tensor) -> Tensor:
    """A gradient in its operand's dtype, or the empty tensor of one that nobody needs."""
    return operand.new_empty(0) if grad is None else cast(grad, operand.dtype)


def _not_a_view(y: Tensor) -> Tensor:
    """The same memory as a tensor of its own, as torch's own matmul returns it, so that users may write into it."""
    own: Tensor = torch.ops.aten._unsafe_view.default(y, y.shape)
    return own


def softmax_map(q: Tensor, k: Tensor, attn_bias: Tensor | None, scale: float) -> Tensor:
    """softmax(scale * Q K^T + attn_bias) in float32 or float64, over the batch axes of its own operands alone.

    A row whose keys are all masked has weights 0.
    """
    dtype = softmax_dtype(q.dtype)
    if attn_bias is None:
        return torch.softmax(score_product(q, k, alpha=scale), -1, dtype=dtype)
    bias, dead = attn_bias.to(dtype), None
    # On an accelerator the question whether anything is masked would synchronise, so it is not asked there.
    if bias.device.type != "cpu" or (bias.numel() > 0 and float(bias.amin()) == -torch.inf):
        dead = (bias == -torch.inf).all(-1, keepdim=True)
        bias = bias.masked_fill(dead, 0.0)
    if q.dtype == dtype:
        scores = score_product(q, k, add=bias, alpha=scale)
    else:  # scaled before they are rounded, so that float16 does not overflow
        scores = score_product(q, k, alpha=scale).to(dtype) + bias
    weights = torch.softmax(scores, -1)
    return weights if dead is None else weights.masked_fill(dead, 0.0)
