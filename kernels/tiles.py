"""The static table of tile sizes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bda_fused.kernels.launch import KIB, Target

Groups = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Tile:
    """rows: of a tile. groups: the widths of the blocks of a score row, in column groups that are computed one after
    the other. inner: columns per step of a sum over D. chunk: columns of a result at a time.
    """

    rows: int
    groups: Groups
    inner: int
    chunk: int
    warps: int
    stages: int

    @property
    def columns(self) -> int:
        """How many columns the blocks hold."""
        return sum(map(sum, self.groups))

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages}


def blocks(columns: int) -> tuple[int, ...]:
    """The widths, powers of two of at least 16 and the widest first, that hold so many columns."""
    rest = -(-columns // 16) * 16
    return tuple(1 << bit for bit in reversed(range(4, 10)) if rest & (1 << bit))


def split(columns: int, groups: int) -> Groups:
    """The blocks of ``columns`` in so many groups of like width."""
    units = -(-columns // 16)
    sizes = [units // groups + (index < units % groups) for index in range(groups)]
    return tuple(blocks(16 * size) for size in sizes)


# The longest score row that is held whole.
WHOLE = 512


def forward(target: Target, dtype: torch.dtype, columns: int) -> Tile:
    if columns > WHOLE:
        return Tile(64, ((64,),), 32, 64, 4, 2)
    return Tile(64, split(columns, 1 if columns <= 128 else 2), 32, 32, 4, 2)


def backward(target: Target, dtype: torch.dtype, columns: int) -> Tile:
    if columns > WHOLE:
        return Tile(64, ((64,),), 32, 32, 4, 2)
    return Tile(64, split(columns, 1 if columns <= 128 else 2), 32, 32, 4, 2)


@dataclass(frozen=True)
class ProductTile:
    """ms, ns: the widths of the blocks of a tile of the result. depth: of one step of the sum."""

    ms: tuple[int, ...]
    ns: tuple[int, ...]
    depth: int
    warps: int
    stages: int

    @property
    def rows(self) -> int:
        return sum(self.ms)

    @property
    def columns(self) -> int:
        return sum(self.ns)

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages}


def product(rows: int | None, width: int) -> ProductTile:
    return ProductTile((64,), (64,), 32, 4, 2)


def pitch(columns: int) -> int:
    """The row pitch of scratch in which all blocks of a score row have room."""
    return -(-columns // 16) * 16
