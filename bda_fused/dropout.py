"""The dropout mask of an attention map, a function of a seed tensor.

Kernels evaluate Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) in place, so
that the mask depends on neither tiling nor backend: key = seed, counter = (col // 4, row_lo, row_hi, 0),
lane = col % 4, row = (b * H + h) * L + l. Here it is written in torch ops. On CPU tensors the eager backend draws from
torch's own generator instead, seeded by the same tensor, which is many times faster.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_WORD = 0xFFFFFFFF

# Set by the contexts of bda_fused.testing: Philox on every device, and a list that receives every seed drawn.
philox_everywhere = False
seed_log: list[Tensor] | None = None


def draw_seed(device: torch.device) -> Tensor:
    """A fresh int64 seed of shape () on ``device``, from torch's generator for it: no synchronisation."""
    seed = torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=device)
    if seed_log is not None:
        seed_log.append(seed)
    return seed


def _product(multiplier: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32 x 32 bit product, in int64 tensors, which have no unsigned 64-bit product."""
    low, high = multiplier & 0xFFFF, multiplier >> 16
    partial = low * word  # below 2**48
    upper = high * word + (partial >> 16)
    return (upper >> 16) & _WORD, ((upper << 16) | (partial & 0xFFFF)) & _WORD


def philox(seed: Tensor, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: four 32-bit words in int64 tensors, from an int64 seed and four counter words that broadcast."""
    key = [seed & _WORD, (seed >> 32) & _WORD]
    c0, c1, c2, c3 = counter
    for _ in range(_ROUNDS):
        high0, low0 = _product(_MULTIPLIERS[0], c0)
        high1, low1 = _product(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ key[0], low1, high0 ^ c3 ^ key[1], low0
        key = [(word + weyl) & _WORD for word, weyl in zip(key, _WEYL, strict=True)]
    return c0, c1, c2, c3


def philox_keep(seed: Tensor, p: float, shape: Sequence[int]) -> Tensor:
    """Boolean (..., L, S): True where an entry survives; the batch axes and L are flattened to the row index.

    An entry survives when its word, read as a fraction of 2**32, is at least ``p``.
    """
    columns = shape[-1]
    rows = torch.Size(shape[:-1]).numel()
    row = torch.arange(rows, device=seed.device)[:, None]
    group = torch.arange((columns + 3) // 4, device=seed.device)[None, :]
    words = philox(seed, (group.expand(rows, -1), row & _WORD, row >> 32, torch.zeros_like(row)))
    words_by_column = torch.stack(torch.broadcast_tensors(*words), -1).flatten(1)[:, :columns]
    return (words_by_column >= threshold(p)).view(*shape)


def threshold(p: float) -> int:
    """The smallest 32-bit word that survives dropout of probability ``p``."""
    return round(p * 2**32)


def survival(p: float) -> tuple[int, float]:
    """The smallest word that survives, and what survivors are multiplied by: 0 where none does."""
    smallest = threshold(p)
    return (smallest, 1 / (1 - p)) if smallest <= _WORD else (0, 0.0)


def mask(seed: Tensor, p: float, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """M = keep / (1 - p) of ``shape`` on the seed's device; all zeros at p = 1. The same seed gives the same mask."""
    if p == 1.0:
        return torch.zeros(*shape, dtype=dtype, device=seed.device)
    if philox_everywhere or seed.device.type != "cpu":
        return philox_keep(seed, p, shape).to(dtype).div_(1 - p)
    generator = torch.Generator().manual_seed(int(seed))
    return torch.empty(*shape, dtype=dtype).bernoulli_(1 - p, generator=generator).div_(1 - p)
