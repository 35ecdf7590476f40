"""The backward of residual attention, row by row: the forward with the roles exchanged, on the map that it kept."""

import triton
import triton.language as tl
from bda_fused.kernels import tiles
from bda_fused.kernels.blocks import (
    first_column,
    group_start,
    is_last,
    load_block,
    row_numbers,
    row_pointers,
    row_products,
    row_sums,
    tail_width,
    tile_rows,
    weighted_rows,
    whole_chunks,
)
from bda_fused.kernels.launch import Launch, Rows, Target, layout, readable_width, strides
from bda_fused.kernels.residual_attention_long import residual_attention_long_backward_rows
from torch import Tensor


@triton.jit
def store_query_columns(
    dq,
    dy,
    ds,
    k,
    k_s,
    S,
    scale,
    inside,
    cols,
    BLOCK_L: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    DK: tl.constexpr,
    UNMASKED_K: tl.constexpr,
    WHOLE: tl.constexpr,
    K_LAYOUT: tl.constexpr,
    QUERY_IS_RESIDUAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """WIDTH columns of dQ = scale * dS K, plus dY where the query is the residual."""
    out = weighted_rows(ds, None, k, k_s, S, cols, BLOCK_L, GROUPS, WIDTH, DK, UNMASKED_K, K_LAYOUT, PRECISION) * scale
    mask = inside[:, None] if WHOLE else inside[:, None] & (cols < DK)  # [BLOCK_L, WIDTH]
    if QUERY_IS_RESIDUAL:
        out += tl.load(dy + cols, mask=mask, other=0.0).to(tl.float32)
    tl.store(dq + cols, out.to(dq.dtype.element_ty), mask=mask)


ROWS_RUNTIME = [
    "dy_b", "dy_h", "dy_l", "v_b", "v_h", "v_s", "k_b", "k_h", "k_s", "w_b", "w_h", "w_l", "dw_b", "dw_h", "dw_l",
    "ds_b", "ds_h", "ds_l", "dq_b", "dq_h", "dq_l",
    "S", "ROWS", "H", "L", "OUTER_H", "GROUP_H", "SHARED_QUERY", "scale", "keep_scale",
]  # fmt: skip


@triton.jit(do_not_specialize=ROWS_RUNTIME)
def residual_attention_backward_rows(
    dy,
    v,
    k,
    weights,
    dweights,
    drow_sum,
    ds,
    dq,
    dy_b: "i64",
    dy_h: "i64",
    dy_l: "i64",
    v_b: "i64",
    v_h: "i64",
    v_s: "i64",
    k_b: "i64",
    k_h: "i64",
    k_s: "i64",
    w_b: "i64",
    w_h: "i64",
    w_l: "i64",
    dw_b: "i64",
    dw_h: "i64",
    dw_l: "i64",
    ds_b: "i64",
    ds_h: "i64",
    ds_l: "i64",
    dq_b: "i64",
    dq_h: "i64",
    dq_l: "i64",
    S: "i32",
    ROWS: "i32",
    H: "i32",
    L: "i32",
    OUTER_H: "i32",
    GROUP_H: "i32",
    SHARED_QUERY: "i32",
    scale: "fp32",
    keep_scale: "fp32",
    DK: tl.constexpr,
    DV: tl.constexpr,
    DY_LAYOUT: tl.constexpr,
    V_LAYOUT: tl.constexpr,
    K_LAYOUT: tl.constexpr,
    W_LAYOUT: tl.constexpr,
    DW_LAYOUT: tl.constexpr,
    DS_LAYOUT: tl.constexpr,
    DQ_LAYOUT: tl.constexpr,
    READABLE_V: tl.constexpr,
    READABLE_K: tl.constexpr,
    PADDED_W: tl.constexpr,
    DIVIDED: tl.constexpr,
    DROPPED: tl.constexpr,
    QUERY_IS_RESIDUAL: tl.constexpr,
    BLOCK_L: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_DK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dS (B, H, L, pitch) and dQ, whichever is not None. With DROPPED the signs of the map are its dropout mask.

    SHARED_QUERY: dQ is a sum over images, and not computed here. It is known at run time only, because one image does
    not say whether its query is shared, and must not cost a compilation.

    dP = (dY V^T + drow_sum) * M + dmap, dS = P * (dP - rowsum(P * dP)), dQ = scale * dS K. The rows of the map that was
    kept sum to 1 up to its rounding: P is divided by their sum, so that the rows of dS sum to 0 as they must.
    """
    TILES = tl.cdiv(ROWS, BLOCK_L)
    group = tl.program_id(0) // TILES
    first = tl.program_id(0) % TILES * BLOCK_L
    at = tile_rows(first, ROWS, L, OUTER_H, BLOCK_L, DIVIDED)
    inside = at[0]
    weights = group_start(weights, group, GROUP_H, w_b, w_h, W_LAYOUT)
    weights = row_pointers(weights, at, first, w_b, w_h, w_l, W_LAYOUT, DIVIDED)
    dy = group_start(dy, group, GROUP_H, dy_b, dy_h, DY_LAYOUT)
    dy = row_pointers(dy, at, first, dy_b, dy_h, dy_l, DY_LAYOUT, DIVIDED)
    v = group_start(v, group, GROUP_H, v_b, v_h, V_LAYOUT)
    if drow_sum is not None:
        row = row_numbers(at, first, group, GROUP_H, H, L, DIVIDED)
        drow_sum = tl.load(drow_sum + row, mask=inside, other=0.0)[:, None]
    if dweights is not None:
        # Where images or heads share the map, its gradient enters once.
        first_b = at[1] + group // GROUP_H == 0
        first_h = at[2] + group % GROUP_H == 0
        owner = inside & (first_b | (dw_b != 0)) & (first_h | (dw_h != 0))
        dweights = group_start(dweights, group, GROUP_H, dw_b, dw_h, DW_LAYOUT)
        dweights = row_pointers(dweights, at, first, dw_b, dw_h, dw_l, DW_LAYOUT, DIVIDED)
    if ds is not None:
        ds = group_start(ds, group, GROUP_H, ds_b, ds_h, DS_LAYOUT)
        ds = row_pointers(ds, at, first, ds_b, ds_h, ds_l, DS_LAYOUT, DIVIDED)

    # With several column groups dP waits for its row sum in the keys' dtype.
    dp = ()
    delta = tl.zeros((BLOCK_L,), tl.float32)
    total = tl.zeros((BLOCK_L,), tl.float32)
    for g in tl.static_range(len(GROUPS)):
        if g > 0:
            tl.debug_barrier()  # keeps the loads of this group behind dP of the last: fewer registers
        products = row_products(
            dy, inside, v, v_s, S, BLOCK_L, GROUPS, g, DV, BLOCK_DV, READABLE_V, V_LAYOUT, PRECISION
        )
        blocks = ()
        for j in tl.static_range(len(GROUPS[g])):
            cols = first_column(GROUPS, g, j) + tl.arange(0, GROUPS[g][j])[None, :]
            p = load_block(weights, inside, cols, S, not is_last(GROUPS, g, j), PADDED_W)  # [BLOCK_L, width]
            x = products[j]
            if drow_sum is not None:
                x += drow_sum
            if DROPPED:
                x = tl.where(p > 0.0, x * keep_scale, 0.0)
                p = tl.abs(p)
            if dweights is not None:
                x += load_block(dweights, owner, cols, S, not is_last(GROUPS, g, j), False)
            px_sum, p_sum = row_sums(p * x, p)
            delta += px_sum
            total += p_sum
            blocks = blocks + (x if len(GROUPS) == 1 else x.to(v.dtype.element_ty),)
        dp = dp + (blocks,)

    inverse = 1.0 / tl.where(total == 0.0, 1.0, total)
    delta = (delta * inverse)[:, None]
    inverse = inverse[:, None]
    gradient = ()
    for g in tl.static_range(len(GROUPS)):
        blocks = ()
        for j in tl.static_range(len(GROUPS[g])):
            cols = first_column(GROUPS, g, j) + tl.arange(0, GROUPS[g][j])[None, :]
            p = load_block(weights, inside, cols, S, not is_last(GROUPS, g, j), PADDED_W)
            if DROPPED:
                p = tl.abs(p)
            x = (p * inverse * (dp[g][j].to(tl.float32) - delta)).to(v.dtype.element_ty)
            if ds is not None:
                tl.store(ds + cols, x, mask=inside[:, None])
            blocks = blocks + (x,)
        gradient = gradient + (blocks,)

    if dq is not None:
        if SHARED_QUERY == 0:
            keys = group_start(k, group, GROUP_H, k_b, k_h, K_LAYOUT)
            into = group_start(dq, group, GROUP_H, dq_b, dq_h, DQ_LAYOUT)
            into = row_pointers(into, at, first, dq_b, dq_h, dq_l, DQ_LAYOUT, DIVIDED)
            # Where K may be read up to whole chunks the last chunk is like the others, else it has code of its own.
            EVEN: tl.constexpr = whole_chunks(DK, BLOCK_DK, READABLE_K, k.dtype.element_ty)
            for d in tl.range(0, EVEN, BLOCK_DK):
                chunk = d + tl.arange(0, BLOCK_DK)[None, :]
                store_query_columns(
                    into, dy, gradient, keys, k_s, S, scale, inside, chunk, BLOCK_L, GROUPS, BLOCK_DK, DK,
                    EVEN <= READABLE_K, EVEN <= DK, K_LAYOUT, QUERY_IS_RESIDUAL, PRECISION,
                )  # fmt: skip
            if EVEN < DK:
                TAIL: tl.constexpr = tail_width(DK, BLOCK_DK)
                rest = EVEN + tl.arange(0, TAIL)[None, :]
                store_query_columns(
                    into, dy, gradient, keys, k_s, S, scale, inside, rest,
                    BLOCK_L, GROUPS, TAIL, DK, EVEN + TAIL <= READABLE_K, False, K_LAYOUT, QUERY_IS_RESIDUAL, PRECISION,
                )  # fmt: skip


def plan_rows(
    scores: tuple[int, int, int, int],
    grad_y: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Tensor,
    grad_weights: Tensor | None,
    grad_row_sum: Tensor | None,
    grad_scores: Tensor | None,
    grad_query: Tensor | None,
    *,
    shared_query: bool = False,
    scale: float,
    keep_scale: float | None,
    residual_is_query: bool,
    precision: str,
    target: Target,
) -> list[Launch]:
    """The launches that fill grad_scores (B, H, L, pitch) and, unless it is a sum over images, grad_query.

    None for what nobody needs.

    grad_row_sum: (B, H, L), contiguous. keep_scale: of a dropped map, whose signs are its mask; else None. The pitch
    holds all columns of the tile's blocks; those beyond S become 0.
    """
    rows = Rows(scores, keys=(key, value), rows=(grad_y, weights, grad_weights, grad_scores, grad_query))
    lean = rows.lean and weights.stride(2) >= tiles.pitch(scores[3]) and grad_weights is None
    width = max(key.shape[3], value.shape[3])
    tile = tiles.backward(target, key.dtype, scores[3], width, dropped=keep_scale is not None, lean=lean)
    arguments = {
        "dy": grad_y, "v": value, "k": key, "weights": weights, "dweights": grad_weights, "drow_sum": grad_row_sum,
        "ds": grad_scores, "dq": grad_query,
        **rows.strides(grad_y, "dy_b dy_h dy_l"), **strides(value, "v_b v_h v_s"), **strides(key, "k_b k_h k_s"),
        **rows.strides(weights, "w_b w_h w_l"), **rows.strides(grad_weights, "dw_b dw_h dw_l"),
        **rows.strides(grad_scores, "ds_b ds_h ds_l"), **rows.strides(grad_query, "dq_b dq_h dq_l"), **rows.arguments,
        "S": scores[3], "SHARED_QUERY": int(shared_query),
        "scale": scale, "keep_scale": 1.0 if keep_scale is None else keep_scale,
    }  # fmt: skip
    constants = {
        "DK": key.shape[3],
        "DV": value.shape[3],
        "DY_LAYOUT": layout(grad_y),
        "V_LAYOUT": layout(value),
        "K_LAYOUT": layout(key),
        "W_LAYOUT": layout(weights),
        "DW_LAYOUT": layout(grad_weights),
        "DS_LAYOUT": layout(grad_scores),
        "DQ_LAYOUT": layout(grad_query),
        "READABLE_V": readable_width(value),
        "READABLE_K": readable_width(key),
        "PADDED_W": weights.stride(2) >= tile.columns,
        "DIVIDED": rows.divided,
        "DROPPED": keep_scale is not None,
        "QUERY_IS_RESIDUAL": residual_is_query,
        "BLOCK_L": tile.rows,
        "GROUPS": tile.groups,
        "BLOCK_DV": tile.inner,
        "BLOCK_DK": tile.chunk,
        "PRECISION": precision,
    }
    grid = rows.groups * triton.cdiv(rows.length, tile.rows)
    kernel = residual_attention_backward_rows
    if tile.columns < scores[3]:
        kernel = residual_attention_long_backward_rows
    return [Launch(kernel, grid, arguments, constants, tile.options)]
