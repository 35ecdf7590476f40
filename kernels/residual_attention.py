"""Residual attention by Triton kernels: which results are allocated, which launches fill them."""

from __future__ import annotations

import torch
from bda_fused.kernels import tiles
from bda_fused.kernels.dropped_map import plan_signed_map
from bda_fused.kernels.launch import Launch, Target
from bda_fused.kernels.residual_attention_backward import plan_rows
from bda_fused.kernels.residual_attention_forward import plan_forward
from bda_fused.kernels.sums import Term, plan_products, plan_sum
from torch import Tensor

from bda_fused.dropout import survival
from bda_fused.shapes import with_unit_stride


def forward(
    scores: tuple[int, int, int, int],
    result_dtype: torch.dtype,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    residual: Tensor | None,
    attn_bias: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
    weights: Tensor | None,
    row_sum: Tensor | None,
) -> Tensor:
    """Y; weights and row_sum are filled where given. 4-D operands as in ops.py, ``scores`` (B, H, L, S) without a 0."""
    query, key, value = map(with_unit_stride, (query, key, value))
    y = query.new_empty((*scores[:3], value.shape[3]), dtype=result_dtype)
    for launch in plan_forward(
        scores,
        query,
        key,
        value,
        None if residual is None else with_unit_stride(residual),
        attn_bias,
        seed,
        y,
        weights,
        row_sum,
        scale=scale,
        dropout=survival(dropout_p),
        precision=dot_precision(query.dtype, result_dtype),
        target=Target.of(query.device),
    ):
        launch.run()
    return y


def backward(
    scores: tuple[int, int, int, int],
    grad_y: Tensor,
    grad_weights: Tensor | None,
    grad_row_sum: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None,
    weights: Tensor,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
    residual_is_query: bool,
    key_is_value: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of query, key, value and attn_bias, empty where ``needs`` says no; see ops.py."""
    need_query, need_key, need_value, need_bias = needs
    if grad_y.dtype == torch.float64:  # of a residual in float64
        grad_y = grad_y.float()
    if grad_weights is not None and any(grad_weights.stride(axis) == 0 for axis in (0, 1)):
        grad_weights = grad_weights.contiguous()  # to the kernel, a stride of 0 says that the map is shared
    grad_y, query, key, value = map(with_unit_stride, (grad_y, query, key, value))
    precision, target = dot_precision(query.dtype, query.dtype), Target.of(query.device)
    threshold, keep_scale = survival(dropout_p)
    columns = scores[3]
    scratch = (*scores[:3], tiles.pitch(columns))
    grad_query, grad_key, grad_value, grad_bias = (
        torch.empty_like(x, memory_format=torch.contiguous_format) if need and x is not None else query.new_empty(0)
        for x, need in zip((query, key, value, attn_bias), needs, strict=True)
    )
    if need_bias and attn_bias is not None and attn_bias.shape[3] == 1:  # shifts all scores of a row alike
        grad_bias.zero_()
        need_bias = False
    launches: list[Launch] = []

    if seed is not None:
        signed = weights.new_empty(scratch)
        launches += plan_signed_map(weights, seed, signed, columns, threshold)
        weights = signed
    in_rows = need_query and query.shape[:2] == scores[:2] and columns <= tiles.WHOLE
    need_scores = need_key or need_bias or (need_query and not in_rows)
    grad_scores = query.new_empty(scratch) if need_scores else None
    if in_rows or need_scores:
        launches += plan_rows(
            scores,
            grad_y,
            key,
            value,
            weights,
            None if grad_weights is None else with_unit_stride(grad_weights),
            None if grad_row_sum is None else grad_row_sum.contiguous(),
            grad_scores,
            grad_query if need_query and columns <= tiles.WHOLE else None,
            shared_query=not in_rows,
            scale=scale,
            keep_scale=None if seed is None else keep_scale,
            residual_is_query=residual_is_query,
            precision=precision,
            target=target,
        )
    if need_bias:
        launches += plan_sum(grad_scores, columns, grad_bias)
    value_term = Term(weights.expand(*scores[:3], -1), grad_y, keep_scale, weights.shape[3], seed is not None)
    if need_query and not in_rows:
        term = Term(grad_scores, key, scale, scratch[3])
        extra = grad_y if residual_is_query else None
        launches += plan_products([term], grad_query, transposed=False, extra=extra, precision=precision, target=target)
    if need_key:
        terms = [Term(grad_scores, query, scale, scratch[3])]
        if key_is_value and keep_scale > 0:
            terms.append(value_term)
        launches += plan_products(terms, grad_key, transposed=True, extra=None, precision=precision, target=target)
    if need_value and not key_is_value:
        launches += plan_products(
            [value_term], grad_value, transposed=True, extra=None, precision=precision, target=target
        )
    for launch in launches:
        launch.run()
    return grad_query, grad_key, grad_value, grad_bias


def dot_precision(dtype: torch.dtype, result_dtype: torch.dtype) -> str:
    """How float32 products are computed: "highest" is three TF32 products, anything less is one.

    A result in float64, of a residual in float64, shows that three are not quite as exact as float32's own.
    """
    if dtype == torch.float32 and result_dtype == torch.float64:
        return "ieee"
    exact = dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    return "tf32x3" if exact else "tf32"
