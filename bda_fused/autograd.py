"""The autograd functions of residual attention.

Gradients, with dY, dmap and drow_sum coming in and M the dropout mask:

    dP = (dY V^T + drow_sum) * M + dmap      dS = P * (dP - rowsum(P * dP))
    dV = (P * M)^T dY      dQ = scale dS K      dK = scale dS^T Q      dattn_bias = dS      dR = dY

each summed over the batch axes that its operand shares. The backward is differentiable itself: with grad mode on it is
computed by ``differentiable_backward``, these formulas in plain torch ops.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from inspect import Signature, signature
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.autograd import Function

from bda_fused import _checks, backends, dropout, ops
from bda_fused.backends.problem import BackwardOptions, Options
from bda_fused.numerics import NO_CONTEXT, softmax_dtype, without_autocast


def _below_autograd() -> AbstractContextManager[object]:
    """Where the raw operators run: refusing gradients, as they do, costs as much as a small product."""
    return NO_CONTEXT if torch.compiler.is_compiling() else torch._C._AutoDispatchBelowAutograd()


class ResidualAttentionFunction(Function):
    """Y = R + M * softmax(scale * Q K^T + attn_bias) V on 4-D operands; ops.py documents arguments and results."""

    @staticmethod
    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor | None,
        residual: Tensor | None,
        attn_bias: Tensor | None,
        seed: Tensor | None,
        options: Options,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        with _below_autograd():
            return ops.residual_attention(query, key, value, residual, attn_bias, seed, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        query, key, value, residual, attn_bias, seed, options = inputs
        ctx.options = options
        # What a forward keeps is for its own backend, which `use` may have chosen and no longer choose in the backward.
        ctx.backend = options.backend if torch.compiler.is_compiling() else backends.current(options.backend)
        y, weights, _, lse = output
        ctx.save_for_backward(query, key, value, attn_bias, seed, weights, lse)
        ctx.y_shape, ctx.y_dtype = y.shape, y.dtype
        ctx.residual_shape, ctx.residual_dtype = (None, None) if residual is None else (residual.shape, residual.dtype)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(
        ctx: Any,
        grad_y: Tensor | None,
        grad_weights: Tensor | None,
        grad_row_sum: Tensor | None,
        grad_lse: None,
    ) -> tuple[Tensor | None, ...]:
        query, key, value, attn_bias, seed, weights, lse = ctx.saved_tensors
        need_query, need_key, need_value, need_residual, need_bias = ctx.needs_input_grad[:5]
        options: Options = ctx.options
        if not options.need_weights:  # a traced graph passes zeros for the outputs that nobody uses
            grad_weights = None
        if not options.need_row_sum:
            grad_row_sum = None
        if grad_y is None:
            grad_y = query.new_zeros(ctx.y_shape, dtype=ctx.y_dtype)
        grads: tuple[Tensor, ...]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            grads = differentiable_backward(
                grad_y,
                grad_weights,
                grad_row_sum,
                query,
                key,
                value,
                attn_bias,
                seed,
                options.scale,
                options.dropout_p,
                options.residual_is_query,
            )
        else:
            with _below_autograd():
                grads = ops.residual_attention_backward(
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
                    *BackwardOptions(*options[:3], [need_query, need_key, need_value, need_bias], ctx.backend),
                )
        grad_query, grad_key, grad_value, grad_bias = grads
        return (
            grad_query if need_query else None,
            grad_key if need_key else None,
            grad_value if need_value else None,
            grad_y.sum_to_size(ctx.residual_shape).to(ctx.residual_dtype) if need_residual else None,
            grad_bias if need_bias else None,
            None,
            None,
        )

    @staticmethod
    def vmap(*_: Any) -> NoReturn:
        raise RuntimeError(
            "residual attention does not support torch.func.vmap: "
            "put the mapped axis into the batch axis of its operands"
        )


class _Bound(NamedTuple):
    """Arguments that are bound already: all are positional, and none has a default."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def apply_defaults(self) -> None: ...


class _Positional(Signature):
    """A signature that binds at no cost: Function.apply asks in every call, and torch's takes as long as a product."""

    def bind(self, *args: Any, **kwargs: Any) -> _Bound:  # type: ignore[override]
        return _Bound(args, kwargs)


_forward = ResidualAttentionFunction.forward
_forward.__signature__ = _Positional(list(signature(_forward).parameters.values()))  # type: ignore[attr-defined]


class SSAFunction(ResidualAttentionFunction):
    """ResidualAttentionFunction for semantic synthesis attention: per-image queries, keys and values shared by all."""

    @classmethod
    def apply(cls, query: Tensor, key: Tensor, value: Tensor, residual: Tensor, *rest: Any) -> Any:
        _checks.check_ssa(query, key, value, residual)
        return super().apply(query, key, value, residual, *rest)


class VSAFunction(ResidualAttentionFunction):
    """ResidualAttentionFunction for visual synthesis attention: queries shared by all, per-image keys and values."""

    @classmethod
    def apply(cls, query: Tensor, key: Tensor, value: Tensor, residual: Tensor, *rest: Any) -> Any:
        _checks.check_vsa(query, key, value, residual)
        return super().apply(query, key, value, residual, *rest)


def differentiable_backward(
    grad_y: Tensor,
    grad_weights: Tensor | None,
    grad_row_sum: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    attn_bias: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
    residual_is_query: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of query, key, value and attn_bias by differentiable torch ops, in float32 or float64."""
    dtype = softmax_dtype(query.dtype)
    with without_autocast(query.device):
        q, k, dy = query.to(dtype), key.to(dtype), grad_y.to(dtype)
        v = k if value is None else value.to(dtype)
        scores = scale * (q @ k.mT)
        if attn_bias is not None:
            bias = attn_bias.to(dtype)
            dead = (bias == -torch.inf).all(-1, keepdim=True)
            p = torch.softmax(scores + bias.masked_fill(dead, 0.0), -1).masked_fill(dead, 0.0)
        else:
            p = torch.softmax(scores, -1)
        dp, dropped = dy @ v.mT, p
        if grad_row_sum is not None:
            dp = dp + grad_row_sum[..., None]
        if seed is not None:
            m = dropout.mask(seed, dropout_p, (*grad_y.shape[:3], k.shape[2]), dtype)
            dp, dropped = dp * m, p * m
        dp = dp.sum_to_size(p.shape)
        if grad_weights is not None:
            dp = dp + grad_weights
        ds = p * (dp - (p * dp).sum(-1, keepdim=True))
        grad_q = (scale * (ds @ k)).sum_to_size(q.shape)
        grad_k = (scale * (ds.mT @ q)).sum_to_size(k.shape)
        grad_v = (dropped.mT @ dy).sum_to_size(v.shape)
        if residual_is_query:
            grad_q = grad_q + dy.sum_to_size(q.shape)
        if value is None:
            grad_k = grad_k + grad_v
        grad_bias = q.new_empty(0) if attn_bias is None else ds.sum_to_size(attn_bias.shape).to(attn_bias.dtype)
        return grad_q.to(query.dtype), grad_k.to(key.dtype), grad_v.to(query.dtype), grad_bias
