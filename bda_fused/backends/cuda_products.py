"""Gradients that are sums over rows and images, as launches: csrc/cuda/summed_product.cuh and ordered_sum.cu.

    form      left                       right            result
    keys      dS or P * M, transposed    query or dY      gradients of keys and values
    queries   dS                         key              the gradient of queries that images share

A product with few tiles is cut into splits of its rows, whose float32 results are added from the first to the last: the
same bits in any order of blocks.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from bda_fused import shapes
from bda_fused.backends.cuda_plan import KINDS, THREADS, Device, Launch, Rows, element_name, has_aligned_rows

# What a split costs beside its rows, in stages of 128 bytes of depth: its partial result is written and read again.
_SPLIT_OVERHEAD = 6


class Product(ctypes.Structure):
    """csrc/cuda/arguments.h, field by field."""

    _fields_ = [
        ("left", Rows * 2),
        ("right", Rows * 2),
        ("out", ctypes.c_void_p),
        *(
            (name, ctypes.c_int32)
            for name in (
                "terms",
                "rows",
                "columns",
                "depth",
                "groups",
                "group_heads",
                "sum_batches",
                "sum_heads",
                "row_tiles",
                "column_tiles",
                "tile_rows",
                "tile_blocks",
                "splits",
                "first_block",
                "left_unit",
                "right_unit",
                "out_kind",
            )
        ),
    ]


class ProductArguments(ctypes.Structure):
    """csrc/cuda/arguments.h, field by field."""

    _fields_ = [("products", Product * 2)]


class SumArguments(ctypes.Structure):
    """csrc/cuda/arguments.h, field by field."""

    _fields_ = [
        ("partial", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("added", Rows),
        ("size", ctypes.c_int64),
        *(
            (name, ctypes.c_int32)
            for name in (
                "parts",
                "rows",
                "columns",
                "group_heads",
                "sum_batches",
                "sum_heads",
                "out_kind",
            )
        ),
    ]


@dataclass(frozen=True)
class ProductTile:
    """The most rows and columns of a block's tile, and the depth of its stages: csrc/cuda/summed_product.cuh."""

    rows: int
    columns: int
    depth: int

    def shared(self, form: str) -> int:
        """Bytes of a block's shared memory: two stages."""
        itemsize = 128 // self.depth
        gap = 16 if itemsize == 2 else 32
        left = self.depth * (self.rows * itemsize + gap) if form == "keys" else self.rows * (128 + 16)
        return 2 * (left + self.depth * (self.columns * itemsize + gap))


TILES = {2: ProductTile(160, 192, 64), 4: ProductTile(128, 128, 32)}  # by the size of an element


@dataclass(frozen=True)
class Sum:
    """out = the sum of ``terms``' products, and of ``added``, over the batch axes that ``out`` has as 1.

    terms: (left, right), one or two: left (B or 1, H or 1, L, S) with a unit last stride, right (B or 1, H or 1, L or
    S, columns) likewise. out: (B or 1, H or 1, S or L, columns), contiguous. added: (B, H, L, columns), of out's dtype.
    """

    terms: Sequence[tuple[Tensor, Tensor]]
    out: Tensor
    added: Tensor | None = None


@dataclass(frozen=True)
class _Walk:
    """Which images are summed: ``batches`` and ``heads`` beside a depth, which has those that follow one another."""

    depth: int
    batches: int
    heads: int


def launches(form: str, sums: Sequence[Sum], batch: tuple[int, int], device: Device) -> list[Launch]:
    """The launches that fill one or two results of one form. batch: (B, H), to which all operands broadcast."""
    first = sums[0].terms[0][0]
    tile = TILES[first.element_size()]
    walks = [_walk(form, x, batch) for x in sums]
    grids = [_tiles(tile, x.out) for x in sums]
    steps = [len(x.terms) * w.batches * w.heads * -(-w.depth // tile.depth) for x, w in zip(sums, walks, strict=True)]
    blocks = sum(x.out.shape[:2].numel() * rows * columns for x, (rows, columns) in zip(sums, grids, strict=True))
    splits = _splits(blocks, max(steps), device)
    tensors: dict[str, Tensor] = {}
    arguments = ProductArguments()
    grid, ordered = 0, []
    for index, (x, walk, (row_tiles, column_tiles)) in enumerate(zip(sums, walks, grids, strict=True)):
        parts = min(splits, steps[index])
        partial = parts > 1 or x.added is not None
        target = x.out.new_empty((parts, x.out.numel()), dtype=torch.float32) if partial else x.out
        groups, (rows, columns) = x.out.shape[:2].numel(), x.out.shape[2:]
        arguments.products[index] = Product(
            left=(Rows * 2)(*(_rows(left) for left, _ in x.terms)),
            right=(Rows * 2)(*(_rows(right) for _, right in x.terms)),
            out=target.data_ptr(),
            terms=len(x.terms),
            rows=rows,
            columns=columns,
            depth=walk.depth,
            groups=groups,
            group_heads=x.out.shape[1],
            sum_batches=walk.batches,
            sum_heads=walk.heads,
            row_tiles=row_tiles,
            column_tiles=column_tiles,
            tile_rows=16 * -(-rows // (16 * row_tiles)),
            tile_blocks=-(-columns // (8 * column_tiles)),
            splits=parts,
            first_block=grid,
            left_unit=_unit([left for left, _ in x.terms]),
            right_unit=_unit([right for _, right in x.terms]),
            out_kind=KINDS[target.dtype],
        )
        for name, operands in (("left", (left for left, _ in x.terms)), ("right", (right for _, right in x.terms))):
            tensors |= {f"{name}{index}{term}": operand for term, operand in enumerate(operands)}
        tensors[f"out{index}"] = target
        grid += groups * row_tiles * column_tiles * parts
        if partial:
            ordered.append(_ordered_sum(target, x, batch))
    if len(sums) == 1:
        arguments.products[1].first_block = grid
    name = f"summed_product_{form}_{element_name(first.dtype)}"
    return [Launch(name, grid, tile.shared(form), arguments, tensors), *ordered]


def _walk(form: str, x: Sum, batch: tuple[int, int]) -> _Walk:
    batches, heads = (size if kept == 1 else 1 for size, kept in zip(batch, x.out.shape[:2], strict=True))
    depth = x.terms[0][1].shape[2]
    operands = [operand for term in x.terms for operand in term]
    if form == "keys":  # rows of images that follow one another are one sum
        if all(shapes.step(operand, 1) == depth * shapes.step(operand, 2) for operand in operands) or heads == 1:
            depth, heads = depth * heads, 1
        if heads == 1 and all(shapes.step(operand, 0) == depth * shapes.step(operand, 2) for operand in operands):
            depth, batches = depth * batches, 1
    return _Walk(depth, batches, heads)


def _tiles(tile: ProductTile, out: Tensor) -> tuple[int, int]:
    rows, columns = out.shape[2:]
    return -(-rows // tile.rows), -(-columns // tile.columns)


@lru_cache
def _splits(blocks: int, steps: int, device: Device) -> int:
    """Into how many parts every sum of ``steps`` stages is cut: by waves of the ``blocks`` that one part has."""

    def time(splits: int) -> int:
        waves = -(-blocks * splits // device.processors)
        return waves * (-(-steps // splits) + (_SPLIT_OVERHEAD if splits > 1 else 0))

    return min(range(1, min(steps, 4 * device.processors) + 1), key=time)


def _ordered_sum(partial: Tensor, x: Sum, batch: tuple[int, int]) -> Launch:
    batches, heads = (size if kept == 1 else 1 for size, kept in zip(batch, x.out.shape[:2], strict=True))
    arguments = SumArguments(
        partial=partial.data_ptr(),
        out=x.out.data_ptr(),
        added=Rows() if x.added is None else _rows(x.added),
        size=x.out.numel(),
        parts=partial.shape[0],
        rows=x.out.shape[2],
        columns=x.out.shape[3],
        group_heads=x.out.shape[1],
        sum_batches=batches,
        sum_heads=heads,
        out_kind=KINDS[x.out.dtype],
    )
    tensors = {"partial": partial, "out": x.out} | ({} if x.added is None else {"added": x.added})
    return Launch("ordered_sum", -(-x.out.numel() // THREADS), 0, arguments, tensors)


def _rows(x: Tensor) -> Rows:
    return Rows(x.data_ptr(), *(shapes.step(x, axis) for axis in range(3)))


def _unit(operands: Sequence[Tensor]) -> int:
    """Bytes in which the rows of all of them can be copied past the registers: 16, 4, or 0 for never."""
    return next((unit for unit in (16, 4) if all(has_aligned_rows(x, unit) for x in operands)), 0)
