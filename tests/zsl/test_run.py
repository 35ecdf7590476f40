"""A short training run from end to end: it learns, repeats itself, and is read back as it was written."""

import json

import numpy as np
import pytest
import torch

from bda_fused.zsl import run, training
from bda_fused.zsl.data import make_two_digits
from bda_fused.zsl.explain import choose_images, explain
from bda_fused.zsl.models import build_model
from bda_fused.zsl.settings import make_settings
from bda_fused.zsl.training import DivergedError, evaluate, train

SHORT = {"epochs": 1, "batch_size": 400}


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "short"
    metrics = run.train_run(make_settings(SHORT), path, progress=False)
    return path, metrics


def test_directory_holds_model_configuration_metrics_log_and_pictures(short_run):
    path, metrics = short_run
    names = {file.name for file in path.iterdir()}
    assert {"model.safetensors", "config.json", "metrics.json", "train.log"} < names
    pictures = [file for file in path.iterdir() if file.suffix == ".png"]
    assert len(pictures) >= 3
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in pictures)
    stored = json.loads((path / "metrics.json").read_text())
    assert stored == metrics
    assert {"T1", "U", "S", "H", "wall_seconds", "seed", "backend"} <= stored.keys()
    assert stored["backend"] == "eager"
    assert len((path / "train.log").read_text().splitlines()) == 1 + SHORT["epochs"]


def test_the_same_seed_gives_the_same_model_and_metrics(short_run, tmp_path):
    path, metrics = short_run
    again = run.train_run(make_settings(SHORT), tmp_path / "again", progress=False)
    assert {name: again[name] for name in ("T1", "U", "S", "H")} == {
        name: metrics[name] for name in ("T1", "U", "S", "H")
    }
    assert (path / "model.safetensors").read_bytes() == (tmp_path / "again" / "model.safetensors").read_bytes()


def test_another_seed_gives_another_model(short_run, tmp_path):
    run.train_run(make_settings(SHORT | {"seed": 1}), tmp_path / "other", progress=False)
    assert (short_run[0] / "model.safetensors").read_bytes() != (tmp_path / "other" / "model.safetensors").read_bytes()


def test_a_run_is_read_back_as_it_was(short_run):
    path, metrics = short_run
    loaded = run.load_run(path)
    assert vars(evaluate(loaded.model, loaded.dataset)) == {name: metrics[name] for name in ("T1", "U", "S", "H")}


def test_explanations_hold_maps_of_the_chosen_images(short_run, tmp_path):
    loaded = run.load_run(short_run[0])
    chosen = choose_images(loaded.dataset, indices=[0, 3], classes=["07"])
    run.explain_run(loaded, chosen, tmp_path / "maps")
    arrays = np.load(tmp_path / "maps" / "maps.npz")
    assert arrays["vsa_map"].shape == (3, 20, 32)
    assert arrays["ssa_map"].shape == (3, 32, 20)
    for name in ("vsa_map", "ssa_map"):
        np.testing.assert_allclose(arrays[name].sum(-1), 1, rtol=1e-5)
    assert arrays["labels"][2] == 7
    assert (tmp_path / "maps" / "maps.png").read_bytes().startswith(b"\x89PNG")


def test_a_model_without_ssa_has_no_ssa_map():
    dataset = make_two_digits(0)
    model = build_model(make_settings({"ssa": False}), dataset)
    assert explain(model, dataset, choose_images(dataset)).ssa_map is None


def test_the_full_released_stack_trains(tmp_path):
    metrics = run.train_run(make_settings(SHORT | {"model": "full"}), tmp_path / "run", progress=False)
    assert metrics["model"] == "full"
    config = run.load_run(tmp_path / "run").model.config
    assert (config.use_rsa, config.geometry, config.residual, config.attribute_attention) == (
        True,
        True,
        "double",
        True,
    )


def test_nothing_stays_of_a_run_that_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "draw_pictures", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.train_run(make_settings(SHORT), tmp_path / "run", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_training_leaves_torchs_generator_as_it_was():
    dataset = make_two_digits(0)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    settings = make_settings(SHORT | {"bda": {"dropout": 0.1}})
    train(build_model(settings, dataset), dataset, settings, progress=False)
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_batch_larger_than_the_training_split_is_refused():
    dataset = make_two_digits(0, validation=True)
    settings = make_settings({"batch_size": 3000})
    with pytest.raises(ValueError, match="batch_size must be at most the 2400 training images, got 3000"):
        train(build_model(settings, dataset), dataset, settings, progress=False)


def test_class_scores_that_are_not_finite_after_an_epoch_are_divergence(monkeypatch):
    monkeypatch.setattr(training, "class_scores", lambda _, split: torch.full((len(split), 100), torch.nan))
    dataset = make_two_digits(0)
    settings = make_settings(SHORT)
    with pytest.raises(
        DivergedError, match="training diverged in epoch 1: class scores must be finite, got inf or nan"
    ):
        train(build_model(settings, dataset), dataset, settings, progress=False)


def test_training_learns(tmp_path):
    """The demo's own setting, shortened: beyond chance (5 %) on classes never seen, and on all classes."""
    metrics = run.train_run(make_settings({"epochs": 5, "batch_size": 64}), tmp_path / "run", progress=False)
    assert metrics["T1"] > 60
    assert metrics["H"] > 60
