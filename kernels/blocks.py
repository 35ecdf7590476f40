"""What the kernels of residual attention are made of: addresses of rows, products of a row tile, the dropout mask.

A kernel's row tile runs over the flattened (b, h, l) of those batch axes that keys and values share; the other batch
axes are its group. A score row is held as a tuple of column groups, each a tuple of blocks whose widths are powers of
two: 312 columns cost 320, not 512. Only the last block of a row can reach beyond the S columns. There the loads repeat
row S - 1, and the columns are masked in the scores.
"""

import triton
import triton.language as tl

# The interpreter multiplies the bits of bfloat16 operands, so it is given float32.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


LOG2_E = tl.constexpr(1.4426950408889634)
LEAST = tl.constexpr(-2.35e38)  # which LOG2_E times is still finite in float32


@triton.constexpr_function
def first_column(groups, group, block):
    """Where a block of a tuple of tuples of widths begins."""
    return sum(sum(widths) for widths in groups[:group]) + sum(groups[group][:block])


@triton.constexpr_function
def sum_of(groups):
    """How many columns all blocks hold."""
    return sum(sum(widths) for widths in groups)


@triton.constexpr_function
def is_last(groups, group, block):
    """Whether a block is the last of its row."""
    return group == len(groups) - 1 and block == len(groups[group]) - 1


@triton.constexpr_function
def tail_width(width, block):
    """The width of the block, a power of two from 16, that holds what whole blocks leave of a row; 0 for nothing."""
    rest = width % block
    return 0 if rest == 0 else max(16, 1 << (rest - 1).bit_length())


@triton.constexpr_function
def whole_chunks(width, chunk, readable, dtype):
    """Up to which column a row is computed in whole chunks: beyond its width where the last chunk may be read whole.

    In float32 always, with masked loads: weights that a rest behind the loop needs too would stay in registers.
    """
    up = -(-width // chunk) * chunk
    return up if up <= readable or dtype == tl.float32 else width // chunk * chunk


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    if PRECISION == "tf32" and a.dtype == tl.float32:
        a, b = to_tf32(a), to_tf32(b)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def to_tf32(x):
    """x rounded to TF32's 10 bits: tensor cores cut float32 off, which is three times as far off, and to one side."""
    return tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def row_stride(stride, LAYOUT: tl.constexpr):
    """The distance of an operand's rows, with what the compiler may know of it.

    LAYOUT: (the power of two that divides all strides, the distance itself where rows are packed, else 0).
    """
    ALIGN: tl.constexpr = LAYOUT[0]
    STEP: tl.constexpr = LAYOUT[1]
    if STEP > 0:
        return tl.full((), STEP, tl.int64)
    return stride // ALIGN * ALIGN


@triton.jit
def batch_start(x, b, h, stride_b, stride_h, LAYOUT: tl.constexpr):
    """The operand at int64 batch indices."""
    ALIGN: tl.constexpr = LAYOUT[0]
    return x + (b * (stride_b // ALIGN * ALIGN) + h * (stride_h // ALIGN * ALIGN))


@triton.jit
def group_start(x, group, GROUP_H, stride_b, stride_h, LAYOUT: tl.constexpr):
    """The operand at the batch indices of a group."""
    b, h = (group // GROUP_H).to(tl.int64), (group % GROUP_H).to(tl.int64)
    return batch_start(x, b, h, stride_b, stride_h, LAYOUT)


@triton.jit
def tile_rows(first, ROWS, L, OUTER_H, BLOCK_L: tl.constexpr, DIVIDED: tl.constexpr):
    """Where the rows of a tile are: (inside, b, h, l), each [BLOCK_L], b and h counted from the group's own.

    DIVIDED: the rows run over several b or h; else over l alone, b and h are 0, and l is counted from ``first``.
    """
    row = tl.arange(0, BLOCK_L)
    inside = row < ROWS - first
    if DIVIDED:
        outer = (first + row) // L
        return inside, outer // OUTER_H, outer % OUTER_H, first + row - outer * L
    return inside, tl.zeros_like(row), tl.zeros_like(row), row


@triton.jit
def row_pointers(x, at, first, stride_b, stride_h, stride_l, LAYOUT: tl.constexpr, DIVIDED: tl.constexpr):
    """Pointers to the first column of a tile's rows, of an operand that begins at its group: [BLOCK_L, 1]."""
    step = row_stride(stride_l, LAYOUT)
    if DIVIDED:
        ALIGN: tl.constexpr = LAYOUT[0]
        outer = at[1] * (stride_b // ALIGN * ALIGN) + at[2] * (stride_h // ALIGN * ALIGN)  # int64
        return x + (outer + at[3] * step)[:, None]
    return x + first * step + (at[3] * step.to(tl.int32))[:, None]


@triton.jit
def row_numbers(at, first, group, GROUP_H, H, L, DIVIDED: tl.constexpr):
    """The flattened row (b * H + h) * L + l of a tile's rows: int64 [BLOCK_L]."""
    b, h = at[1].to(tl.int64) + group // GROUP_H, at[2].to(tl.int64) + group % GROUP_H
    row = (b * H + h) * L + at[3]
    return row if DIVIDED else row + first


@triton.jit
def key_rows(w, stride, S, LAYOUT: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, LAST: tl.constexpr):
    """Pointers to the first column of WIDTH rows of keys or values: [WIDTH, 1]."""
    step = row_stride(stride, LAYOUT)
    s = FIRST + tl.arange(0, WIDTH)
    if LAST:
        s = tl.minimum(s, S - 1)
    if LAYOUT[1] > 0:
        return w + (s * LAYOUT[1])[:, None]
    return w + (s * step)[:, None]


@triton.jit
def zeros(BLOCK_L: tl.constexpr, WIDTHS: tl.constexpr):
    blocks = ()
    for j in tl.static_range(len(WIDTHS)):
        blocks = blocks + (tl.zeros((BLOCK_L, WIDTHS[j]), tl.float32),)
    return blocks


@triton.jit
def row_products(
    x,
    inside,
    w,
    stride_s,
    S,
    BLOCK_L: tl.constexpr,
    GROUPS: tl.constexpr,
    g: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    READABLE: tl.constexpr,
    W_LAYOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """X W^T for rows at pointers x [BLOCK_L, 1], 0 where not inside, and column group g of the rows at w.

    A tuple of [BLOCK_L, width]. READABLE: up to which column rows of W may be read, whatever lies behind the D-th. What
    whole blocks leave of the D columns comes first: behind the loop its addresses would outlive it in registers.
    """
    WIDTHS: tl.constexpr = GROUPS[g]
    TAIL: tl.constexpr = tail_width(D, BLOCK_D)
    acc = zeros(BLOCK_L, WIDTHS)
    if TAIL > 0:
        rest = D // BLOCK_D * BLOCK_D + tl.arange(0, TAIL)[None, :]
        x_rest = tl.load(x + rest, mask=inside[:, None] & (rest < D), other=0.0).to(
            w.dtype.element_ty
        )  # [BLOCK_L, TAIL]
        first = ()
        for j in tl.static_range(len(WIDTHS)):
            rest_rows = key_rows(w, stride_s, S, W_LAYOUT, first_column(GROUPS, g, j), WIDTHS[j], is_last(GROUPS, g, j))
            if D // BLOCK_D * BLOCK_D + TAIL <= READABLE:
                w_rest = tl.where(rest < D, tl.load(rest_rows + rest), 0.0).to(w.dtype.element_ty)
            else:
                w_rest = tl.load(rest_rows + rest, mask=rest < D, other=0.0)
            first = first + (dot(x_rest, w_rest.T, acc[j], PRECISION),)
        acc = first
    if D >= BLOCK_D:
        cols = tl.arange(0, BLOCK_D)[None, :]
        for d in tl.range(0, D // BLOCK_D * BLOCK_D, BLOCK_D):
            x_tile = tl.load(x + (d + cols), mask=inside[:, None], other=0.0).to(
                w.dtype.element_ty
            )  # [BLOCK_L, BLOCK_D]
            added = ()
            for j in tl.static_range(len(WIDTHS)):
                rows = key_rows(w, stride_s, S, W_LAYOUT, first_column(GROUPS, g, j), WIDTHS[j], is_last(GROUPS, g, j))
                w_tile = tl.load(rows + (d + cols))  # [width, BLOCK_D]
                added = added + (dot(x_tile, w_tile.T, acc[j], PRECISION),)
            acc = added
    return acc


@triton.jit
def opaque(p, PRECISION: tl.constexpr):
    """P, such that the compiler splits it for three TF32 products where it is used.

    It would else split it ahead of a loop, and keep both halves in registers.
    """
    if INTERPRETED or PRECISION != "tf32x3":
        return p
    else:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [p], dtype=tl.float32, is_pure=False, pack=1)


@triton.jit
def weighted_rows(
    p,
    shrinks,
    w,
    stride_s,
    S,
    cols,
    BLOCK_L: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    UNMASKED: tl.constexpr,
    W_LAYOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """P W for WIDTH columns of W: [BLOCK_L, WIDTH].

    shrinks: before it adds a column group, the sum is multiplied by the group's entry; None for a plain sum.
    """
    acc = tl.zeros((BLOCK_L, WIDTH), tl.float32)
    for g in tl.static_range(len(GROUPS)):
        if shrinks is not None and g > 0:
            acc *= shrinks[g][:, None]
        for j in tl.static_range(len(GROUPS[g])):
            rows = key_rows(w, stride_s, S, W_LAYOUT, first_column(GROUPS, g, j), GROUPS[g][j], is_last(GROUPS, g, j))
            if UNMASKED:
                w_tile = tl.load(rows + cols)  # [width, WIDTH]
            else:
                w_tile = tl.load(rows + cols, mask=cols < D, other=0.0)
            acc = dot(opaque(p[g][j], PRECISION), w_tile, acc, PRECISION)
    return acc


@triton.jit
def keep(seed, row, threshold, FIRST, WIDTH: tl.constexpr):
    """Which of WIDTH columns from FIRST, a multiple of 4, survive dropout: [BLOCK_L, WIDTH] for int64 rows [BLOCK_L].

    seed: a pointer to the int64 seed. Philox4x32-10 with counter (column // 4, row_lo, row_hi, 0); the lane is
    column % 4.
    """
    # Loaded anew, so that no round of one block is kept in registers for the next.
    seed = tl.load(seed, volatile=True)
    quad = (FIRST // 4 + tl.arange(0, WIDTH // 4)).to(tl.uint32)[None, :]
    low = (row & 0xFFFFFFFF).to(tl.uint32)[:, None]
    high = (row >> 32).to(tl.uint32)[:, None]
    quad, low = tl.broadcast(quad, low)
    quad, high = tl.broadcast(quad, high)
    w0, w1, w2, w3 = tl.philox(seed, quad, low, high, tl.zeros_like(low))
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [BLOCK_L, WIDTH // 4, 2, 2], lane 2 i + j at [..., i, j]
    return words.reshape(row.shape[0], WIDTH) >= threshold


@triton.jit
def load_bias(bias, inside, cols, stride, S, BY_ROW: tl.constexpr, UNIT: tl.constexpr, LAST: tl.constexpr):
    """The bias in units of log 2, -inf beyond S: [BLOCK_L, width] at pointers [BLOCK_L, 1], or one row of it."""
    offsets = cols if UNIT else cols * stride
    if BY_ROW:
        mask = inside[:, None] & (cols < S)[None, :] if LAST else inside[:, None]
        added = tl.load(bias + offsets[None, :], mask=mask, other=-float("inf")).to(tl.float32)
    else:
        added = tl.load(bias + offsets, mask=cols < S, other=-float("inf")) if LAST else tl.load(bias + offsets)
        added = added.to(tl.float32)[None, :]
    # Finite numbers, with the least of which some mask keys, stay finite.
    return tl.where(added == -float("inf"), added, tl.maximum(added, LEAST)) * LOG2_E


@triton.jit
def scaled_scores(
    products,
    inside,
    bias,
    bias_s,
    scale,
    S,
    GROUPS: tl.constexpr,
    g: tl.constexpr,
    BIAS_BY_ROW: tl.constexpr,
    UNIT_BIAS: tl.constexpr,
):
    """scale * products + bias in units of log 2, -inf beyond the S columns: blocks of [BLOCK_L, width].

    bias: what load_bias takes, or None.
    """
    scores = ()
    for j in tl.static_range(len(GROUPS[g])):
        cols = first_column(GROUPS, g, j) + tl.arange(0, GROUPS[g][j])  # [width]
        x = products[j] * (scale * LOG2_E)
        if bias is not None:
            x += load_bias(bias, inside, cols, bias_s, S, BIAS_BY_ROW, UNIT_BIAS, is_last(GROUPS, g, j))
        elif is_last(GROUPS, g, j):
            x = tl.where((cols < S)[None, :], x, -float("inf"))
        scores = scores + (x,)
    return scores


@triton.jit
def load_block(x, inside, cols, S, WHOLE: tl.constexpr, READABLE: tl.constexpr):
    """A block of the map or of its gradient, 0 beyond its rows and its S columns: float32 [BLOCK_L, width].

    WHOLE: no column is beyond S. READABLE: those that are may be read.
    """
    mask = inside[:, None] if WHOLE or READABLE else inside[:, None] & (cols < S)
    block = tl.load(x + cols, mask=mask, other=0.0).to(tl.float32)
    return tl.where(cols < S, block, 0.0) if READABLE and not WHOLE else block


@triton.jit
def add_both(a, b, c, d):
    return a + c, b + d


@triton.jit
def row_sums(x, y):
    """The sums of the rows of both: together, so that the compiler moves neither to the other's layout and back."""
    if INTERPRETED:  # which would add one element at a time
        return tl.sum(x, 1), tl.sum(y, 1)
    else:
        return tl.reduce((x, y), 1, add_both)
