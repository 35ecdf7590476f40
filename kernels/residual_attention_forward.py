"""The forward of residual attention: a row tile's whole score row on chip, softmax in registers, values by chunks."""

import triton
import triton.language as tl
from bda_fused.kernels import tiles
from bda_fused.kernels.blocks import (
    first_column,
    group_start,
    is_last,
    keep,
    row_numbers,
    row_pointers,
    row_products,
    scaled_scores,
    tail_width,
    tile_rows,
    weighted_rows,
    whole_chunks,
)
from bda_fused.kernels.launch import Launch, Rows, Target, layout, readable_width, strides
from bda_fused.kernels.residual_attention_long import residual_attention_long_forward
from torch import Tensor


@triton.jit
def store_columns(
    y,
    r,
    p,
    shrinks,
    inverse,
    v,
    v_s,
    S,
    inside,
    cols,
    BLOCK_L: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    DV: tl.constexpr,
    UNMASKED_V: tl.constexpr,
    WHOLE: tl.constexpr,
    V_LAYOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """WIDTH columns of Y = R + inverse * P V, at pointers y and r [BLOCK_L, 1]; for shrinks see weighted_rows."""
    out = weighted_rows(p, shrinks, v, v_s, S, cols, BLOCK_L, GROUPS, WIDTH, DV, UNMASKED_V, V_LAYOUT, PRECISION)
    out *= inverse[:, None]
    mask = inside[:, None] if WHOLE else inside[:, None] & (cols < DV)  # [BLOCK_L, WIDTH]
    if y.dtype.element_ty == tl.float64:
        out = out.to(tl.float64)
    if r is not None:
        residual = tl.load(r + cols, mask=mask, other=0.0)
        out = out + residual.to(out.dtype)
    tl.store(y + cols, out.to(y.dtype.element_ty), mask=mask)


RUNTIME = [
    "q_b", "q_h", "q_l", "k_b", "k_h", "k_s", "v_b", "v_h", "v_s", "r_b", "r_h", "r_l",
    "bias_b", "bias_h", "bias_l", "bias_s", "y_b", "y_h", "y_l", "w_b", "w_h", "w_l",
    "S", "ROWS", "H", "L", "OUTER_H", "GROUP_H", "scale", "threshold", "keep_scale",
]  # fmt: skip


@triton.jit(do_not_specialize=RUNTIME)
def residual_attention_forward(
    q,
    k,
    v,
    r,
    bias,
    seed,
    y,
    weights,
    row_sum,
    q_b: "i64",
    q_h: "i64",
    q_l: "i64",
    k_b: "i64",
    k_h: "i64",
    k_s: "i64",
    v_b: "i64",
    v_h: "i64",
    v_s: "i64",
    r_b: "i64",
    r_h: "i64",
    r_l: "i64",
    bias_b: "i64",
    bias_h: "i64",
    bias_l: "i64",
    bias_s: "i64",
    y_b: "i64",
    y_h: "i64",
    y_l: "i64",
    w_b: "i64",
    w_h: "i64",
    w_l: "i64",
    S: "i32",
    ROWS: "i32",
    H: "i32",
    L: "i32",
    OUTER_H: "i32",
    GROUP_H: "i32",
    scale: "fp32",
    threshold: "u32",
    keep_scale: "fp32",
    DK: tl.constexpr,
    DV: tl.constexpr,
    BIAS_BY_ROW: tl.constexpr,
    UNIT_BIAS: tl.constexpr,
    BIAS_LAYOUT: tl.constexpr,
    Q_LAYOUT: tl.constexpr,
    K_LAYOUT: tl.constexpr,
    V_LAYOUT: tl.constexpr,
    R_LAYOUT: tl.constexpr,
    Y_LAYOUT: tl.constexpr,
    W_LAYOUT: tl.constexpr,
    READABLE_K: tl.constexpr,
    READABLE_V: tl.constexpr,
    PADDED_W: tl.constexpr,
    DIVIDED: tl.constexpr,
    BLOCK_L: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_DK: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    TILES = tl.cdiv(ROWS, BLOCK_L)
    group = tl.program_id(0) // TILES
    first = tl.program_id(0) % TILES * BLOCK_L
    at = tile_rows(first, ROWS, L, OUTER_H, BLOCK_L, DIVIDED)
    inside = at[0]
    k = group_start(k, group, GROUP_H, k_b, k_h, K_LAYOUT)
    v = group_start(v, group, GROUP_H, v_b, v_h, V_LAYOUT)
    q = group_start(q, group, GROUP_H, q_b, q_h, Q_LAYOUT)
    q = row_pointers(q, at, first, q_b, q_h, q_l, Q_LAYOUT, DIVIDED)
    if bias is not None:
        bias = group_start(bias, group, GROUP_H, bias_b, bias_h, BIAS_LAYOUT)
        if BIAS_BY_ROW:
            bias = row_pointers(bias, at, first, bias_b, bias_h, bias_l, BIAS_LAYOUT, DIVIDED)

    # Unnormalised weights in the values' dtype: each column group refers to the maximum so far, and ``shrinks`` says
    # what the groups before it are multiplied by to refer to the same. Until the map is stored, the sign of a weight
    # says whether dropout has dropped it.
    p = ()
    shrinks = ()
    top = tl.full((BLOCK_L,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_L,), tl.float32)
    survived = tl.zeros((BLOCK_L,), tl.float32)
    for g in tl.static_range(len(GROUPS)):
        if g > 0:
            tl.debug_barrier()  # keeps the loads of this group behind the weights of the last: fewer registers
        products = row_products(q, inside, k, k_s, S, BLOCK_L, GROUPS, g, DK, BLOCK_DK, READABLE_K, K_LAYOUT, PRECISION)
        x = scaled_scores(products, inside, bias, bias_s, scale, S, GROUPS, g, BIAS_BY_ROW, UNIT_BIAS)
        higher = top
        for j in tl.static_range(len(GROUPS[g])):
            higher = tl.maximum(higher, tl.max(x[j], 1))  # [BLOCK_L]
        reference = tl.where(higher == -float("inf"), 0.0, higher)
        shrink = tl.exp2(top - reference)
        total *= shrink
        survived *= shrink
        blocks = ()
        for j in tl.static_range(len(GROUPS[g])):
            e = tl.exp2(x[j] - reference[:, None])  # [BLOCK_L, width]
            total += tl.sum(e, 1)
            if seed is not None:
                row = row_numbers(at, first, group, GROUP_H, H, L, DIVIDED)
                e = tl.where(keep(seed, row, threshold, first_column(GROUPS, g, j), GROUPS[g][j]), e, -e)
            if row_sum is not None:
                survived += tl.sum(tl.maximum(e, 0.0), 1)
            blocks = blocks + (e.to(v.dtype.element_ty),)
        p = p + (blocks,)
        shrinks = shrinks + (shrink,)
        top = higher
    inverse = 1.0 / tl.where(total == 0.0, 1.0, total)  # a row whose keys are all masked has weights 0

    if weights is not None:
        # Where images or heads share the map, the first stores it.
        first_b = at[1] + group // GROUP_H == 0
        first_h = at[2] + group % GROUP_H == 0
        owner = inside & (first_b | (w_b != 0)) & (first_h | (w_h != 0))
        weights = group_start(weights, group, GROUP_H, w_b, w_h, W_LAYOUT)
        weights = row_pointers(weights, at, first, w_b, w_h, w_l, W_LAYOUT, DIVIDED)
        for g in tl.static_range(len(GROUPS)):
            factor = inverse
            for later in tl.static_range(g + 1, len(GROUPS)):
                factor *= shrinks[later]
            for j in tl.static_range(len(GROUPS[g])):
                cols = first_column(GROUPS, g, j) + tl.arange(0, GROUPS[g][j])[None, :]
                mask = owner[:, None]
                if is_last(GROUPS, g, j) and not PADDED_W:
                    mask = mask & (cols < S)
                entry = tl.abs(p[g][j].to(tl.float32)) * factor[:, None]
                tl.store(weights + cols, entry.to(weights.dtype.element_ty), mask=mask)
    if row_sum is not None:
        row = row_numbers(at, first, group, GROUP_H, H, L, DIVIDED)
        tl.store(row_sum + row, survived * inverse * keep_scale, mask=inside)
    if seed is not None:
        inverse *= keep_scale
        undropped = p
        p = ()
        for g in tl.static_range(len(GROUPS)):
            blocks = ()
            for j in tl.static_range(len(GROUPS[g])):
                blocks = blocks + (tl.maximum(undropped[g][j], 0.0).to(v.dtype.element_ty),)
            p = p + (blocks,)

    y = group_start(y, group, GROUP_H, y_b, y_h, Y_LAYOUT)
    y = row_pointers(y, at, first, y_b, y_h, y_l, Y_LAYOUT, DIVIDED)
    if r is not None:
        r = group_start(r, group, GROUP_H, r_b, r_h, R_LAYOUT)
        r = row_pointers(r, at, first, r_b, r_h, r_l, R_LAYOUT, DIVIDED)
    # Where V may be read up to whole chunks the last chunk is like the others, else it has code of its own.
    EVEN: tl.constexpr = whole_chunks(DV, BLOCK_DV, READABLE_V, v.dtype.element_ty)
    for d in tl.range(0, EVEN, BLOCK_DV):
        chunk = d + tl.arange(0, BLOCK_DV)[None, :]
        store_columns(
            y, r, p, shrinks, inverse, v, v_s, S, inside, chunk,
            BLOCK_L, GROUPS, BLOCK_DV, DV, EVEN <= READABLE_V, EVEN <= DV, V_LAYOUT, PRECISION,
        )  # fmt: skip
    if EVEN < DV:
        TAIL: tl.constexpr = tail_width(DV, BLOCK_DV)
        rest = EVEN + tl.arange(0, TAIL)[None, :]
        store_columns(
            y, r, p, shrinks, inverse, v, v_s, S, inside, rest,
            BLOCK_L, GROUPS, TAIL, DV, EVEN + TAIL <= READABLE_V, False, V_LAYOUT, PRECISION,
        )  # fmt: skip


def plan_forward(
    scores: tuple[int, int, int, int],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    residual: Tensor | None,
    attn_bias: Tensor | None,
    seed: Tensor | None,
    y: Tensor,
    weights: Tensor | None,
    row_sum: Tensor | None,
    *,
    scale: float,
    dropout: tuple[int, float],
    precision: str,
    target: Target,
) -> list[Launch]:
    """The launches that fill y, weights and row_sum (None for what is not asked for); 4-D operands as in ops.py.

    scores: (B, H, L, S), none of them 0. dropout: the first word that survives, and what survivors are multiplied by.
    """
    rows = Rows(scores, keys=(key, value), rows=(query, residual, attn_bias, y, weights))
    width = max(key.shape[3], value.shape[3])
    bias_by_row = attn_bias is not None and not rows.share(attn_bias)
    lean = rows.lean
    if seed is not None and weights is not None:
        lean &= weights.stride(2) >= tiles.pitch(scores[3])
    tile = tiles.forward(
        target, query.dtype, scores[3], width, dropped=seed is not None, bias_by_row=bias_by_row, lean=lean
    )
    threshold, keep_scale = dropout
    arguments = {
        "q": query, "k": key, "v": value, "r": residual, "bias": attn_bias, "seed": seed,
        "y": y, "weights": weights, "row_sum": row_sum,
        **strides(key, "k_b k_h k_s"), **strides(value, "v_b v_h v_s"), **rows.strides(query, "q_b q_h q_l"),
        **rows.strides(residual, "r_b r_h r_l"), **rows.strides(attn_bias, "bias_b bias_h bias_l bias_s"),
        **rows.strides(y, "y_b y_h y_l"), **rows.strides(weights, "w_b w_h w_l"), **rows.arguments,
        "S": scores[3], "scale": scale, "threshold": threshold, "keep_scale": keep_scale,
    }  # fmt: skip
    constants = {
        "DK": query.shape[3],
        "DV": value.shape[3],
        "BIAS_BY_ROW": bias_by_row,
        "UNIT_BIAS": attn_bias is not None and attn_bias.stride(3) == 1 and attn_bias.shape[3] > 1,
        "BIAS_LAYOUT": layout(attn_bias),
        "Q_LAYOUT": layout(query),
        "K_LAYOUT": layout(key),
        "V_LAYOUT": layout(value),
        "R_LAYOUT": layout(residual),
        "Y_LAYOUT": layout(y),
        "W_LAYOUT": layout(weights),
        "READABLE_K": readable_width(key),
        "READABLE_V": readable_width(value),
        "PADDED_W": weights is not None and weights.stride(2) >= tile.columns,
        "DIVIDED": rows.divided,
        "BLOCK_L": tile.rows,
        "GROUPS": tile.groups,
        "BLOCK_DK": tile.inner,
        "BLOCK_DV": tile.chunk,
        "PRECISION": precision,
    }
    grid = rows.groups * triton.cdiv(rows.length, tile.rows)
    if tile.columns < scores[3]:
        grid *= triton.cdiv(value.shape[3], tile.chunk)
        kernel = residual_attention_long_forward
        return [Launch(kernel, grid, arguments, constants, tile.options, fixed=("BLOCK_DV",))]
    return [Launch(residual_attention_forward, grid, arguments, constants, tile.options)]
