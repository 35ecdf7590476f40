"""A training run on disk: made by `train_run`, read back by `load_run`.

A run directory holds model.safetensors, config.json, metrics.json, train.log and pictures. It appears whole or not at
all.
"""

from __future__ import annotations

import json
import platform
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import sklearn
import torch

import bda_fused
from bda_fused import backends
from bda_fused.config import BDAConfig
from bda_fused.modules import BDA
from bda_fused.zsl import pictures
from bda_fused.zsl.checkpoint import load_weights, save_weights
from bda_fused.zsl.data import Split, TwoDigits, make_two_digits
from bda_fused.zsl.explain import DEFAULT_IMAGES, explain, mass_in_own_half, spread
from bda_fused.zsl.models import build_model, running_backend
from bda_fused.zsl.output import new_directory
from bda_fused.zsl.settings import Settings, make_settings, read_json
from bda_fused.zsl.training import LOSS_NAMES, EpochRecord, train

WEIGHTS, CONFIG, METRICS, LOG = "model.safetensors", "config.json", "metrics.json", "train.log"
MAPS = "maps.npz"


@dataclass(frozen=True)
class Run:
    """A trained model, the set it was trained on, and what was measured.

    Attributes:
        settings: what the run was told.
        dataset: drawn from the seed of the settings.
        model: the trained model, on the device of the settings.
        metrics: the content of metrics.json.
    """

    settings: Settings
    dataset: TwoDigits
    model: BDA
    metrics: dict[str, Any]


def train_run(settings: Settings, path: Path, *, overwrite: bool = False, progress: bool = True) -> dict[str, Any]:
    """Train, measure and draw; write everything to `path`.

    Returns:
        The content of metrics.json: T1, U, S and H in percent, `attention_in_own_half` in percent (see
        `mass_in_own_half`), `wall_seconds` from drawing the data to the last picture, `train_seconds` of it in the
        training loop, the settings, the thread count that ran and the versions of what it ran on.

    Raises:
        OutputError: the directory is refused, before any work is done.
        ValueError: the device or the backend is refused, before anything is written.
        DivergedError: the settings lead to numbers that are not finite.
    """
    start = time.perf_counter()
    backend = running_backend(settings)
    with (
        backends.use(backend),
        new_directory(path, overwrite=overwrite, marker=METRICS) as directory,
    ):
        dataset, model = _prepare(settings, None)
        _write_json(directory / CONFIG, {"training": asdict(settings), "model": model.config.to_dict()})
        with (directory / LOG).open("w") as log:
            print(log_header(), file=log)
            history = train(
                model,
                dataset,
                settings,
                on_epoch=lambda record: print(log_line(record), file=log, flush=True),
                progress=progress,
            )
        save_weights(model, directory / WEIGHTS)
        in_own_half = draw_pictures(model, dataset, history, directory)
        metrics = {
            **asdict(history[-1].metrics),
            "attention_in_own_half": in_own_half,
            "wall_seconds": round(time.perf_counter() - start, 2),
            "train_seconds": round(history[-1].seconds, 2),
            **asdict(settings),
            "backend": backend,
            "threads": torch.get_num_threads(),
            "versions": {
                "bda_fused": bda_fused.__version__,
                "torch": torch.__version__,
                "scikit-learn": sklearn.__version__,
                "python": platform.python_version(),
            },
        }
        _write_json(directory / METRICS, metrics)
    return metrics


def load_run(path: Path, **overrides: Any) -> Run:
    """Read a run back: its set is drawn again from the seed, its weights are checked against its configuration.

    Args:
        path: a directory that `train_run` wrote.
        overrides: settings that leave the model as it is: backend, device, threads.

    Raises:
        FileNotFoundError: the directory, or a file of it, is missing.
        TypeError, ValueError: a file is not what it should be, the weights do not fit the configuration, or an override
            is wrong.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"there is no run directory {path}")
    config = _read_json(path / CONFIG)
    if not (isinstance(config.get("training"), dict) and isinstance(config.get("model"), dict)):
        raise ValueError(f"{path / CONFIG} must hold the entries training and model, got {', '.join(config) or 'none'}")
    try:
        settings = make_settings(config["training"])
        model_config = BDAConfig.from_dict(config["model"])
    except (TypeError, ValueError) as error:
        raise type(error)(f"{path / CONFIG}: {error}") from error
    settings = replace(settings, **overrides)
    running_backend(settings)
    metrics = _read_json(path / METRICS)
    dataset, model = _prepare(settings, model_config)
    load_weights(model, path / WEIGHTS)
    return Run(settings, dataset, model, metrics)


def explain_run(run: Run, split: Split, path: Path, *, overwrite: bool = False) -> None:
    """Write the maps of some images to a directory: a picture, maps.png, and every array of `Explanation`, maps.npz.

    Raises:
        OutputError: the directory is refused, before any work is done.
    """
    with new_directory(path, overwrite=overwrite, marker=MAPS) as directory:
        explanation = explain(run.model, run.dataset, split)
        explanation.save(directory / MAPS)
        pictures.draw_attribute_maps(explanation, "Where attributes look", directory / "maps.png")


def draw_pictures(model: BDA, dataset: TwoDigits, history: list[EpochRecord], directory: Path) -> float:
    """Write the pictures of a run; returns `mass_in_own_half` over the test images of unseen classes, in percent."""
    pictures.draw_training_curves(history, directory / "training_curves.png")
    for kind, split in (("seen", dataset.test_seen), ("unseen", dataset.test_unseen)):
        explanation = explain(model, dataset, spread(split, DEFAULT_IMAGES))
        title = f"Where attributes look: test images of {kind} classes"
        pictures.draw_attribute_maps(explanation, title, directory / f"attention_{kind}.png")
    explanation = explain(model, dataset, dataset.test_unseen)
    title = "Where each attribute looks, averaged over the test images of unseen classes that have it"
    pictures.draw_mean_maps(explanation, title, directory / "attention_mean.png")
    return mass_in_own_half(explanation)


def log_header() -> str:
    """Column names of train.log, separated by tabs."""
    return "\t".join(["epoch", "seconds", *(f"loss_{name}" for name in LOSS_NAMES), "T1", "U", "S", "H"])


def log_line(record: EpochRecord) -> str:
    """One epoch as a line of train.log."""
    numbers = [f"{value:.4f}" for value in record.losses.values()]
    numbers += [f"{value:.2f}" for value in asdict(record.metrics).values()]
    return "\t".join([str(record.epoch), f"{record.seconds:.1f}", *numbers])


def _prepare(settings: Settings, config: BDAConfig | None) -> tuple[TwoDigits, BDA]:
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    dataset = make_two_digits(settings.seed, validation=settings.validation)
    return dataset, build_model(settings, dataset, config)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} is not a run directory: it holds no {path.name}")
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content
