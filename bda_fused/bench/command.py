"""`bda-fused bench`: which cases to measure, and where tables and plots go."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from bda_fused.bench import report, run
from bda_fused.bench.cases import ATTRIBUTES, DIMS, IMAGES, PASSES, REGIONS, RIVALS, cases
from bda_fused.config import MAX_SIZE
from bda_fused.zsl.models import check_device
from bda_fused.zsl.output import new_directory
from bda_fused.zsl.settings import check_integer, check_threads

DATA = "bench.json"


def bench(
    *,
    datasets: tuple[str, ...] = tuple(ATTRIBUTES),
    dims: tuple[int, ...] = DIMS,
    regions: tuple[int, ...] = REGIONS,
    images: tuple[int, ...] = IMAGES,
    passes: tuple[str, ...] = PASSES,
    rivals: tuple[str, ...] = tuple(RIVALS),
    rounds: int = 7,
    threads: int = 1,
    device: str = "cpu",
    out: Path | None = None,
    overwrite: bool = False,
) -> str:
    """Measure the chosen cases and return their table; with ``out`` write it there with the data and a plot.

    Raises:
        OutputError: the output directory is refused, before anything is measured.
        TypeError: a number that is no integer.
        ValueError: an unknown name, a number out of range, or a device that torch cannot train on here.
    """
    numbers = {"dims": dims, "regions": regions, "images": images}
    for name, some in {"datasets": datasets, "passes": passes, **numbers}.items():
        if not some:
            raise ValueError(f"{name} must name at least one, got none")
    for name, given, known in (("dataset", datasets, ATTRIBUTES), ("pass", passes, PASSES), ("rival", rivals, RIVALS)):
        for value in given:
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    for name, values in {**numbers, "rounds": (rounds,)}.items():
        for number in values:
            check_integer(name, number, 1, MAX_SIZE)
    check_threads(threads)
    check_device(device)
    contestants = tuple(name for name in RIVALS if name in {*rivals, "natural", "ours"})
    torch.set_num_threads(threads)
    env = run.environment(device)
    with output(out, overwrite=overwrite) as folder:
        results = run.measure_all(
            cases(datasets, dims, regions, images, passes),
            rivals=contestants,
            rounds=rounds,
            device=device,
            done=lambda result: print(report.line(result), flush=True),
        )
        return publish(results, env, rounds=f"{rounds} interleaved rounds", folder=folder)


def output(out: Path | None, *, overwrite: bool = False) -> AbstractContextManager[Path | None]:
    """The directory to write into on the way to ``out``; None without one. OutputError as ``new_directory`` says."""
    return nullcontext() if out is None else new_directory(out, overwrite=overwrite, marker=DATA)


def publish(results: list[run.Result], env: dict[str, Any], *, rounds: str, folder: Path | None = None) -> str:
    """The table with its heading and summary; with ``folder`` written there beside the data and a plot."""
    text = f"{report.heading(env, rounds)}\n\n{report.table(results)}\n\n{report.summary(results)}\n"
    if folder is not None:
        run.write(results, folder / DATA, env)
        (folder / "bench.md").write_text(text)
        report.plot(results, folder / "bench.png", env)
    return text
