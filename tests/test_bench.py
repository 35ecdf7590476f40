"""The benchmark's own honesty: FLOPs as counted, parity before time, ratios and tables as measured."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import bda_fused.flops  # noqa: F401, what it registers is used
from bda_fused.bench import cases, command, report, run
from bda_fused.bench.cases import RIVALS, Case, Contest
from bda_fused.zsl.output import OutputError

ROOT = Path(__file__).parents[1]
TINY = Case("tiny", 8, 6, 2, "forward+backward")
EAGER_RIVALS = tuple(name for name in RIVALS if name != "compiled")


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """A data set of five attributes."""
    monkeypatch.setitem(cases.ATTRIBUTES, "tiny", 5)


def result(seconds, flops=None):
    names = dict.fromkeys(seconds, 10)
    return run.Result(TINY, seconds, names, flops or names)


@pytest.mark.parametrize("rival", ["natural", "ours"])
def test_flops_are_those_counted(rival):
    case = Case("tiny", 8, 6, 2, "forward")
    contest = Contest.of(case, (rival,))
    with FlopCounterMode(display=False) as counter:
        contest.run(rival)
    vectors = 2 * 8 * 8 if rival == "ours" else 0  # the fold of a bias into another, which the model leaves out
    assert abs(counter.get_total_flops() - case.flops(rival)) <= 2 * vectors


def test_all_rivals_compute_the_same():
    Contest.of(TINY, tuple(RIVALS)).check()


def test_a_contestant_that_is_wrong_is_not_timed(monkeypatch):
    class Wrong(cases.SDPA):
        def forward(self, visual, attributes):
            return 1.1 * super().forward(visual, attributes)

    monkeypatch.setitem(RIVALS, "sdpa", Wrong)
    with pytest.raises(AssertionError, match="sdpa, tensor 0 of tiny .* it computes another function"):
        run.measure(TINY, rivals=EAGER_RIVALS)
    monkeypatch.setitem(RIVALS, "sdpa", cases.SDPA)
    monkeypatch.setitem(RIVALS, "ours", Wrong)
    with pytest.raises(AssertionError, match="ours, tensor 0 of tiny"):
        run.measure(TINY, rivals=EAGER_RIVALS)


def test_measure_reports_every_contestant():
    found = run.measure(TINY, rivals=EAGER_RIVALS, rounds=2)
    assert set(found.seconds) == set(found.flops) == set(found.peak_bytes) == set(EAGER_RIVALS)
    assert min(found.seconds.values()) > 0
    assert min(found.peak_bytes.values()) >= 2 * 5 * 8 * 4, "at least the result itself"


def test_expanding_the_attributes_costs_memory():
    contest = Contest.of(Case("CUB", 64, 49, 8, "forward"), ("natural", "ours"))
    assert run.peak_bytes(contest, "natural") > 2 * run.peak_bytes(contest, "ours")


def test_tables_show_the_cells_that_lose():
    results = [result({"natural": 3.0, "sdpa": 0.9, "ours": 1.0}, {"natural": 20, "sdpa": 15, "ours": 10})]
    text = report.table(results)
    assert "3.00x (2.00)" in text
    assert "**0.90x** (1.50)" in text
    summary = report.summary(results)
    assert "SDPA: 0.90x to 0.90x our time; losing cells 1 of 1; least share of the FLOP ratio 0.60" in summary


def test_results_survive_the_file(tmp_path):
    results, env = [result({"natural": 3.0, "ours": 1.0})], run.environment()
    run.write(results, tmp_path / "bench.json", env)
    assert run.read(tmp_path / "bench.json") == (results, env)
    report.plot(results, tmp_path / "bench.png", env)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench.json", "bench.png"]


def test_command_writes_table_data_and_plot(tmp_path, capsys):
    text = command.bench(
        datasets=("tiny",), dims=(8,), regions=(6,), images=(2,), rivals=("sdpa",), rounds=1, out=tmp_path / "out"
    )
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["bench.json", "bench.md", "bench.png"]
    assert (tmp_path / "out" / "bench.md").read_text() == text
    assert "backend eager, medians of 1 interleaved rounds" in text
    assert capsys.readouterr().out.count("ours") == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"datasets": ("FLO",)}, "dataset must be one of AWA2, SUN, CUB, tiny, got 'FLO'"),
        ({"datasets": ()}, "datasets must name at least one, got none"),
        ({"passes": ()}, "passes must name at least one, got none"),
        ({"passes": ("backward",)}, r"pass must be one of forward, forward\+backward, got 'backward'"),
        ({"rivals": ("flash",)}, "rival must be one of natural, sdpa, compiled, algebra, ours, got 'flash'"),
        ({"rounds": 0}, "rounds must be at least 1, got 0$"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"threads": 1025}, "threads must be at most 1024, got 1025"),
        ({"device": "meta"}, "device must be one that torch can train on here, got 'meta'"),
        ({"images": ()}, "images must name at least one, got none"),
        ({"images": (8, 0)}, "images must be at least 1, got 0$"),
        ({"images": (8, 65537)}, "images must be at most 65536, got 65537"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        command.bench(**options)


def test_without_rivals_natural_and_ours_are_measured():
    text = command.bench(datasets=("tiny",), dims=(8,), regions=(6,), images=(2,), rivals=(), rounds=1)
    assert "| case | ours, ms | natural | peak MB, ours (natural) |" in text


def test_a_directory_in_use_is_refused_before_anything_is_measured(tmp_path, monkeypatch):
    (tmp_path / "mine").write_text("x")
    monkeypatch.setattr(run, "measure_all", None)
    with pytest.raises(OutputError, match="is not empty"):
        command.bench(out=tmp_path)
    with pytest.raises(OutputError, match="out cannot be made, as .*/mine is a file"):
        command.bench(out=tmp_path / "mine" / "out")


def test_a_measurement_that_fails_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "measure_all", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        command.bench(out=tmp_path / "new" / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_pytest_benchmark_session_draws_the_same_report(tmp_path):
    chosen = "AWA2 and 350 and 49 and not 196 and not 32 and not backward"
    command_line = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "-k", chosen]
    command_line += ["-p", "no:cacheprovider", "--report", str(tmp_path / "report")]
    finished = subprocess.run(command_line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == ["bench.json", "bench.md", "bench.png"]
    text = (tmp_path / "report" / "bench.md").read_text()
    assert text.strip() in finished.stdout
    assert "medians of 7 rounds in a row" in text
    assert text.count("AWA2 C=350 HW=49 B=8 forward |") == 1


def test_cases_are_the_whole_product():
    assert len(list(cases.cases(("AWA2", "SUN", "CUB")))) == 3 * 2 * 2 * 2 * 2
    assert torch.get_num_threads() == 1
