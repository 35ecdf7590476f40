"""What a training run can be told, from presets, a file and the command line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from bda_fused.config import BDAConfig
from bda_fused.zsl.data import training_size

_CHOICES: dict[str, tuple[str, ...]] = {
    "model": ("demo", "full"),
    "order": ("ssa-vsa", "vsa-ssa"),
    "backend": ("auto", "cuda", "triton", "cpu", "eager"),
}
_MAX_THREADS = 1024  # more than any machine has CPUs; far beyond it the system refuses them one by one
_MAX_SEED = 2**63 - 1
_MAX_EPOCHS = 10**6  # more than anybody waits for

# What the images, the attributes and the losses ask for whichever model is chosen.
_SHARED: dict[str, Any] = {
    "stem": "conv",
    "stem_channels": (1, 32, 64),
    "image_dim": 64,
    "grid": (4, 8),
    "attribute_dim": 32,
    "dim": 64,
    "ffn_dim": 128,
    "fsqrt": 64,
    "sqrt": 64,
    "lambda_cal": 0.1,
    "lambda_reg": 0.05,
    "lambda_vce": 0.1,
}
_MODELS: dict[str, dict[str, Any]] = {
    # SSA, VSA and one feed-forward network, each with one residual: the equations of the paper's outline.
    "demo": {
        **_SHARED,
        "positions": "learned",
        "normalize_visual": False,
        "use_rsa": False,
        "attribute_attention": False,
        "ffn_between": False,
        "residual": "single",
        "dropout": 0.0,
        "ssa_map_dropout": 0.0,
    },
    # Every block of the released model, behind the same stem.
    "full": {**_SHARED, "dropout": 0.1},
}
# Learning rate and weight decay were chosen on validation splits (`--validation`) of seeds 100 and 101.
_TRAINING: dict[str, dict[str, Any]] = {
    "demo": {"epochs": 12, "batch_size": 64, "lr": 4e-3, "weight_decay": 0.1},
    "full": {"epochs": 16, "batch_size": 64, "lr": 4e-3, "weight_decay": 0.1},
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of one training run; every value is checked when the object is made.

    Attributes:
        model: "demo", the small model, or "full", every block of the released one.
        seed: decides the data, the initial weights, the batches and the dropout; at most 2**63 - 1.
        epochs: passes over the training images, at most 10**6.
        batch_size: images per step; at most the training images of the split.
        lr: peak of the one-cycle learning rate.
        weight_decay: AdamW's decoupled weight decay.
        order: which attention runs first.
        ssa: False leaves out semantic synthesis attention.
        validation: train and measure on the validation split instead of the test split.
        backend: what computes the attention.
        device: a torch device.
        threads: CPU threads, at most 1024, or None for torch's own choice.
        bda: fields of `BDAConfig` that are to differ from the preset.

    Raises:
        TypeError: a value of the wrong type; a bool is no number and a string no bool.
        ValueError: a value out of range.
    """

    model: str = "demo"
    seed: int = 0
    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    order: str = "ssa-vsa"
    ssa: bool = True
    validation: bool = False
    backend: str = "auto"
    device: str = "cpu"
    threads: int | None = None
    bda: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name in ("ssa", "validation"):
            _check_type(name, getattr(self, name), bool, "true or false")
        check_integer("seed", self.seed, 0, _MAX_SEED)
        check_integer("epochs", self.epochs, 1, _MAX_EPOCHS)
        check_integer("batch_size", self.batch_size, 1)
        images = training_size(validation=self.validation)
        if self.batch_size > images:
            raise ValueError(f"batch_size must be at most the {images} training images, got {self.batch_size}")
        if self.threads is not None:
            check_threads(self.threads)
        for name in ("lr", "weight_decay"):
            value = getattr(self, name)
            _check_type(name, value, (int, float), "a number")
            if not (0 < value <= 1 if name == "lr" else 0 <= value <= 1):
                raise ValueError(f"{name} must lie between 0 and 1, got {value}")
        _check_type("device", self.device, str, "a string")
        _check_type("bda", self.bda, Mapping, "a mapping of BDAConfig fields")
        for name in ("num_classes", "num_attributes", "grid", "stem"):
            if name in self.bda:
                raise ValueError(f"bda must leave {name} to the data set, got {self.bda[name]!r}")
        config = self.bda_config(num_classes=2, num_attributes=1)  # refuses the rest before the data set is drawn
        if config.stem_channels[0] != 1:
            raise ValueError(f"stem_channels must begin with 1, as the images are grey, got {config.stem_channels}")

    def bda_config(self, num_classes: int, num_attributes: int) -> BDAConfig:
        """The model's configuration: the preset, then `order` and `ssa`, then `bda`."""
        return BDAConfig.from_dict(
            {
                **_MODELS[self.model],
                "num_classes": num_classes,
                "num_attributes": num_attributes,
                "order": self.order,
                "use_ssa": self.ssa,
                **self.bda,
            }
        )


def make_settings(given: Mapping[str, Any], file: Path | None = None) -> Settings:
    """The preset of the model, overruled by a configuration file, overruled by what is given directly.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError, ValueError: the file is not a JSON or YAML mapping, or a setting is unknown or wrong.
    """
    values = {**({} if file is None else read_settings(file)), **given}
    known = [f.name for f in fields(Settings)]
    for name in values:
        if name not in known:
            raise ValueError(f"there is no setting {name!r}; known are {', '.join(known)}")
    preset = _TRAINING["full" if values.get("model") == "full" else "demo"]
    return Settings(**{**preset, **values})


def read_settings(file: Path) -> dict[str, Any]:
    """A flat JSON or YAML mapping, or one with every value inside `{value: ...}`, or a run's own config.json.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: its name does not end in .json, .yaml or .yml, or its content is not such a mapping.
    """
    if not file.is_file():
        raise FileNotFoundError(f"there is no configuration file {file}")
    if file.suffix == ".json":
        content = read_json(file)
    elif file.suffix in (".yaml", ".yml"):
        import yaml

        try:
            content = yaml.safe_load(file.read_text())
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from error
    else:
        raise ValueError(f"a configuration file ends in .json, .yaml or .yml, got {file}")
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a mapping of settings, got {type(content).__name__}")
    content = content.get("training", content)
    if not isinstance(content, dict):
        raise ValueError(f"{file}: training must hold a mapping of settings, got {content!r}")
    return {
        str(name): value["value"] if isinstance(value, dict) and "value" in value else value
        for name, value in content.items()
    }


def read_json(file: Path) -> Any:
    """The content of a JSON file; ValueError where it is none, or nested deeper than the parser goes."""
    try:
        return json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error


def check_threads(threads: int) -> None:
    """TypeError or ValueError for a number of CPU threads that is no integer from 1 to 1024."""
    check_integer("threads", threads, 1, _MAX_THREADS)


def check_integer(name: str, value: Any, lowest: int, highest: int | None = None) -> None:
    """TypeError or ValueError for what is no integer between the two, or from ``lowest`` up."""
    _check_type(name, value, int, "an integer")
    if value < lowest:
        raise ValueError(f"{name} must be at least {lowest}, got {value}")
    if highest is not None and value > highest:
        raise ValueError(f"{name} must be at most {highest}, got {value}")


def _check_type(name: str, value: object, kind: type | tuple[type, ...], words: str) -> None:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(f"{name} must be {words}, got {value!r}")
