"""`bda-fused bench`: which cases to measure, and where tables and plots go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from bda_fused.bench import report, run
from bda_fused.bench.cases import ATTRIBUTES, DIMS, IMAGES, PASSES, REGIONS, RIVALS, cases
from bda_fused.zsl.output import check_output, new_directory

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
        ValueError: an unknown name, a number below 1, or an output directory that is in use.
    """
    for name, given, known in (("dataset", datasets, ATTRIBUTES), ("pass", passes, PASSES), ("rival", rivals, RIVALS)):
        for value in given:
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    numbers = {"dims": dims, "regions": regions, "images": images, "rounds": (rounds,), "threads": (threads,)}
    for name, values in numbers.items():
        if not values or min(values) < 1:
            raise ValueError(f"{name} must be at least 1, got {values}")
    if out is not None:
        check_output(out, overwrite=overwrite, marker=DATA)
    contestants = tuple(name for name in RIVALS if name in {*rivals, "natural", "ours"})
    torch.set_num_threads(threads)
    env = run.environment(device)
    results = run.measure_all(
        cases(datasets, dims, regions, images, passes),
        rivals=contestants,
        rounds=rounds,
        device=device,
        done=lambda result: print(report.line(result), flush=True),
    )
    return publish(results, env, rounds=f"{rounds} interleaved rounds", out=out, overwrite=overwrite)


def publish(
    results: list[run.Result], env: dict[str, Any], *, rounds: str, out: Path | None = None, overwrite: bool = False
) -> str:
    """The table with its heading and summary; with ``out`` written there beside the data and a plot.

    Raises:
        ValueError: an output directory that is in use.
    """
    text = f"{report.heading(env, rounds)}\n\n{report.table(results)}\n\n{report.summary(results)}\n"
    if out is not None:
        with new_directory(out, overwrite=overwrite, marker=DATA) as folder:
            run.write(results, folder / DATA, env)
            (folder / "bench.md").write_text(text)
            report.plot(results, folder / "bench.png", env)
    return text
