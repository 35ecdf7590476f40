"""Residual attention over score rows that do not fit on chip: two passes over blocks of the columns.

The kernels take the arguments of their namesakes for short rows. GROUPS is one block, which moves along the columns.
"""

import triton
import triton.language as tl
from bda_fused.kernels.blocks import (
    dot,
    group_start,
    keep,
    key_rows,
    load_block,
    row_numbers,
    row_pointers,
    row_products,
    row_stride,
    row_sums,
    scaled_scores,
    sum_of,
    tile_rows,
)

FORWARD_RUNTIME = [
    "q_b", "q_h", "q_l", "k_b", "k_h", "k_s", "v_b", "v_h", "v_s", "r_b", "r_h", "r_l",
    "bias_b", "bias_h", "bias_l", "bias_s", "y_b", "y_h", "y_l", "w_b", "w_h", "w_l",
    "S", "ROWS", "H", "L", "OUTER_H", "GROUP_H", "scale", "threshold", "keep_scale",
]  # fmt: skip


@triton.jit(do_not_specialize=FORWARD_RUNTIME)
def residual_attention_long_forward(
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
    """Y, the map and the row sums. The first pass finds the maximum and the sum of every row, the second applies them.

    Each program computes BLOCK_DV columns of Y; the first of a row tile also stores the map and the row sums.
    """
    WIDTH: tl.constexpr = sum_of(GROUPS)
    CHUNKS: tl.constexpr = (DV + BLOCK_DV - 1) // BLOCK_DV
    TILES = tl.cdiv(ROWS, BLOCK_L)
    chunk = tl.program_id(0) % CHUNKS
    group = tl.program_id(0) // CHUNKS // TILES
    first = tl.program_id(0) // CHUNKS % TILES * BLOCK_L
    at = tile_rows(first, ROWS, L, OUTER_H, BLOCK_L, DIVIDED)
    inside = at[0]
    k = group_start(k, group, GROUP_H, k_b, k_h, K_LAYOUT)
    v = group_start(v, group, GROUP_H, v_b, v_h, V_LAYOUT)
    q = group_start(q, group, GROUP_H, q_b, q_h, Q_LAYOUT)
    q = row_pointers(q, at, first, q_b, q_h, q_l, Q_LAYOUT, DIVIDED)
    k_step, v_step = row_stride(k_s, K_LAYOUT), row_stride(v_s, V_LAYOUT)
    if bias is not None:
        bias = group_start(bias, group, GROUP_H, bias_b, bias_h, BIAS_LAYOUT)
        if BIAS_BY_ROW:
            bias = row_pointers(bias, at, first, bias_b, bias_h, bias_l, BIAS_LAYOUT, DIVIDED)
    if seed is not None or row_sum is not None:
        row = row_numbers(at, first, group, GROUP_H, H, L, DIVIDED)
    if weights is not None:
        # Where images or heads share the map, the first stores it.
        first_b = at[1] + group // GROUP_H == 0
        first_h = at[2] + group % GROUP_H == 0
        owner = inside & (first_b | (w_b != 0)) & (first_h | (w_h != 0)) & (chunk == 0)
        weights = group_start(weights, group, GROUP_H, w_b, w_h, W_LAYOUT)
        weights = row_pointers(weights, at, first, w_b, w_h, w_l, W_LAYOUT, DIVIDED)

    top = tl.full((BLOCK_L,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_L,), tl.float32)
    for start in tl.range(0, S, WIDTH):
        products = row_products(
            q,
            inside,
            k + start * k_step,
            k_s,
            S - start,
            BLOCK_L,
            GROUPS,
            0,
            DK,
            BLOCK_DK,
            READABLE_K,
            K_LAYOUT,
            PRECISION,
        )
        x = scaled_scores(
            products, inside, bias if bias is None else bias + start * bias_s,
            bias_s, scale, S - start, GROUPS, 0, BIAS_BY_ROW, UNIT_BIAS,
        )[0]  # fmt: skip
        higher = tl.maximum(top, tl.max(x, 1))
        reference = tl.where(higher == -float("inf"), 0.0, higher)
        total = total * tl.exp2(top - reference) + tl.sum(tl.exp2(x - reference[:, None]), 1)
        top = higher
    reference = tl.where(top == -float("inf"), 0.0, top)[:, None]
    inverse = 1.0 / tl.where(total == 0.0, 1.0, total)[:, None]  # a row whose keys are all masked has weights 0

    cols = chunk * BLOCK_DV + tl.arange(0, BLOCK_DV)[None, :]
    out = tl.zeros((BLOCK_L, BLOCK_DV), tl.float32)
    survived = tl.zeros((BLOCK_L,), tl.float32)
    for start in tl.range(0, S, WIDTH):
        products = row_products(
            q,
            inside,
            k + start * k_step,
            k_s,
            S - start,
            BLOCK_L,
            GROUPS,
            0,
            DK,
            BLOCK_DK,
            READABLE_K,
            K_LAYOUT,
            PRECISION,
        )
        x = scaled_scores(
            products, inside, bias if bias is None else bias + start * bias_s,
            bias_s, scale, S - start, GROUPS, 0, BIAS_BY_ROW, UNIT_BIAS,
        )[0]  # fmt: skip
        p = tl.exp2(x - reference) * inverse  # [BLOCK_L, WIDTH]
        if weights is not None:
            columns = tl.arange(0, WIDTH)[None, :]
            mask = owner[:, None] & (columns < S - start)
            tl.store(weights + start + columns, p.to(weights.dtype.element_ty), mask=mask)
        if seed is not None:
            p = tl.where(keep(seed, row, threshold, start, WIDTH), p, 0.0)
        survived += tl.sum(p, 1)
        rows = key_rows(v + start * v_step, v_s, S - start, V_LAYOUT, 0, WIDTH, True)
        v_tile = tl.load(rows + cols, mask=cols < DV, other=0.0)  # [WIDTH, BLOCK_DV]
        out = dot(p.to(v.dtype.element_ty), v_tile, out, PRECISION)
    if seed is not None:
        out = out * keep_scale
        survived = survived * keep_scale
    if row_sum is not None:
        tl.store(row_sum + row, survived, mask=inside & (chunk == 0))
    mask = inside[:, None] & (cols < DV)
    if y.dtype.element_ty == tl.float64:
        out = out.to(tl.float64)
    if r is not None:
        r = group_start(r, group, GROUP_H, r_b, r_h, R_LAYOUT)
        r = row_pointers(r, at, first, r_b, r_h, r_l, R_LAYOUT, DIVIDED)
        out = out + tl.load(r + cols, mask=mask, other=0.0).to(out.dtype)
    y = group_start(y, group, GROUP_H, y_b, y_h, Y_LAYOUT)
    y = row_pointers(y, at, first, y_b, y_h, y_l, Y_LAYOUT, DIVIDED)
    tl.store(y + cols, out.to(y.dtype.element_ty), mask=mask)


ROWS_RUNTIME = [
    "dy_b", "dy_h", "dy_l", "v_b", "v_h", "v_s", "k_b", "k_h", "k_s", "w_b", "w_h", "w_l", "dw_b", "dw_h", "dw_l",
    "ds_b", "ds_h", "ds_l", "dq_b", "dq_h", "dq_l",
    "S", "ROWS", "H", "L", "OUTER_H", "GROUP_H", "SHARED_QUERY", "scale", "keep_scale",
]  # fmt: skip


@triton.jit(do_not_specialize=ROWS_RUNTIME)
def residual_attention_long_backward_rows(
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
    """dS (B, H, L, pitch). dq is None: it is a product with dS.

    The first pass finds rowsum(P * dP), the second dS.
    """
    tl.static_assert(dq is None, "the gradient of the query is a product with dS")
    WIDTH: tl.constexpr = sum_of(GROUPS)
    PITCH = tl.cdiv(S, 16) * 16
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
    v_step = row_stride(v_s, V_LAYOUT)
    columns = tl.arange(0, WIDTH)
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
    ds = group_start(ds, group, GROUP_H, ds_b, ds_h, DS_LAYOUT)
    ds = row_pointers(ds, at, first, ds_b, ds_h, ds_l, DS_LAYOUT, DIVIDED)

    delta = tl.zeros((BLOCK_L,), tl.float32)
    total = tl.zeros((BLOCK_L,), tl.float32)
    for second_pass in tl.static_range(2):
        inverse = 1.0 / tl.where(total == 0.0, 1.0, total)
        for start in tl.range(0, S, WIDTH):
            p = load_block(weights + start, inside, columns[None, :], S - start, False, False)  # [BLOCK_L, WIDTH]
            x = row_products(
                dy, inside, v + start * v_step, v_s, S - start,
                BLOCK_L, GROUPS, 0, DV, BLOCK_DV, READABLE_V, V_LAYOUT, PRECISION,
            )[0]  # fmt: skip
            if drow_sum is not None:
                x += drow_sum
            if DROPPED:
                x = tl.where(p > 0.0, x * keep_scale, 0.0)
                p = tl.abs(p)
            if dweights is not None:
                x += load_block(dweights + start, owner, columns[None, :], S - start, False, False)
            if second_pass == 0:
                px_sum, p_sum = row_sums(p * x, p)
                delta += px_sum
                total += p_sum
            else:
                mask = inside[:, None] & (columns < PITCH - start)[None, :]
                x = p * inverse[:, None] * (x - (delta * inverse)[:, None])
                tl.store(ds + start + columns[None, :], x.to(ds.dtype.element_ty), mask=mask)
