"""The table of a pytest-benchmark session, by the report that `bda-fused bench` uses; --report DIR keeps it."""

from pathlib import Path

import pytest
import torch

from bda_fused.bench import command, run
from bda_fused.bench.cases import RIVALS, Case
from bda_fused.zsl.output import check_output


def pytest_addoption(parser):
    parser.addoption("--report", type=Path, metavar="DIR", help="write table, data and plot of the benchmarks to DIR")


class Measured:
    """What the session has measured of every case: (seconds, peak bytes) of each contestant."""

    rounds = 7
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def __init__(self):
        self.cases: dict[Case, dict[str, tuple[float, int]]] = {}

    def add(self, case, rival, seconds, peak_bytes):
        self.cases.setdefault(case, {})[rival] = seconds, peak_bytes

    def results(self):
        """The cases of which every contestant was measured."""
        return [
            run.Result(
                case,
                {name: seconds for name, (seconds, _) in found.items()},
                {name: peak for name, (_, peak) in found.items()},
                {name: case.flops(name) for name in found},
            )
            for case, found in self.cases.items()
            if found.keys() == RIVALS.keys()
        ]


def pytest_configure(config):
    config.measured = Measured()
    if config.getoption("report"):
        try:
            check_output(config.getoption("report"), overwrite=False, marker=command.DATA)
        except ValueError as error:
            raise pytest.UsageError(str(error)) from None


@pytest.fixture
def measured(request):
    return request.config.measured


def pytest_terminal_summary(terminalreporter, config):
    results = config.measured.results()
    if results:
        env = run.environment(Measured.device)
        terminalreporter.section("time of every rival over ours")
        with command.output(config.getoption("report")) as folder:
            text = command.publish(results, env, rounds=f"{Measured.rounds} rounds in a row", folder=folder)
        terminalreporter.write_line(text)
