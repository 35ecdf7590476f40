"""Residual attention with broadcast operands, the one primitive of bi-directional attention.

    Y = R + M * softmax(scale * Q K^T + attn_bias) V

(Lee et al., "BDA: Bi-directional attention for zero-shot learning", Computational Visual Media 11(5), 2025,
doi 10.26599/CVM.2025.9450401). In semantic synthesis attention (SSA) the regions of B images ask the attributes that
all images share; in visual synthesis attention (VSA) the attributes ask the regions of each image.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bda_fused import _checks, backends
from bda_fused.autograd import ResidualAttentionFunction
from bda_fused.backends.problem import Options
from bda_fused.dropout import draw_seed
from bda_fused.shapes import lift, lift_bias, lower


def residual_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    residual: Tensor | None = None,
    *,
    scale: float | None = None,
    attn_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    need_weights: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """``residual + dropout(softmax(scale * query @ key.T + attn_bias)) @ value``, with a gradient for every operand.

    Without heads every operand is (rows, width), shared by the batch, or (B or 1, rows, width); with heads all are
    (B or 1, H or 1, rows, width). B and H are the broadcast over all operands, attn_bias included; if all are 2-D the
    result is 2-D. A batch axis that is missing or of size 1 is shared: it is never expanded in memory and its gradient
    is summed over the images. Stride-0 axes of other sizes are read as they are and get a gradient per image.

    Args:
        query: (..., L, Dk), float16, bfloat16, float32 or float64. Any strides.
        key: (..., S, Dk), of the query's dtype.
        value: (..., S, Dv), of the query's dtype.
        residual: (..., L, Dv) of any float dtype, or None for 0.
        scale: finite factor of the scores, in the range of float32, of any sign; default Dk ** -0.5.
        attn_bias: float tensor added to the scaled scores, of any float dtype; (S,), (L, S), (B, 1, S), (B, L, S) or,
            with heads, any 4-D shape that broadcasts to (B, H, L, S). -inf masks a key; a row without any key left has
            weights 0 and returns the residual.
        dropout_p: probability in [0, 1] with which an entry of the map is dropped; the rest is divided by
            1 - dropout_p. Applied whenever it is not 0; the mask differs from call to call and follows torch's seed.
        need_weights: also return the map.
        backend: "auto", "cuda", "triton", "cpu" or "eager". A backend that is named never falls back.

    Returns:
        Y, (B, L, Dv) or (B, H, L, Dv), of dtype torch.result_type(residual, value). With ``need_weights``
        (Y, map): the softmax before dropout, (B, L, S) or (B, H, L, S), in the value's dtype, differentiable.

    Under autocast query, key and value are cast to the autocast dtype; residual and attn_bias keep theirs.

    Raises:
        TypeError: an operand or option of a wrong type or dtype.
        ValueError: shapes that do not fit, or an option out of range.
        bda_fused.backends.BackendError: the named backend cannot run this problem.
    """
    _checks.check_options(scale, dropout_p, need_weights, backend, backends.NAMES)
    query, key, value = _checks.checked_operands(query, key, value, residual, attn_bias)
    y, weights, _ = attend(
        query,
        key,
        value,
        residual,
        scale=scale,
        attn_bias=attn_bias,
        dropout_p=dropout_p,
        need_weights=need_weights,
        backend=backend,
    )
    return y if weights is None else (y, weights)


def ssa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    residual: Tensor,
    *,
    scale: float | None = None,
    attn_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    need_weights: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Semantic synthesis attention: U_S = U + softmax(scale * Q K^T) V, regions asking the attributes.

    Args:
        query: (B, HW, Dk), or (B, H, HW, Dk) with heads.
        key: (A, Dk), or (1, H, A, Dk); one for all images.
        value: (A, Dv), or (1, H, A, Dv).
        residual: (B, HW, Dv), or (B, H, HW, Dv).

    Keywords, results and errors are those of ``residual_attention``; the map is (B, HW, A).
    """
    _checks.check_ssa(query, key, value, residual)
    return residual_attention(
        query,
        key,
        value,
        residual,
        scale=scale,
        attn_bias=attn_bias,
        dropout_p=dropout_p,
        need_weights=need_weights,
        backend=backend,
    )


def vsa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    residual: Tensor,
    *,
    scale: float | None = None,
    attn_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    need_weights: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Visual synthesis attention: U_V = V_A + softmax(scale * Q K^T) V, attributes asking the regions of each image.

    Args:
        query: (A, Dk), or (1, H, A, Dk) with heads; one for all images.
        key: (B, HW, Dk), or (B, H, HW, Dk).
        value: (B, HW, Dv), or (B, H, HW, Dv).
        residual: (A, Dv), or (1, H, A, Dv).

    Keywords, results and errors are those of ``residual_attention``; Y is (B, A, Dv) and the map (B, A, HW).
    """
    _checks.check_vsa(query, key, value, residual)
    return residual_attention(
        query,
        key,
        value,
        residual,
        scale=scale,
        attn_bias=attn_bias,
        dropout_p=dropout_p,
        need_weights=need_weights,
        backend=backend,
    )


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    scale: float | None = None,
    attn_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    residual_is_query: bool = False,
    need_weights: bool = False,
    need_row_sum: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What the modules call: ``residual_attention`` without its checks, and with what only they know.

    ``value`` None says that the key is the value, ``residual_is_query`` that the query is the residual: one operand,
    read once, with one gradient. Returns (Y, map or None, row_sum or None); row_sum (B, L) or (B, H, L) holds the sums
    of the rows of the map after dropout, which are 1 without dropout except in fully masked rows.
    """
    operands = [x for x in (query, key, value, residual, attn_bias) if x is not None]
    bias = None if attn_bias is None else lift_bias(attn_bias, heads=query.dim() == 4)
    # Inside a traced torch.func.grad no operand says that it needs a gradient.
    need_grad = torch.is_grad_enabled() and (torch.compiler.is_compiling() or any(x.requires_grad for x in operands))
    y, weights, row_sum, _ = ResidualAttentionFunction.apply(
        lift(query),
        lift(key),
        None if value is None else lift(value),
        None if residual is None else lift(residual),
        bias,
        draw_seed(query.device) if dropout_p else None,
        Options(
            query.shape[-1] ** -0.5 if scale is None else float(scale),
            float(dropout_p),
            residual_is_query,
            need_weights,
            need_row_sum,
            need_grad,
            backend,
        ),
    )
    flat = max([x.dim() for x in operands]) == 2
    return (
        lower(y, query.dim(), flat),
        lower(weights.expand(*y.shape[:2], -1, -1), query.dim(), flat) if need_weights else None,
        lower(row_sum, query.dim(), flat) if need_row_sum else None,
    )
