"""Where attributes looked: both attention maps of chosen images, as arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bda_fused.modules import BDA
from bda_fused.zsl.data import Split, TwoDigits

DEFAULT_IMAGES = 6


@dataclass(frozen=True)
class Explanation:
    """Images, what the model said about them, and where it looked; all tensors on the CPU.

    Attributes:
        images: (N, 12, 24) float32, grey values in [0, 1].
        labels: (N,) int64, the true classes.
        class_scores: (N, K), the calibration included.
        attribute_scores: (N, A).
        ssa_map: (N, HW, A), which attributes every region asked; rows sum to 1. None for a model without SSA.
        vsa_map: (N, A, HW), which regions every attribute asked; rows sum to 1.
        grid: height and width of the region grid, HW = height * width, row-major.
        class_attributes: (K, A).
        class_names, attribute_names: K and A names.
    """

    images: Tensor
    labels: Tensor
    class_scores: Tensor
    attribute_scores: Tensor
    ssa_map: Tensor | None
    vsa_map: Tensor
    grid: tuple[int, int]
    class_attributes: Tensor
    class_names: tuple[str, ...]
    attribute_names: tuple[str, ...]

    @property
    def predictions(self) -> Tensor:
        """(N,) int64, the classes with the highest scores."""
        return self.class_scores.argmax(1)

    @property
    def rivals(self) -> Tensor:
        """(N,) int64, the highest-scoring classes that share no attribute with the true one."""
        shared = self.class_attributes[self.labels] @ self.class_attributes.T
        return self.class_scores.masked_fill(shared > 0, -torch.inf).argmax(1)

    def attributes_of(self, label: int) -> list[int]:
        """Columns of the attributes that class `label` has."""
        return self.class_attributes[label].nonzero().flatten().tolist()

    def save(self, path: Path) -> None:
        """Write every field, under its own name, to a compressed .npz file."""
        arrays: dict[str, Any] = {name: np.asarray(value) for name, value in vars(self).items() if value is not None}
        np.savez_compressed(path, **arrays)


def explain(model: BDA, dataset: TwoDigits, split: Split) -> Explanation:
    """Run a model once over the N images of `split`, in evaluation mode, and keep its maps, averaged over heads."""
    model.eval()
    device = next(model.parameters()).device
    with torch.inference_mode():
        out = model(split.images.to(device), need_weights=True)
    return Explanation(
        images=split.images[:, 0],
        labels=split.labels,
        class_scores=out.class_scores.cpu(),
        attribute_scores=out.attribute_scores.cpu(),
        ssa_map=None if out.ssa_map is None else _mean_over_heads(out.ssa_map),
        vsa_map=_mean_over_heads(out.vsa_map),
        grid=model.config.grid,
        class_attributes=dataset.class_attributes,
        class_names=dataset.class_names,
        attribute_names=dataset.attribute_names,
    )


def _mean_over_heads(weights: Tensor) -> Tensor:
    """(N, rows, columns) on the CPU, from that or from (N, heads, rows, columns)."""
    return (weights.mean(1) if weights.dim() == 4 else weights).cpu()


def mass_in_own_half(explanation: Explanation) -> float:
    """How much of the VSA maps lies where it should, in percent.

    For each image, the two attributes that hold for it: the share of a left attribute's map in the left half of the
    image, and of a right attribute's in the right half. A map that knows nothing has 50.
    """
    maps = explanation.vsa_map.unflatten(-1, explanation.grid)  # (N, A, h, w)
    middle = explanation.grid[1] // 2
    left = maps[..., :middle].sum((-1, -2))  # (N, A)
    is_left = torch.tensor([name.startswith("left") for name in explanation.attribute_names])
    own = torch.where(is_left, left, 1 - left)
    return 100 * own[explanation.class_attributes[explanation.labels] > 0].mean().item()


def spread(split: Split, count: int) -> Split:
    """`count` images spread over a split: at multiples of the golden ratio, which no rhythm of the classes shares."""
    steps = torch.arange(count, dtype=torch.float64) * (5**0.5 - 1) / 2
    index = ((steps % 1) * len(split)).long().sort().values
    return Split(split.images[index], split.labels[index])


def choose_images(dataset: TwoDigits, indices: Sequence[int] = (), classes: Sequence[str] = ()) -> Split:
    """Test images by index, then the first one of each named class; without either, `spread` over the unseen classes.

    Args:
        dataset: the set; its test images are counted through the seen classes, then the unseen ones.
        indices: from 0.
        classes: names such as "37".

    Raises:
        ValueError: an index is out of range, or a class is not one of the set's.
    """
    if not indices and not classes:
        return spread(dataset.test_unseen, DEFAULT_IMAGES)
    images = torch.cat([dataset.test_seen.images, dataset.test_unseen.images])
    labels = torch.cat([dataset.test_seen.labels, dataset.test_unseen.labels])
    for index in indices:
        if not 0 <= index < len(labels):
            raise ValueError(f"a test image has an index from 0 to {len(labels) - 1}, got {index}")
    chosen = list(indices)
    for name in classes:
        if name not in dataset.class_names:
            raise ValueError(f"there is no class {name!r}; the classes are {', '.join(dataset.class_names)}")
        chosen.append(int((labels == dataset.class_names.index(name)).nonzero()[0]))
    return Split(images[chosen], labels[chosen])
