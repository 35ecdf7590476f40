"""The static table of tile sizes. docs/gpu_resources.md shows what the assembler makes of it at released sizes, and at
sizes that take the other entries: nothing spills there. The README's limits say what else was seen to spill.

What limits a tile is registers: of a row of 320 columns a thread holds 80 registers of 16-bit weights. Rows of more
than 128 columns are computed in column groups, so that fewer float32 scores are alive at a time; every group reads the
rows of the query once more. Narrow blocks keep few operands of the products alive. Steps of 64 columns read rows that
begin anywhere in a sector with fewer sectors than steps of 32. Drawing a dropout mask takes registers too, as do rows
that are not padded and gradients of the map, hence lower tiles. Low tiles of blocks that are wider than the tile is
high share the columns of a block among their warps: a thread then holds a part of the weights, which the value product
takes from shared memory, at the price of keys that are read more often. Rows of 209 to 512 columns are rounded up to
multiples of 64, since one narrow block among wide ones makes every warp hold all weights. One table serves every GPU
from sm_80 up, with other entries where the compiler of a newer one keeps more alive. What sm_80 and sm_120 get fits the
99 KiB of shared memory that some GPUs have.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from bda_fused.kernels.launch import Target

Groups = tuple[tuple[int, ...], ...]

# The longest score row that is held whole.
WHOLE = 512


@dataclass(frozen=True)
class Tile:
    """rows: of a tile. groups: the widths of the blocks of a score row, in column groups that are computed one after
    the other. inner: columns per step of a sum over D. chunk: columns of a result at a time. registers: how many a
    thread may have, said where the assembler would rather spill a few bytes than give it more.
    """

    rows: int
    groups: Groups
    inner: int
    chunk: int
    warps: int
    stages: int = 2
    registers: int | None = None

    @property
    def columns(self) -> int:
        """How many columns the blocks hold."""
        return sum(map(sum, self.groups))

    @property
    def options(self) -> dict[str, int]:
        return _options(self)


def pitch(columns: int) -> int:
    """The row pitch of scratch in which all blocks of a score row have room: rows of 209 to 512 columns are rounded up
    to multiples of 64.
    """
    unit = 64 if 208 < columns <= WHOLE else 16
    return -(-columns // unit) * unit


def split(columns: int, groups: int, widths: tuple[int, ...]) -> Groups:
    """The fewest blocks of these widths that hold ``columns``, in so many groups of like width.

    Where it can be, no block is as wide as a step of a sum: of two tiles of one shape the compiler loads both as it
    loads the better aligned one, which takes up to four times the sectors for rows that are aligned to 4 bytes.
    """
    units = pitch(columns) // 16
    sizes = [16 * (units // groups + (index < units % groups)) for index in range(groups)]
    return tuple(_blocks(size, widths) for size in sizes)


def _blocks(columns: int, widths: tuple[int, ...]) -> tuple[int, ...]:
    blocks: tuple[int, ...] = ()
    for width in widths:
        count, columns = divmod(columns, width)
        blocks += (width,) * count
    return blocks


def forward(
    target: Target, dtype: torch.dtype, columns: int, width: int, *, dropped: bool, bias_by_row: bool, lean: bool
) -> Tile:
    """The tile of the forward for score rows of so many columns, and keys and values so wide.

    bias_by_row: whether the rows of a tile have biases of their own, which take registers as a dropout mask does.
    lean: whether nothing else does: keys and values have the padded rows of folded ones, and so has a dropped map, and
    the kernel need not divide row numbers.
    """
    if columns > WHOLE:
        return _long(dtype, chunk=64)
    if dtype == torch.float32 and columns > 128 and (dropped or bias_by_row or target.capability >= 120):
        return _wide_single_precision(columns)
    if dtype == torch.float32 and 128 < columns <= 208:
        return Tile(64, split(columns, 4, (32, 16)), 16, 16, 4)
    if dtype == torch.float32:
        return _single_precision(target, columns)
    if _is_wide(columns) or (columns > 208 and (bias_by_row or not lean)):
        return _wide_forward(target, columns, dropped)
    if columns <= 128:
        spills = 100 <= target.capability < 120 and (dtype == torch.float16 or not _has_short_rest(width))
        chunk = 32 if spills else 64
        return Tile(128, split(columns, 1, (32, 16)), 64, chunk, 8)
    if columns <= 208:  # the regions of an image, asked by attributes, whose number is rounded up to whole tiles
        if dropped and target.capability >= 120:
            return Tile(64, split(columns, 7, (32, 16)), 32, 16, 4)
        return Tile(64, split(columns, 4 if dropped else 3, (32, 16)), 32, 32, 4)
    if dropped:
        return _even(columns)
    step = 64 if target.capability < 100 and _has_short_rest(width) else 32
    return Tile(128, split(columns, 2, (64, 32, 16)), step, step, 8)


def backward(target: Target, dtype: torch.dtype, columns: int, width: int, *, dropped: bool, lean: bool) -> Tile:
    """The tile of the backward's row kernel for score rows of so many columns, and keys and values so wide.

    lean: whether keys, values and the map have padded rows, the map has no gradient of its own, and the kernel need not
    divide row numbers.
    """
    if columns > WHOLE:
        return _long(dtype, chunk=32)
    if dtype == torch.float32 and 128 < columns <= 208 and target.capability >= 100:  # 64 rows spill
        return Tile(32, split(columns, 7, (32, 16)), 16, 16, 8)
    if dtype == torch.float32 and 128 < columns <= 208:  # eight warps compute every product twice, four spill
        return Tile(64, split(columns, 7, (16,)), 16, 16, 8)
    if dtype == torch.float32:
        return _single_precision(target, columns)
    if _is_wide(columns) or (columns > 208 and not lean):
        return _wide_backward(columns, dropped)
    if columns <= 128:
        step = 32 if dropped and columns > 64 else 64
        return Tile(128, split(columns, 1, (32, 16)), step, step, 8)
    if columns <= 208 and (target.capability >= 120 or (dropped and target.capability == 90)):
        return Tile(128, split(columns, 3, (32, 16)), 32, 32, 8)
    if columns <= 208:
        return Tile(128, split(columns, 2, (64, 16)), 32, 32, 8)
    if dropped:
        return _even(columns)
    if target.capability >= 100:
        groups = split(columns, 6, (32, 16))
        narrow_first = target.capability >= 120 and not _has_short_rest(width)
        return Tile(128, groups[::-1] if narrow_first else groups, 16, 32, 8)
    spills = dtype == torch.float16 or target.capability >= 90 or not _has_short_rest(width)
    step = 32 if spills else 64
    return Tile(128, split(columns, 4, (32, 16)), step, step, 8)


def _has_short_rest(width: int) -> bool:
    """Whether steps of 64 columns leave at most 32: a rest of 64 would take more registers than there are."""
    return width % 64 <= 32


def _is_wide(columns: int) -> bool:
    """Whether 16-bit rows take low tiles of wide blocks, whose weights wait in shared memory, whatever else a thread
    holds: above 208 columns, but for 305 to 320, whose tiles read keys less often where they can be high.
    """
    return columns > 208 and not 304 < columns <= 320


def _even(columns: int) -> Tile:
    """Half as high as what has no mask, with blocks as wide as it is high: two warps share the columns of each."""
    return Tile(64, _blocks_of_64(columns), 16, 32, 8)


def _wide_forward(target: Target, columns: int, dropped: bool) -> Tile:
    if dropped and columns > 304:
        return _low(columns)
    if columns <= 320:
        return Tile(32, _blocks_of_64(columns), 16, 64, 4)
    # On sm_90 one stage spills; two take more shared memory than sm_86 and sm_120 have.
    return Tile(32, _blocks_of_64(columns), 16, 64, 8, stages=2 if target.capability == 90 else 1)


def _wide_backward(columns: int, dropped: bool) -> Tile:
    if columns <= 320 and not dropped:
        return Tile(32, _blocks_of_64(columns), 16, 64, 4)
    if dropped and columns > 304:
        return _low(columns, stages=1)
    return Tile(32, _blocks_of_64(columns), 16, 64, 8, stages=1)


def _low(columns: int, stages: int = 2) -> Tile:
    """Tiles of 16 rows, which read keys and values most often, for what spills in higher ones."""
    return Tile(16, _blocks_of_64(columns), 16, 32, 8, stages)


def _long(dtype: torch.dtype, chunk: int) -> Tile:
    """Rows of more than ``WHOLE`` columns, a block at a time."""
    if dtype == torch.float32:
        return Tile(32, ((32,),), 16, 64, 4, registers=255)
    return Tile(64, ((64,),), 32, chunk, 4, registers=255)


def _blocks_of_64(columns: int) -> Groups:
    """Groups of one block each. No block is narrower than a tile of up to 64 rows is high: warps share its columns."""
    return ((64,),) * -(-columns // 64)


def _single_precision(target: Target, columns: int) -> Tile:
    """float32 weights take twice the registers, and three TF32 products hold both halves of their operands.

    Groups of one block each spill least. From 209 columns on they want tiles of 16 rows, which read keys and values
    more often; there the weights wait in shared memory.
    """
    if columns <= 112:
        return Tile(64, split(columns, 1, (64, 16)), 32, 32 if target.capability < 120 else 16, 4)
    if columns <= 128:
        return Tile(64, split(columns, 2, (16,)), 16, 16, 4)
    if columns <= 320:
        return Tile(16, _blocks_of_64(columns), 16, 16, 4)
    return _wide_single_precision(columns)


def _wide_single_precision(columns: int) -> Tile:
    """Eight warps share the 64 columns of a block and of a chunk: nothing is computed twice. A second stage spills."""
    return Tile(16, _blocks_of_64(columns), 16, 64, 8, stages=1)


@dataclass(frozen=True)
class ProductTile:
    """A tile of the result, and depth: of one step of the sum; the rest as in Tile. It is one block: of several that
    share an operand the compiler gives every warp all columns, and blocks of fewer than 16 rows a warp are computed
    more than once.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int = 2
    registers: int | None = None

    @property
    def options(self) -> dict[str, int]:
        return _options(self)


def product(target: Target, dtype: torch.dtype, width: int) -> ProductTile:
    """The tile of a long product with a result of so many columns: 128 of them where no more are computed for it."""
    wide = dtype != torch.float32 and -(-width // 128) * 128 == -(-width // 64) * 64
    warps = 8 if dtype == torch.float32 and target.capability >= 120 else 4
    registers = 168 if dtype != torch.float32 and 100 <= target.capability < 120 and not wide else None
    return ProductTile(64, 128 if wide else 64, 32, warps, registers=registers)


def _options(tile: Tile | ProductTile) -> dict[str, int]:
    """What the compiler is told."""
    limit = {} if tile.registers is None else {"maxnreg": tile.registers}
    return {"num_warps": tile.warps, "num_stages": tile.stages} | limit
