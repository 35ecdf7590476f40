"""SSA + VSA under pytest-benchmark: pytest benchmarks --benchmark-only, one group for each shape and pass.

Each case is checked before it is timed; extra_info says on what machine, by which backend and with what peak memory.
"""

import pytest
import torch

from bda_fused.bench import run
from bda_fused.bench.cases import RIVALS, Case, Contest, cases

CASES = {case.name: case for case in cases()}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def contest_of():
    """Contests by case, each made and checked once; the last one only is kept."""
    made: dict[Case, Contest] = {}

    def contest(case: Case) -> Contest:
        if case not in made:
            made.clear()
            torch._dynamo.reset()
            made[case] = Contest.of(case, tuple(RIVALS), device=DEVICE)
            made[case].check()
        return made[case]

    return contest


@pytest.mark.parametrize("rival", RIVALS)
@pytest.mark.parametrize("name", CASES)
def test_core(name, rival, contest_of, benchmark):
    case = CASES[name]
    contest = contest_of(case)
    benchmark.group = case.name
    benchmark.extra_info |= run.environment(DEVICE) | {
        "flops": case.flops(rival),
        "peak_bytes": run.peak_bytes(contest, rival),
        "device_seconds": run.seconds(contest, rival, 3),
    }

    def timed() -> None:
        contest.run(rival)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(timed, rounds=7, warmup_rounds=1)
