"""Sums over the batch in a fixed order: long products, their partial sums, and the gradient of a score bias.

The gradient of a shared operand is a sum over images. A product whose result has few tiles is cut into splits of its
summation, whose float32 results are added from the first to the last: no atomics, the same bits in any block order.
"""

from dataclasses import dataclass
from math import gcd

import torch
import triton
import triton.language as tl
from bda_fused.kernels import tiles
from bda_fused.kernels.blocks import batch_start, dot, row_stride
from bda_fused.kernels.launch import Launch, Target, layout, strides
from torch import Tensor


@triton.jit
def add_products(
    acc,
    a,
    b,
    a_b,
    a_h,
    a_row,
    b_b,
    b_h,
    b_k,
    first_b,
    first_h,
    first_m,
    first_n,
    begin,
    end,
    M,
    K,
    A_COLUMNS,
    OUTER_H,
    N: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    A_LAYOUT: tl.constexpr,
    B_LAYOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SURVIVORS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """acc [BLOCK_M, BLOCK_N] plus the products of the steps begin to end, each BLOCK_K long.

    SURVIVORS: negative elements of A count as 0.
    """
    CHUNKS = tl.cdiv(K, BLOCK_K)
    a_row, b_k = row_stride(a_row, A_LAYOUT), row_stride(b_k, B_LAYOUT)
    m, n = first_m + tl.arange(0, BLOCK_M), first_n + tl.arange(0, BLOCK_N)
    for step in tl.range(begin, end):
        outer = step // CHUNKS
        image, head = (first_b + outer // OUTER_H).to(tl.int64), (first_h + outer % OUTER_H).to(tl.int64)
        k = (step - outer * CHUNKS) * BLOCK_K + tl.arange(0, BLOCK_K)
        a_image = batch_start(a, image, head, a_b, a_h, A_LAYOUT)
        b_rows = batch_start(b, image, head, b_b, b_h, B_LAYOUT) + k.to(tl.int64)[:, None] * b_k  # [BLOCK_K, 1]
        inside = (k < K)[:, None]
        if TRANSPOSED:
            a_rows = a_image + k.to(tl.int64)[:, None] * a_row
            a_tile = tl.load(a_rows + m[None, :], mask=inside & (m < A_COLUMNS)[None, :], other=0.0).T
            if SURVIVORS:
                a_tile = tl.maximum(a_tile, 0.0).to(a.dtype.element_ty)
        else:
            a_rows = a_image + m.to(tl.int64)[:, None] * a_row
            a_tile = tl.load(a_rows + k[None, :], mask=(m < M)[:, None] & (k < A_COLUMNS)[None, :], other=0.0)
        mask = inside if N % BLOCK_N == 0 else inside & (n < N)[None, :]
        b_tile = tl.load(b_rows + n[None, :], mask=mask, other=0.0).to(a_tile.dtype)  # [BLOCK_K, BLOCK_N]
        acc = dot(a_tile, b_tile, acc, PRECISION)
    return acc


PRODUCT_RUNTIME = [
    "a_b", "a_h", "a_row", "b_b", "b_h", "b_k", "a2_b", "a2_h", "a2_row", "b2_b", "b2_h", "b2_k", "c_b", "c_h", "c_m",
    "M", "K", "A_COLUMNS", "A2_COLUMNS", "OUTER", "OUTER_H", "GROUPS", "GROUP_H", "SPLITS", "TO_PARTIAL",
    "between", "alpha",
]  # fmt: skip


@triton.jit(do_not_specialize=PRODUCT_RUNTIME)
def residual_attention_summed_product(
    a,
    b,
    a2,
    b2,
    c,
    partial,
    a_b: "i64",
    a_h: "i64",
    a_row: "i64",
    b_b: "i64",
    b_h: "i64",
    b_k: "i64",
    a2_b: "i64",
    a2_h: "i64",
    a2_row: "i64",
    b2_b: "i64",
    b2_h: "i64",
    b2_k: "i64",
    c_b: "i64",
    c_h: "i64",
    c_m: "i64",
    M: "i32",
    K: "i32",
    A_COLUMNS: "i32",
    A2_COLUMNS: "i32",
    OUTER: "i32",
    OUTER_H: "i32",
    GROUPS: "i32",
    GROUP_H: "i32",
    SPLITS: "i32",
    TO_PARTIAL: "i32",
    between: "fp32",
    alpha: "fp32",
    N: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    A_LAYOUT: tl.constexpr,
    B_LAYOUT: tl.constexpr,
    A2_LAYOUT: tl.constexpr,
    B2_LAYOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UNIT: tl.constexpr,
    UNIT2: tl.constexpr,
    SURVIVORS: tl.constexpr,
    SURVIVORS2: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """C = alpha * (between * sum A B + sum A2 B2), the sums over K and the outer batch indices; a2 None for one sum.

    A is (M, K), or in memory (K, M) where TRANSPOSED; B is (K, N). With TO_PARTIAL every split writes its
    float32 share to ``partial`` (splits, groups, M, N), else C itself is written.
    """
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    at = tl.program_id(0)
    first_n = at % tiles_n * BLOCK_N
    first_m = at // tiles_n % tiles_m * BLOCK_M
    split = at // (tiles_n * tiles_m) % SPLITS
    group = at // (tiles_n * tiles_m * SPLITS)
    first_b, first_h = group // GROUP_H, group % GROUP_H
    steps = OUTER * tl.cdiv(K, BLOCK_K)
    begin, end = steps * split // SPLITS, steps * (split + 1) // SPLITS

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    columns = A_COLUMNS // UNIT * UNIT
    acc = add_products(
        acc, a, b, a_b, a_h, a_row, b_b, b_h, b_k, first_b, first_h, first_m, first_n, begin, end,
        M, K, columns, OUTER_H, N, TRANSPOSED, A_LAYOUT, B_LAYOUT, BLOCK_M, BLOCK_N, BLOCK_K, SURVIVORS, PRECISION,
    )  # fmt: skip
    if a2 is not None:
        columns = A2_COLUMNS // UNIT2 * UNIT2
        acc = add_products(
            acc * between, a2, b2, a2_b, a2_h, a2_row, b2_b, b2_h, b2_k, first_b, first_h, first_m, first_n, begin, end,
            M, K, columns, OUTER_H, N, TRANSPOSED, A2_LAYOUT, B2_LAYOUT,
            BLOCK_M, BLOCK_N, BLOCK_K, SURVIVORS2, PRECISION,
        )  # fmt: skip

    c += first_b.to(tl.int64) * c_b + first_h.to(tl.int64) * c_h
    partial += (split * GROUPS + group).to(tl.int64) * M * N
    m = (first_m + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
    n = (first_n + tl.arange(0, BLOCK_N))[None, :]
    out = acc * alpha  # [BLOCK_M, BLOCK_N]
    mask = (m < M) & (n < N)
    if TO_PARTIAL:
        tl.store(partial + m * N + n, out, mask=mask)
    else:
        tl.store(c + m * c_m + n, out.to(c.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["PARTS", "SIZE"])
def residual_attention_ordered_sum(partial, out, PARTS: "i32", SIZE: "i64", BLOCK: tl.constexpr):
    """out = sum of the PARTS float32 vectors of SIZE elements, from the first to the last."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for part in tl.range(0, PARTS):
        acc += tl.load(partial + part * SIZE + at, mask=at < SIZE, other=0.0)
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=at < SIZE)


@triton.jit(
    do_not_specialize=[
        "x_b", "x_h", "x_l", "KEPT_H", "KEPT_L", "SUMMED", "SUMMED_H", "SUMMED_L", "ROWS", "COLUMNS", "SPLITS",
    ]
)  # fmt: skip
def residual_attention_summed_rows(
    x,
    partial,
    x_b: "i64",
    x_h: "i64",
    x_l: "i64",
    KEPT_H: "i32",
    KEPT_L: "i32",
    SUMMED: "i32",
    SUMMED_H: "i32",
    SUMMED_L: "i32",
    ROWS: "i32",
    COLUMNS: "i32",
    SPLITS: "i32",
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sums of rows of x (B, H, L, COLUMNS) over the batch axes that are not kept, a share of them for each split.

    partial: (splits, ROWS, COLUMNS) for the ROWS kept rows.
    """
    tiles_c = tl.cdiv(COLUMNS, BLOCK_C)
    at = tl.program_id(0)
    tile = at % tiles_c
    split = at // tiles_c % SPLITS
    row = at // (tiles_c * SPLITS)
    l, outer = (row % KEPT_L).to(tl.int64), row // KEPT_L
    x += (outer // KEPT_H).to(tl.int64) * x_b + (outer % KEPT_H).to(tl.int64) * x_h + l * x_l
    begin, end = (
        (SUMMED.to(tl.int64) * split // SPLITS).to(tl.int32),
        (SUMMED.to(tl.int64) * (split + 1) // SPLITS).to(tl.int32),
    )
    cols = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    acc = tl.zeros((BLOCK_C,), tl.float32)
    for first in tl.range(begin, end, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        outer_r = r // SUMMED_L
        offset = (outer_r // SUMMED_H).to(tl.int64) * x_b + (outer_r % SUMMED_H).to(tl.int64) * x_h
        offset += (r - outer_r * SUMMED_L).to(tl.int64) * x_l
        mask = (r < end)[:, None] & (cols < COLUMNS)[None, :]
        tile_x = tl.load(x + offset[:, None] + cols[None, :], mask=mask, other=0.0)  # [BLOCK_R, BLOCK_C]
        acc += tl.sum(tile_x.to(tl.float32), 0)
    tl.store(partial + (split.to(tl.int64) * ROWS + row) * COLUMNS + cols, acc, mask=cols < COLUMNS)


BLOCK_R, BLOCK_C, BLOCK_SUM = 16, 128, 256


@dataclass(frozen=True)
class Term:
    """alpha * A B. columns: how many of A's may be read, those beyond K being 0. survivors: negative entries are 0."""

    a: Tensor | None
    b: Tensor | None
    alpha: float
    columns: int
    survivors: bool = False


def plan_products(
    terms: list[Term],
    out: Tensor,
    *,
    transposed: bool,
    extra: Tensor | None,
    precision: str,
    target: Target,
) -> list[Launch]:
    """The launches that fill out (B or 1, H or 1, M, N) with the sum of one or two terms.

    A: (B, H, M, K) or, transposed, (B, H, K, M); B: (B or 1, H or 1, K, N). The batch axes that ``out`` has as 1 are
    summed. extra: (B, H, M, N), summed in the same way
    and added.
    """
    first, second = terms[0], terms[1] if len(terms) == 2 else Term(None, None, 1.0, 16)
    a, b, a2, b2 = first.a, first.b, second.a, second.b
    between, alpha = (1.0, first.alpha) if a2 is None else (first.alpha / second.alpha, second.alpha)
    images, heads = a.shape[:2]
    kept_b, kept_h = out.shape[0] == images, out.shape[1] == heads
    rows, width = out.shape[2:]
    depth = b.shape[2]
    groups = (images if kept_b else 1) * (heads if kept_h else 1)
    outer_h = 1 if kept_h else heads
    outer = (1 if kept_b else images) * outer_h
    steps = {
        **strides(a, "a_b a_h a_row"), **strides(b, "b_b b_h b_k"),
        **strides(b if a2 is None else a2, "a2_b a2_h a2_row"),
        **strides(b if b2 is None else b2, "b2_b b2_h b2_k"), **strides(out, "c_b c_h c_m"),
    }  # fmt: skip
    if transposed and not kept_b and heads == 1 and _follow(images, depth, a, b, a2, b2):
        # All images' rows are one axis, whose stride is no longer 0 where an image has one row only.
        rows_of = {"a_row": a, "b_k": b, "a2_row": a2, "b2_k": b2}
        steps |= {name: x.stride(0) // depth for name, x in rows_of.items() if x is not None}
        steps |= dict.fromkeys(("a_b", "b_b", "a2_b", "b2_b"), 0)
        depth, outer = images * depth, 1
    tile = tiles.product(target, a.dtype, width)
    count = groups * triton.cdiv(rows, tile.rows) * triton.cdiv(width, tile.columns)
    splits = _splits(count, outer * triton.cdiv(depth, tile.depth), least=8)
    parts = splits + (0 if extra is None else _row_splits(extra, out))
    partial = out.new_empty((parts if parts > 1 else 0, out.numel()), dtype=torch.float32)
    arguments = {
        "a": a, "b": b, "a2": a2, "b2": b2, "c": out, "partial": partial, **steps,
        "M": rows, "K": depth, "A_COLUMNS": first.columns, "A2_COLUMNS": second.columns,
        "OUTER": outer, "OUTER_H": outer_h,
        "GROUPS": groups, "GROUP_H": heads if kept_h else 1, "SPLITS": splits, "TO_PARTIAL": int(parts > 1),
        "between": between, "alpha": alpha,
    }  # fmt: skip
    constants = {
        "N": width,
        "TRANSPOSED": transposed,
        "A_LAYOUT": layout(a),
        "B_LAYOUT": layout(b),
        "A2_LAYOUT": layout(a2),
        "B2_LAYOUT": layout(b2),
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.columns,
        "UNIT": gcd(16, first.columns),
        "UNIT2": gcd(16, second.columns),
        "SURVIVORS": first.survivors,
        "SURVIVORS2": second.survivors,
        "BLOCK_K": tile.depth,
        "PRECISION": precision,
    }
    launches = [Launch(residual_attention_summed_product, count * splits, arguments, constants, tile.options)]
    if extra is not None:
        launches.append(_plan_rows(extra, extra.shape[3], out, partial[splits:]))
    return [*launches, _ordered_sum(partial, out)] if parts > 1 else launches


def _follow(images: int, depth: int, *operands: Tensor | None) -> bool:
    """Whether every operand has all images, and each image's rows follow those of the image before."""
    return all(
        x is None or (x.shape[0] == images and (depth == 1 or x.stride(0) == depth * x.stride(2))) for x in operands
    )


def _splits(tiles: int, steps: int, *, least: int) -> int:
    """Into how many parts of at least ``least`` steps a sum is cut, so that some hundred programs share the work.

    Their product with the number of steps is a 32-bit number in the kernel.
    """
    return max(1, min(steps // least, triton.cdiv(256, tiles), (2**31 - 1) // steps))


def plan_sum(x: Tensor, columns: int, out: Tensor) -> list[Launch]:
    """The launches that fill out (., ., ., columns) with x (B, H, L, pitch) summed over the axes that it has as 1."""
    partial = out.new_empty((_row_splits(x, out), out.numel()), dtype=torch.float32)
    return [_plan_rows(x, columns, out, partial), _ordered_sum(partial, out)]


def _row_splits(x: Tensor, out: Tensor) -> int:
    rows = out.shape[:3].numel()
    return _splits(rows * triton.cdiv(x.shape[3], BLOCK_C), triton.cdiv(x.shape[:3].numel() // rows, BLOCK_R), least=2)


def _plan_rows(x: Tensor, columns: int, out: Tensor, partial: Tensor) -> Launch:
    kept = [small == size for small, size in zip(out.shape[:3], x.shape[:3], strict=True)]
    summed = [1 if keep else size for keep, size in zip(kept, x.shape[:3], strict=True)]
    rows, splits = out.shape[:3].numel(), _row_splits(x, out)
    arguments = {
        "x": x, "partial": partial, **strides(x, "x_b x_h x_l"),
        "KEPT_H": out.shape[1], "KEPT_L": out.shape[2],
        "SUMMED": summed[0] * summed[1] * summed[2], "SUMMED_H": summed[1], "SUMMED_L": summed[2],
        "ROWS": rows, "COLUMNS": columns, "SPLITS": splits,
    }  # fmt: skip
    constants = {"BLOCK_R": BLOCK_R, "BLOCK_C": BLOCK_C}
    grid = rows * splits * triton.cdiv(columns, BLOCK_C)
    return Launch(residual_attention_summed_rows, grid, arguments, constants, {"num_warps": 4, "num_stages": 2})


def _ordered_sum(partial: Tensor, out: Tensor) -> Launch:
    arguments = {"partial": partial, "out": out, "PARTS": partial.shape[0], "SIZE": out.numel()}
    grid = triton.cdiv(out.numel(), BLOCK_SUM)
    options = {"num_warps": 2, "num_stages": 2}
    return Launch(residual_attention_ordered_sum, grid, arguments, {"BLOCK": BLOCK_SUM}, options)
