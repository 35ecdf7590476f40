"""The models that a training run builds, and what they run on."""

from __future__ import annotations

import torch

from bda_fused import backends
from bda_fused.config import BDAConfig
from bda_fused.modules import BDA
from bda_fused.zsl.data import TwoDigits
from bda_fused.zsl.settings import Settings


def check_device(device: str) -> None:
    """Train a number on the device and read it back.

    Raises:
        ValueError: torch does not have the device here, or has it for other uses, such as "meta".
    """
    try:
        number = torch.ones((), device=device, requires_grad=True)
        (number * number).backward()
        number.detach().item()
    except (RuntimeError, AssertionError, ImportError) as error:  # whatever torch says of a device it lacks
        reason = str(error).partition("\n")[0].partition(". ")[0]  # the first sentence of what may be pages
        raise ValueError(f"device must be one that torch can train on here, got {device!r}: {reason}") from error


def running_backend(settings: Settings) -> str:
    """The attention backend that the settings lead to on their device.

    Raises:
        ValueError: the device is not one to train on, or the backend that is named cannot run on it.
    """
    check_device(settings.device)
    rows = torch.zeros(1, 1, device=settings.device)
    explanation = backends.explain(rows, rows, rows, backend=settings.backend)
    if explanation.backend is None:
        raise ValueError(f"backend {settings.backend!r} cannot run here: {explanation.refused[settings.backend]}")
    return explanation.backend


def build_model(settings: Settings, dataset: TwoDigits, config: BDAConfig | None = None) -> BDA:
    """A fused BDA for the set, its initial weights drawn from ``settings.seed``, on ``settings.device``.

    The configuration is the one that the settings ask for, unless a stored one is given.

    In the demo model the read-out W_1 starts at a standard deviation of dim ** -0.5, where the released code, and with
    it the full model, has 1: attribute scores then start near 1 instead of dim ** 0.5, and training leaves its first
    plateau after a third of the steps. torch's global generator is left as it was.
    """
    if config is None:
        config = settings.bda_config(len(dataset.class_names), len(dataset.attribute_names))
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(settings.seed)
        model = BDA(config, dataset.class_attributes, dataset.unseen)
        if settings.model == "demo":
            model.sven.readout.mul_(config.dim**-0.5)
    return model.to(settings.device)
