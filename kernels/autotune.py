"""BDA_FUSED_AUTOTUNE=1: a launch with steps and stages next to those of the table, whichever is fastest on this GPU.

Off by default: the table is the same on every run, and so are the bits of the results, while timings differ.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

import triton
from bda_fused.kernels.launch import Launch, Target

ENABLED = os.environ.get("BDA_FUSED_AUTOTUNE") == "1"

# The lengths of the steps of sums, and of the chunks of a result: they may change where no grid rests on them.
_STEPS = ("BLOCK_DK", "BLOCK_DV", "BLOCK_K")
_fastest: dict[str, Launch] = {}


def candidates(launch: Launch, target: Target) -> list[Launch]:
    """The launch itself, and its neighbours that fit into the shared memory of ``target``."""
    found = [launch, replace(launch, options=launch.options | {"num_stages": launch.options["num_stages"] + 1})]
    for name in (name for name in _STEPS if name in launch.constants and name not in launch.fixed):
        step = launch.constants[name]
        sizes = [size for size in (step // 2, step * 2) if 16 <= size <= 128]
        found += [replace(launch, constants=launch.constants | {name: size}) for size in sizes]
    return [each for each in found if each.compile(target).metadata.shared <= target.shared_memory]


def fastest(launch: Launch, target: Target, time: Callable[..., float] = triton.testing.do_bench) -> Launch:
    """The fastest candidate, timed at the first launch of its kind; later ones take the same."""
    key = repr((launch.kernel.__name__, launch.specialization(), launch.options, launch.grid, target))
    if key not in _fastest:
        _fastest[key] = min(candidates(launch, target), key=lambda each: time(each.start))
    chosen = _fastest[key]
    return replace(launch, constants=chosen.constants, options=chosen.options)
