"""Measures cases: parity first, then interleaved rounds, medians and ratios."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bda_fused import _version, backends
from bda_fused.bench.cases import RIVALS, Case, Contest

MINIMUM_SECONDS = 0.02  # a shorter run is repeated within its round


@dataclass(frozen=True)
class Result:
    """One case: median seconds and peak bytes of one run of each contestant, beside the FLOPs of its algebra."""

    case: Case
    seconds: dict[str, float]
    peak_bytes: dict[str, int]
    flops: dict[str, int]

    def ratio(self, rival: str) -> float:
        """How many times as long as ours the rival takes."""
        return self.seconds[rival] / self.seconds["ours"]

    def flop_ratio(self, rival: str) -> float:
        """How many times as many FLOPs as ours the rival spends."""
        return self.flops[rival] / self.flops["ours"]


def measure(
    case: Case, *, rivals: tuple[str, ...] = tuple(RIVALS), rounds: int = 7, device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Result:  # fmt: skip
    """Every contestant in turn, round after round; AssertionError where one is not right.

    Args:
        rivals: names of RIVALS, "natural" and "ours" among them.
        rounds: at least 1; the median over them is reported.
    """
    contest = Contest.of(case, rivals, device=device, dtype=dtype)
    contest.check()
    repeats = {name: max(1, round(MINIMUM_SECONDS / max(seconds(contest, name, 1), 1e-6))) for name in contest.models}
    times: dict[str, list[float]] = {name: [] for name in contest.models}
    for _ in range(rounds):
        for name in contest.models:
            times[name].append(seconds(contest, name, repeats[name]))
    return Result(
        case,
        {name: statistics.median(values) for name, values in times.items()},
        {name: peak_bytes(contest, name) for name in contest.models},
        {name: case.flops(name) for name in contest.models},
    )


def measure_all(
    chosen: Iterable[Case], *, done: Callable[[Result], None] = lambda result: None, **options: Any
) -> list[Result]:
    """``measure`` for each case; ``done`` hears of every result as it comes."""
    results = []
    for case in chosen:
        results.append(measure(case, **options))
        torch._dynamo.reset()
        done(results[-1])
    return results


def seconds(contest: Contest, name: str, repeats: int) -> float:
    """Of one run: CUDA events where there is a GPU, else the clock."""
    if contest.visual.is_cuda:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            contest.run(name)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / repeats
    begin = time.perf_counter()
    for _ in range(repeats):
        contest.run(name)
    return (time.perf_counter() - begin) / repeats


def peak_bytes(contest: Contest, name: str) -> int:
    """The most memory that one run holds at a time, beside parameters and inputs."""
    if contest.visual.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        contest.run(name)
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # else the profiler's own log lands between the lines of a table
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        contest.run(name)
    assert profiler.profiler is not None
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def environment(device: str = "cpu") -> dict[str, Any]:
    """The machine and the versions that a number belongs to."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        processor = names[0] if names else processor
    return {
        "processor": processor,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if device.startswith("cuda") else None,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "bda_fused": _version.__version__,
        "backend": _backend(device),
    }


def _backend(device: str) -> str | None:
    rows = torch.zeros(1, 1, device=device)
    return backends.explain(rows, rows, rows).backend


def write(results: list[Result], path: Path, env: dict[str, Any]) -> None:
    """All results as JSON, written beside and renamed."""
    rows = [
        asdict(result.case) | {"seconds": result.seconds, "peak_bytes": result.peak_bytes, "flops": result.flops}
        for result in results
    ]
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps({"environment": env, "results": rows}, indent=1) + "\n")
    partial.replace(path)


def read(path: Path) -> tuple[list[Result], dict[str, Any]]:
    """The inverse of ``write``."""
    content = json.loads(path.read_text())
    results = []
    for row in content["results"]:
        measured = {key: row.pop(key) for key in ("seconds", "peak_bytes", "flops")}
        results.append(Result(Case(**row), **measured))
    return results, content["environment"]
