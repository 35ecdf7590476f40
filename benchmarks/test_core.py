"""SSA + VSA under pytest-benchmark: pytest benchmarks --benchmark-only [--report DIR], a group for each shape and pass.

Each case is checked before it is timed; extra_info says on what machine, by which backend and with what peak memory.
"""

import pytest
import torch

from bda_fused.bench import run
from bda_fused.bench.cases import RIVALS, Case, Contest, cases

CASES = {case.name: case for case in cases()}


@pytest.fixture(scope="module")
def contest_of(request):
    """Contests by case, each made and checked once; the last one only is kept."""
    made: dict[Case, Contest] = {}

    def contest(case: Case) -> Contest:
        if case not in made:
            made.clear()
            torch._dynamo.reset()
            made[case] = Contest.of(case, tuple(RIVALS), device=request.config.measured.device)
            made[case].check()
        return made[case]

    return contest


@pytest.mark.parametrize("rival", RIVALS)
@pytest.mark.parametrize("name", CASES)
def test_core(name, rival, contest_of, measured, benchmark):
    case = CASES[name]
    contest = contest_of(case)
    benchmark.group = case.name
    peak_bytes, device_seconds = run.peak_bytes(contest, rival), run.seconds(contest, rival, 3)
    benchmark.extra_info |= run.environment(measured.device) | {
        "flops": case.flops(rival),
        "peak_bytes": peak_bytes,
        "device_seconds": device_seconds,
    }

    def timed() -> None:
        contest.run(rival)
        if measured.device == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(timed, rounds=measured.rounds, warmup_rounds=1)
    measured.add(case, rival, benchmark.stats.stats.median if measured.device == "cpu" else device_seconds, peak_bytes)
