"""The command: refusals in one sentence with exit code 2, and nothing written."""

import json
import os
import shutil
import signal
import subprocess
import sys

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

from bda_fused import cli


def command(*arguments, capsys):
    """Runs `bda-fused` in this process; returns exit code, stdout and stderr."""
    sys.argv = ["bda-fused", *map(str, arguments)]
    try:
        cli.main()
        code = 0
    except SystemExit as error:
        code = error.code or 0
    return code, *capsys.readouterr()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    from bda_fused.zsl.run import train_run
    from bda_fused.zsl.settings import make_settings

    path = tmp_path_factory.mktemp("cli") / "run"
    train_run(make_settings({"epochs": 1, "batch_size": 400}), path, progress=False)
    return path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train",), "--out"),
        (("train", "--out", "OUT", "--epochs", "many"), "--epochs"),
        (("train", "--out", "OUT", "--epochs", "0"), "epochs must be at least 1, got 0"),
        (("train", "--out", "OUT", "--epochs", "1000001"), "epochs must be at most 1000000, got 1000001"),
        (("train", "--out", "OUT", "--lr", "-1"), "lr must lie between 0 and 1, got -1.0"),
        (("train", "--out", "OUT", "--seed", "-3"), "seed must be at least 0, got -3"),
        (
            ("train", "--out", "OUT", "--seed", "99999999999999999999"),
            "seed must be at most 9223372036854775807, got 9",
        ),
        (("train", "--out", "OUT", "--batch-size", "3201"), "batch_size must be at most the 3200 training images"),
        (
            ("train", "--out", "OUT", "--validation", "--batch-size", "2401"),
            "batch_size must be at most the 2400 training images, got 2401",
        ),
        (("train", "--out", "OUT", "--threads", "100000"), "threads must be at most 1024, got 100000"),
        (("train", "--out", "OUT", "--model", "huge"), "huge"),
        (("train", "--out", "OUT", "--order", "both"), "both"),
        (("train", "--out", "OUT", "--backend", "cudnn"), "backend must be one of auto, cuda, triton, cpu, eager"),
        (
            ("train", "--out", "OUT", "--backend", "triton"),
            "backend 'triton' cannot run here: the triton backend takes CUDA",
        ),
        *(
            ((*work, "--device", device), f"device must be one that torch can train on here, got '{device}'")
            for work in (("train", "--out", "OUT"), ("bench", "--out", "OUT"))
            for device in ("tpu", "meta", "hpu", "cuda:99")
        ),
        (("train", "--out", "OUT", "--config", "absent.json"), "absent.json"),
        (("train", "--out", "OUT", "--frobnicate"), "--frobnicate"),
        (("eval", "absent"), "there is no run directory absent"),
        (("explain", "absent"), "there is no run directory absent"),
        (("bench", "--datasets", "FLO"), "dataset must be one of AWA2, SUN, CUB, got 'FLO'"),
        (("bench", "--threads", "100000"), "threads must be at most 1024, got 100000"),
        *(
            (("bench", f"--{option}", ","), f"--{option} must name at least one, got ','")
            for option in ("datasets", "dims", "regions", "images", "passes")
        ),
        (("bench", "--rounds", "0"), "rounds must be at least 1, got 0\n"),
        (("bench", "--images", "100000000", "--dims", "100000"), "dims must be at most 65536, got 100000"),
        (("bench", "--dims", "wide"), "--dims must be whole numbers separated by commas, got 'wide'"),
        (("dance",), "dance"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_refusals(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    code, _, stderr = command(*(out if argument == "OUT" else argument for argument in arguments), capsys=capsys)
    assert code == 2
    assert message in stderr
    assert stderr.startswith("bda-fused: ")
    assert stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == [], "nothing is written"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"epochs": "ten"}', "epochs must be an integer"),
        ('{"ssa": "False"}', "ssa must be true or false"),
        ('{"seed": 99999999999999999999}', "seed must be at most 9223372036854775807"),
        ('{"training": [1]}', "training must hold a mapping of settings, got [1]"),
        ('{"bda": {"stem_channels": 5}}', "stem_channels must be 3 integers, got 5"),
        ('{"speed": 1}', "there is no setting 'speed'"),
        ('{"bda": {"dropout": 3}}', "dropout must be in [0, 1], got 3"),
        ('{"bda": {"dim": 99999999}}', "dim must be at most 65536, got 99999999"),
        ('{"bda": {"ffn_dim": 99999999999999999999999}}', "ffn_dim must be at most 65536, got 99999999999999999999999"),
        ('{"bda": {"fsqrt": 1' + 400 * "0" + "}}", "fsqrt must be finite, got 1000"),
        ("[1, 2]", "mapping"),
        (100_000 * "[", "config.json is not valid JSON: maximum recursion depth exceeded"),
        ("{", "not"),
    ],
    ids=lambda text: text[:60],
)
def test_configuration_files_are_refused(content, message, tmp_path, capsys):
    (tmp_path / "config.json").write_text(content)
    code, _, stderr = command("train", "--out", tmp_path / "out", "--config", tmp_path / "config.json", capsys=capsys)
    assert code == 2
    assert message in stderr
    assert stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_yaml_file_that_is_nested_too_deeply_is_refused(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(100_000 * "[")
    code, _, stderr = command("train", "--out", tmp_path / "out", "--config", tmp_path / "config.yaml", capsys=capsys)
    assert code == 2
    assert "config.yaml is not valid YAML: maximum recursion depth exceeded" in stderr
    assert stderr.count("\n") == 1


def test_a_directory_in_use_is_refused(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("precious")
    code, _, stderr = command("train", "--out", tmp_path, capsys=capsys)
    assert code == 2
    assert "is not empty" in stderr
    code, _, stderr = command("train", "--out", tmp_path, "--overwrite", capsys=capsys)
    assert code == 2
    assert "--overwrite leaves it alone" in stderr
    assert (tmp_path / "mine.txt").read_text() == "precious"


@pytest.mark.parametrize("parent", ["file", "/proc"])
def test_an_output_that_cannot_be_made_is_refused_before_the_work(parent, trained, tmp_path, monkeypatch, capsys):
    """In a file, which a look at the path tells, and where only the system can say so."""
    from bda_fused.bench import run as bench
    from bda_fused.zsl import run

    (tmp_path / "file").write_text("")
    out = tmp_path / parent / "new" / "out"
    for module, work in ((run, "train"), (run, "explain"), (bench, "measure_all")):
        monkeypatch.setattr(module, work, lambda *_, **__: pytest.fail("it has begun to work"))
    for arguments in (("train",), ("explain", trained), ("bench",)):
        code, _, stderr = command(*arguments, "--out", out, capsys=capsys)
        assert code == 2
        assert stderr.startswith(f"bda-fused: {out} cannot be made")
        assert stderr.count("\n") == 1


def test_eval_repeats_the_metrics_and_explain_writes_maps(trained, tmp_path, capsys):
    code, stdout, _ = command("eval", trained, capsys=capsys)
    assert code == 0
    assert "equal to the metrics stored" in stdout
    code, stdout, _ = command("explain", trained, "--images", "0,5", "--out", tmp_path / "maps", capsys=capsys)
    assert code == 0
    assert sorted(path.name for path in (tmp_path / "maps").iterdir()) == ["maps.npz", "maps.png"]


def test_eval_notices_metrics_of_another_model(trained, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    metrics = json.loads((copy / "metrics.json").read_text())
    (copy / "metrics.json").write_text(json.dumps(metrics | {"T1": metrics["T1"] + 1}))
    code, _, stderr = command("eval", copy, capsys=capsys)
    assert code == 1
    assert "says otherwise" in stderr


def edit(run, section, **values):
    """Change entries of a run's config.json."""
    config = json.loads((run / "config.json").read_text())
    config[section] |= values
    (run / "config.json").write_text(json.dumps(config))


def make_infinite(run):
    """Change a weight of a run's model."""
    tensors = load_file(run / "model.safetensors")
    tensors["sven.readout"][0] = float("inf")
    save_file(tensors, run / "model.safetensors")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: (run / "model.safetensors").unlink(), "there is no checkpoint"),
        (lambda run: (run / "model.safetensors").write_bytes(b"nonsense"), "is not a safetensors file"),
        (make_infinite, "class scores must be finite, got inf or nan"),
        (lambda run: (run / "metrics.json").unlink(), "it holds no metrics.json"),
        (lambda run: (run / "config.json").write_text("{"), "is not valid JSON"),
        (lambda run: (run / "config.json").write_text(100_000 * "["), "is not valid JSON: maximum recursion depth"),
        (lambda run: (run / "config.json").write_text("{}"), "must hold the entries training and model, got none"),
        (lambda run: edit(run, "model", dim=32), "its configuration asks for"),
        (
            lambda run: edit(run, "model", num_classes=80),
            r"class_attributes must be (num_classes, num_attributes) = (80, 20)",
        ),
        (lambda run: edit(run, "training", epochs=0), "config.json: epochs must be at least 1, got 0"),
        (lambda run: edit(run, "model", grid=None), "config.json: grid must be 2 integers, got None"),
        (lambda run: edit(run, "model", depth=2), "config.json: unknown field 'depth'"),
    ],
    ids=[
        "no weights",
        "other file",
        "infinite weights",
        "no metrics",
        "broken configuration",
        "nested configuration",
        "empty configuration",
        "other dims",
        "other classes",
        "other settings",
        "no grid",
        "other model",
    ],
)
def test_a_spoiled_run_is_refused_in_one_sentence(spoil, message, trained, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    spoil(copy)
    code, _, stderr = command("eval", copy, capsys=capsys)
    assert code == 2
    assert message in stderr
    assert stderr.count("\n") == 1


def test_a_wrong_option_is_not_blamed_on_the_run(trained, capsys):
    code, _, stderr = command("eval", trained, "--threads", "-3", capsys=capsys)
    assert code == 2
    assert stderr == "bda-fused: threads must be at least 1, got -3\n"


@pytest.mark.parametrize(
    ("option", "value"),
    [("--images", "5000"), ("--images", "one"), ("--images", ","), ("--classes", "123"), ("--classes", ",")],
)
def test_explain_refuses_images_that_are_not_there(option, value, trained, tmp_path, capsys):
    code, _, stderr = command("explain", trained, option, value, "--out", tmp_path / "maps", capsys=capsys)
    assert code == 2
    assert value in stderr
    assert stderr.count("\n") == 1
    assert not (tmp_path / "maps").exists()


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_training_that_is_stopped_leaves_nothing(number, code, word, tmp_path, monkeypatch, capsys, request):
    from bda_fused.zsl import run

    def stop(*_, **__):
        assert list(tmp_path.rglob(".out.*.partial"))
        os.kill(os.getpid(), number)

    monkeypatch.setattr(run, "train", stop)
    # Python's own: a job in the background inherits that SIGINT is ignored.
    before = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    inherited = signal.signal(number, before)
    request.addfinalizer(lambda: signal.signal(number, inherited))
    found, _, stderr = command("train", "--out", tmp_path / "new" / "out", capsys=capsys)
    assert found == code
    assert stderr == f"bda-fused: {word}, nothing was written\n"
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(number) == before


def test_training_that_diverges_fails_in_one_sentence(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"epochs": 1, "bda": {"lambda_cal": 1e300}}')
    out = tmp_path / "new" / "out"
    code, _, stderr = command("train", "--out", out, "--config", tmp_path / "config.json", capsys=capsys)
    assert code == 1
    assert "bda-fused: training diverged in epoch 1: losses must be finite, got total inf, sce " in stderr
    assert "Traceback" not in stderr
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    ("allocate", "size"),
    [
        (lambda: torch.empty(2**60, dtype=torch.uint8), "another 1152921504606846976 bytes"),
        (lambda: numpy.empty(2**60, numpy.uint8), "another 1.00 EiB"),
        (lambda: bytearray(2**60), "this"),
    ],
    ids=["torch", "numpy", "python"],
)
def test_work_that_the_memory_does_not_hold_fails_in_one_sentence(allocate, size, tmp_path, monkeypatch, capsys):
    from bda_fused.bench import run

    monkeypatch.setattr(run, "measure_all", lambda *_, **__: allocate())
    code, _, stderr = command("bench", "--out", tmp_path / "out", capsys=capsys)
    assert code == 1
    assert stderr == f"bda-fused: there is not enough memory for {size}\n"
    assert list(tmp_path.iterdir()) == []


def test_a_defect_keeps_its_traceback(tmp_path, monkeypatch, capsys):
    from bda_fused.bench import run

    def fail(*_, **__):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(run, "measure_all", fail)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        command("bench", "--out", tmp_path / "out", capsys=capsys)


def test_the_configuration_of_a_run_repeats_it(trained, tmp_path, capsys):
    code, *_ = command("train", "--out", tmp_path / "again", "--config", trained / "config.json", capsys=capsys)
    assert code == 0
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()


def test_a_missing_module_of_the_extra_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "bda_fused.zsl.run", None)
    monkeypatch.delitem(sys.modules, "bda_fused.zsl.run")
    monkeypatch.setitem(sys.modules, "sklearn", None)
    code, _, stderr = command("train", "--out", tmp_path / "out", capsys=capsys)
    assert code == 2
    assert stderr == "bda-fused: the module sklearn is missing; install the [zsl] extra: pip install 'bda_fused[zsl]'\n"


def test_importing_the_command_loads_nothing_heavy():
    code = (
        "import sys, bda_fused.cli; print(*sorted({'torch', 'sklearn', 'matplotlib', 'triton'} & sys.modules.keys()))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "sklearn" not in result.stdout
    assert "matplotlib" not in result.stdout
    assert "triton" not in result.stdout


def test_info_and_version(capsys):
    code, stdout, _ = command("info", capsys=capsys)
    assert code == 0
    assert "eager" in stdout
    code, stdout, _ = command("--version", capsys=capsys)
    assert code == 0
    assert "0.1.0" in stdout


def test_without_the_extra_the_command_says_how_to_install_it():
    code = "import sys; sys.modules['typer'] = None; import bda_fused.cli"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 2
    assert "install the [zsl] extra: pip install 'bda_fused[zsl]'" in result.stderr
    assert "Traceback" not in result.stderr
