"""What the CUDA kernels are launched with: kernel, grid, shared memory and arguments, computed without a GPU.

One row kernel serves both directions (csrc/cuda/arguments.h):

    Z = added + map(scale * left first^T + bias) second

               left    first   second  added             map
    forward    query   key     value   residual          softmax
    backward   dY      value   key     dY or nothing     dS = P * (dP - rowsum(P * dP))

A ``Launch`` goes as it is to the driver or to a simulator.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bda_fused import dropout, shapes

THREADS = 256
_WARPS = THREADS // 32
_CHUNK = 128  # bytes of a row that are one stage on chip
_STAGES = 4  # of left rows that do not stay; a power of two
_MOST_KEYS = 512  # whose scores fit on chip; a multiple of 4, as the dropout mask's counters are

# What a block costs beside its rows, in rows: its keys and values are loaded for any number of them.
_BLOCK_OVERHEAD = 16

KINDS = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
LEFT = 4  # what is added are the left rows, which stay on chip
_WHOLE, _STATISTICS, _RESULTS = range(3)


class Rows(ctypes.Structure):
    """An operand (B, H, rows, columns) with its strides in elements, 0 where an axis is shared."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("head", ctypes.c_int64),
        ("row", ctypes.c_int64),
    ]


class RowArguments(ctypes.Structure):
    """csrc/cuda/arguments.h, field by field."""

    _fields_ = [
        ("left", Rows),
        ("first", Rows),
        ("second", Rows),
        ("added", Rows),
        ("out", ctypes.c_void_p),
        ("bias", Rows),
        ("weights", Rows),
        ("weights_grad", Rows),
        *(
            (name, ctypes.c_void_p)
            for name in (
                "row_sum_grad",
                "row_sum",
                "scores_grad",
                "dropped",
                "bias_grad",
                "bias_grad_sums",
                "statistics",
                "seed",
            )
        ),
        *(
            (name, ctypes.c_int32)
            for name in (
                "batches",
                "heads",
                "queries",
                "keys",
                "width",
                "out_width",
                "inner_batches",
                "inner_heads",
                "tiles",
                "bias_key",
                "total_keys",
                "first_key",
                "group",
                "groups",
                "step",
                "added_kind",
                "out_kind",
            )
        ),
        ("threshold", ctypes.c_uint32),
        ("keep_scale", ctypes.c_float),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("left_unit", "left_offset", "left_mask", "pass_units", "consecutive")),
    ]


class PackArguments(ctypes.Structure):
    """csrc/cuda/arguments.h, field by field."""

    _fields_ = [
        ("source", Rows),
        ("packed", ctypes.c_void_p),
        ("total_rows", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("heads", "rows", "row_bytes", "row_units")),
    ]


@dataclass(frozen=True)
class Launch:
    """One kernel call. ``tensors``: the arguments' fields that hold addresses, with the tensors they point into."""

    kernel: str
    grid: int
    shared: int
    arguments: ctypes.Structure
    tensors: dict[str, Tensor]
    block: int = THREADS

    @property
    def what(self) -> str:
        """The problem, for error messages."""
        return ", ".join(f"{name} {tuple(x.shape)}" for name, x in self.tensors.items())


@dataclass(frozen=True)
class Device:
    """What the choice of a tile depends on. shared_limit: bytes a block may opt in to."""

    processors: int
    shared_limit: int


@dataclass(frozen=True)
class Tile:
    """The shape of a block's work: how many rows, how many keys fit, and units of the result that a warp has at most.

    A unit is 32 bytes of a row, in the operands' dtype. csrc/cuda/kernels.h.
    """

    rows: int
    keys: int
    units: int = 3

    @property
    def name(self) -> str:
        return f"{self.rows}x{self.keys}"

    def pass_units(self, out_width: int, itemsize: int) -> int:
        """Units of one pass over the columns of the result: as even as whole rounds over the warps allow."""
        units = -(-out_width * itemsize // 32)
        passes = max(-(-units // (_WARPS * self.units)), 1)
        return _round_up(-(-units // passes), _WARPS)

    @property
    def _stage(self) -> int:
        """Bytes of a chunk of the left rows on chip."""
        return 2 * (80 * self.rows + 64)

    def _map_and_slices(self, itemsize: int) -> int:
        return self.rows * (self.keys * itemsize + 16) + 2 * 16 * 4 * (self.units * _WARPS * 32 // itemsize + 16)

    def left_offset(self, itemsize: int, staying: int = 0) -> int:
        """Where the stages of left rows begin on chip, from the map's address; staying: bytes of each row that stays.

        Rows that stay lie behind the map and the slices. Others lie where these come later, behind two chunks of words
        that are still to be shifted.
        """
        return self._map_and_slices(itemsize) if staying else 2 * 9 * 16 * self.rows

    def shared_bytes(self, itemsize: int, staying: int = 0) -> int:
        """csrc/cuda/tile.cuh, SharedMemory."""
        left = self.left_offset(itemsize, staying) + (-(-staying // _CHUNK) or _STAGES) * self._stage
        lasting = 4 * self.keys + 2 * 4 * self.rows * _WARPS + self.rows * (32 + 12)
        return lasting + max(left, self._map_and_slices(itemsize))


_NARROW, _WIDE, _LONG = Tile(96, 128), Tile(96, 320), Tile(32, _MOST_KEYS)
_LOW = {rows: Tile(rows, 320) for rows in (80, 64, 48)}
_FLOAT32 = (_LOW[48], Tile(16, _MOST_KEYS, 4))

# Element type of the kernels -> direction -> the tiles that are built, the better of two equals first.
TILES: dict[str, dict[str, tuple[Tile, ...]]] = {
    **{
        name: {
            "forward": (_NARROW, _WIDE, *_LOW.values(), _LONG),
            "backward": (_WIDE, _LOW[80], _LOW[48], _LONG),
        }
        for name in ("bf16", "fp16")
    },
    **{name: {"forward": _FLOAT32, "backward": _FLOAT32} for name in ("tf32", "tf32x3")},
}


def element_name(dtype: torch.dtype) -> str:
    """The kernels' element type: float32 is one TF32 product or three, as torch's matmul precision says."""
    if dtype == torch.float32:
        return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    return {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def choose_tile(tiles: Sequence[Tile], groups: int, rows: int, keys: int, itemsize: int, device: Device) -> Tile:
    """The tile of least time, by waves: blocks that run after one another on one processor, times what one costs.

    groups, rows: of rows that meet the same keys, and in each.
    """
    fitting = [x for x in tiles if keys <= x.keys and x.shared_bytes(itemsize) <= device.shared_limit]
    return min(
        fitting,
        key=lambda tile: -(-groups * -(-rows // tile.rows) // device.processors) * (tile.rows + _BLOCK_OVERHEAD),
    )


def key_groups(keys: int) -> list[int]:
    """How many keys each launch sees: all of them, where they fit on chip."""
    return [min(_MOST_KEYS, keys - first) for first in range(0, keys, _MOST_KEYS)]


@dataclass(frozen=True)
class BlockShape:
    """groups: of rows that meet the same keys, over ``inner_batches`` and ``inner_heads``; tiles: in each group."""

    tile: Tile
    groups: int
    tiles: int
    inner_batches: int
    inner_heads: int

    @property
    def grid(self) -> int:
        return self.groups * self.tiles


@dataclass
class RowProblem:
    """One direction of one problem; names as in RowArguments. Outputs that nobody wants are None.

    scores: (B, H, L, S). first and second: aligned (``is_aligned``). The other operands: unit last stride.
    """

    device: Device
    direction: str
    scores: tuple[int, int, int, int]
    left: Tensor
    first: Tensor
    second: Tensor | None
    added: Tensor | None
    out: Tensor | None
    weights: Tensor | None
    scale: float
    bias: Tensor | None = None
    weights_grad: Tensor | None = None
    seed: Tensor | None = None
    dropout_p: float = 0.0
    pointers: dict[str, Tensor | None] = field(default_factory=dict)

    def shape(self) -> BlockShape:
        """How the rows are divided among blocks: the same for every group of keys."""
        batches, heads, queries, _ = self.scores
        shared_by = [x for x in (self.first, self.second) if x is not None]
        inner_batches, inner_heads = (
            size if all(shapes.step(x, axis) == 0 for x in shared_by) else 1
            for axis, size in enumerate((batches, heads))
        )
        groups, rows = batches * heads // (inner_batches * inner_heads), inner_batches * inner_heads * queries
        tiles = TILES[element_name(self.left.dtype)][self.direction]
        itemsize = self.left.element_size()
        tile = choose_tile(tiles, groups, rows, key_groups(self.scores[3])[0], itemsize, self.device)
        return BlockShape(tile, groups, -(-rows // tile.rows), inner_batches, inner_heads)

    @property
    def out_width(self) -> int:
        return 0 if self.second is None else self.second.shape[3]

    def launches(self) -> list[Launch]:
        """One launch where all keys fit on chip; else two for every group of keys, and the results add up."""
        shape, groups = self.shape(), range(len(key_groups(self.scores[3])))
        steps = [_WHOLE] if len(groups) == 1 else [_STATISTICS, _RESULTS]
        return [self._launch(shape, step, group) for step in steps for group in groups]

    def _launch(self, shape: BlockShape, step: int, group: int) -> Launch:
        batches, heads, queries, total_keys = self.scores
        first_key, keys = group * _MOST_KEYS, key_groups(total_keys)[group]
        itemsize = self.left.element_size()
        pass_units = shape.tile.pass_units(self.out_width, itemsize)
        tensors: dict[str, Tensor] = {}

        def operand(name: str, x: Tensor | None, keys_along: int | None = None) -> Rows:
            if x is None:
                return Rows()
            tensors[name] = x
            skipped = 0 if keys_along is None else first_key * shapes.step(x, keys_along)
            return Rows(x.data_ptr() + skipped * x.element_size(), *(shapes.step(x, axis) for axis in range(3)))

        def pointer(name: str, x: Tensor | None) -> int | None:
            if x is None:
                return None
            tensors[name] = x
            return x.data_ptr()

        threshold, keep_scale = dropout.survival(self.dropout_p)
        added = self.added
        if step == _RESULTS and group > 0:
            added = self.out  # the groups before this one
        adds_left = added is self.left and self.out is not None and step != _STATISTICS
        staying = self.left.shape[3] * itemsize if adds_left else 0
        if shape.tile.shared_bytes(itemsize, staying) > self.device.shared_limit:
            staying = 0
        added_kind = 0 if added is None else KINDS[added.dtype]
        if staying:
            added, added_kind = None, LEFT
        arguments = RowArguments(
            left=operand("left", self.left),
            first=operand("first", self.first, keys_along=2),
            second=operand("second", self.second, keys_along=2),
            added=operand("added", added),
            out=pointer("out", self.out),
            bias=operand("bias", self.bias, keys_along=3),
            bias_key=0 if self.bias is None else shapes.step(self.bias, 3),
            weights=operand("weights", self.weights),
            weights_grad=operand("weights_grad", self.weights_grad),
            seed=pointer("seed", self.seed),
            **{name: pointer(name, x) for name, x in self.pointers.items()},
            batches=batches,
            heads=heads,
            queries=queries,
            keys=keys,
            width=self.left.shape[3],
            out_width=self.out_width,
            inner_batches=shape.inner_batches,
            inner_heads=shape.inner_heads,
            tiles=shape.tiles,
            total_keys=total_keys,
            first_key=first_key,
            group=group,
            groups=len(key_groups(total_keys)),
            step=step,
            added_kind=added_kind,
            out_kind=0 if self.out is None else KINDS[self.out.dtype],
            threshold=threshold,
            keep_scale=keep_scale,
            scale=self.scale,
            left_unit=_copied_unit(self.left, shape),
            left_offset=shape.tile.left_offset(itemsize, staying),
            left_mask=-1 if staying else _STAGES - 1,
            pass_units=pass_units,
            consecutive=_consecutive(added, heads, queries, shape),
        )
        name = f"residual_attention_{self.direction}_{element_name(self.left.dtype)}_{shape.tile.name}"
        return Launch(name, shape.grid, shape.tile.shared_bytes(itemsize, staying), arguments, tensors)


def _copied_unit(x: Tensor, shape: BlockShape) -> int:
    """Bytes in which left rows can be copied past the registers, a constant distance apart: 4, or 0 for never."""
    merged = shape.inner_batches * shape.inner_heads == 1 or (
        shape.inner_heads == 1 and shapes.step(x, 0) == x.shape[2] * shapes.step(x, 2)
    )
    return 4 if merged and has_aligned_rows(x, 4) else 0


def has_aligned_rows(x: Tensor, unit: int) -> bool:
    """Whether every row begins at a multiple of ``unit`` bytes."""
    return x.data_ptr() % unit == 0 and all(shapes.step(x, axis) * x.element_size() % unit == 0 for axis in range(3))


def _consecutive(added: Tensor | None, heads: int, queries: int, shape: BlockShape) -> bool:
    """Whether the rows of a group follow one another without a gap, in the result as in what is added to it."""
    if shape.inner_batches > 1 and shape.inner_heads < heads:
        return False
    if added is None:
        return True
    width = added.shape[3]
    steps = ((0, shape.inner_batches, heads * queries), (1, shape.inner_heads, queries), (2, queries, 1))
    return all(size == 1 or shapes.step(added, axis) == rows * width for axis, size, rows in steps)


def is_aligned(x: Tensor) -> bool:
    """Whether the kernel can load keys or values from these rows: 16 bytes at a time, up to a multiple of 32."""
    itemsize = x.element_size()
    last_row = int(x.storage_offset()) + sum((x.shape[axis] - 1) * shapes.step(x, axis) for axis in range(3))
    end = last_row * itemsize + _round_up(x.shape[3] * itemsize, 32)
    return has_aligned_rows(x, 16) and end <= int(x.untyped_storage().nbytes())


def pack(x: Tensor) -> tuple[Tensor, Launch]:
    """An aligned copy of ``x`` (B, H, rows, width), of any strides but the last, and the launch that fills it."""
    batches, heads = (1 if shapes.step(x, axis) == 0 else x.shape[axis] for axis in (0, 1))
    rows, width = x.shape[2:]
    itemsize = x.element_size()
    units = 2 * -(-width * itemsize // 32)
    packed = x.new_empty((batches, heads, rows, units * 16 // itemsize))
    arguments = PackArguments(
        source=Rows(x.data_ptr(), *(shapes.step(x, axis) * itemsize for axis in range(3))),
        packed=packed.data_ptr(),
        total_rows=batches * heads * rows,
        heads=heads,
        rows=rows,
        row_bytes=width * itemsize,
        row_units=units,
    )
    grid = -(-batches * heads * rows * _round_up(units, 8) // THREADS)
    launch = Launch("pack_rows", grid, 0, arguments, {"source": x, "packed": packed})
    return packed[..., :width].expand(*x.shape[:2], -1, -1), launch


def _round_up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple
