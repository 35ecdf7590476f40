"""Pictures of a training run and of where attributes look, as PNG files.

Figures are built through matplotlib's object interface, which needs no display and leaves no global state.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from torch import Tensor

if TYPE_CHECKING:
    from bda_fused.zsl.explain import Explanation
    from bda_fused.zsl.training import EpochRecord

DPI = 130
TRUE_COLOUR, WRONG_COLOUR = "#1a7f37", "#c4320a"
MAP_COLOURS = LinearSegmentedColormap.from_list("attention", ["#ffffff", "#ffd9a0", "#ff9a1f", "#f25c05"])


def draw_training_curves(history: Sequence[EpochRecord], path: Path) -> None:
    """Losses (left) and accuracies (right) after every epoch."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    losses, accuracies = figure.subplots(1, 2)
    epochs = [record.epoch for record in history]
    labels = {"sce": "class scores (SCE)", "cal": "calibration", "reg": "attributes (reg)", "vce": "visual head (VCE)"}
    for name, label in labels.items():
        losses.plot(epochs, [record.losses[name] for record in history], marker="o", ms=3, label=label)
    losses.set(title="Training losses, unweighted", ylabel="mean over the epoch")
    losses.set_ylim(bottom=0)
    curves = {"S": "S: seen classes", "U": "U: unseen classes", "H": "H: harmonic mean", "T1": "T1: among unseen only"}
    for (name, label), style in zip(curves.items(), ("-", "-", "--", ":"), strict=True):
        values = [getattr(record.metrics, name) for record in history]
        accuracies.plot(epochs, values, style, marker="o", ms=3, label=label)
    accuracies.set(title="Held-out images (no epoch is chosen by them)", ylabel="per-class accuracy (%)", ylim=(0, 101))
    for axes in (losses, accuracies):
        axes.set(xlabel="epoch")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=DPI)


def draw_attribute_maps(explanation: Explanation, title: str, path: Path) -> None:
    """One row per image: where the attributes of its class and of the best wrong class looked (VSA map)."""
    count = len(explanation.labels)
    figure = Figure(figsize=(11.5, 1.25 * count + 1.1), layout="constrained")
    figure.suptitle(title, fontsize=12)
    grid = figure.subplots(count, 5, squeeze=False)
    maps = explanation.vsa_map.unflatten(-1, explanation.grid)  # (N, A, h, w)
    names = explanation.class_names
    for n, (first, *others) in enumerate(grid):
        true, rival, predicted = (
            int(classes[n]) for classes in (explanation.labels, explanation.rivals, explanation.predictions)
        )
        _show(first, explanation.images[n])
        first.set_title(
            f"{names[true]}, predicted {names[predicted]}",
            fontsize=9,
            fontweight="bold",
            color=TRUE_COLOUR if predicted == true else WRONG_COLOUR,
        )
        for label, colour, pair in ((true, TRUE_COLOUR, others[:2]), (rival, WRONG_COLOUR, others[2:])):
            for axes, attribute in zip(pair, explanation.attributes_of(label), strict=True):
                _show(axes, explanation.images[n], maps[n, attribute])
                score = explanation.attribute_scores[n, attribute]
                name = explanation.attribute_names[attribute]
                axes.set_title(f'"{name}"  score {score:+.1f}', fontsize=9, color=colour)
    for axes, text in zip(
        grid[-1], ("image", *["attribute of its class"] * 2, *["of the best wrong class"] * 2), strict=True
    ):
        axes.set_xlabel(text, fontsize=9)
    bar = figure.colorbar(ScalarMappable(Normalize(0, 1), MAP_COLOURS), ax=grid, shrink=min(1.0, 2 / count), aspect=14)
    bar.set_label("attention / peak of the map", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    figure.savefig(path, dpi=DPI)


def draw_mean_maps(explanation: Explanation, title: str, path: Path) -> None:
    """One map per attribute: the mean of its VSA map over the images whose class has the attribute."""
    figure = Figure(figsize=(11.5, 2.3), layout="constrained")
    figure.suptitle(title, fontsize=12)
    maps = explanation.vsa_map.unflatten(-1, explanation.grid)  # (N, A, h, w)
    held = explanation.class_attributes[explanation.labels] > 0  # (N, A)
    grid = figure.subplots(2, len(explanation.attribute_names) // 2, squeeze=False)
    for attribute, axes in enumerate(grid.flat):
        chosen = held[:, attribute]
        _show(axes, explanation.images[chosen].mean(0), maps[chosen, attribute].mean(0))
        axes.set_title(explanation.attribute_names[attribute], fontsize=9)
    figure.savefig(path, dpi=DPI)


def _show(axes: Axes, image: Tensor, attention: Tensor | None = None) -> None:
    """An image in black ink, over the map of (h, w) regions that look at it; each region covers its own pixels."""
    height, width = image.shape
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    if attention is not None:
        axes.imshow((attention / attention.max()).numpy(), cmap=MAP_COLOURS, vmin=0, vmax=1, extent=extent)
    ink = torch.zeros(height, width, 4)
    ink[..., 3] = image if attention is None else 0.75 * image
    axes.imshow(ink.numpy(), extent=extent)
    axes.set(xticks=[], yticks=[])
