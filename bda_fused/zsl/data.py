"""A compositional zero-shot set of two-digit numbers, drawn from scikit-learn's real handwritten digits.

Every image shows two digits side by side; its class is the number 00..99. The attributes name the two digits ("left is
3", "right is 7"), so a class that was never seen is a new combination of attributes that were.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

DIGIT_SIZE = 8  # pixels; load_digits holds 8x8 images with grey values 0..16
MAX_JITTER = 4  # pixels a digit may lie from the top and left edge of its half
HALF_SIZE = DIGIT_SIZE + MAX_JITTER
IMAGE_SIZE = (HALF_SIZE, 2 * HALF_SIZE)

CLASS_NAMES = tuple(f"{number:02d}" for number in range(100))
ATTRIBUTE_NAMES = tuple(f"{side} is {digit}" for side in ("left", "right") for digit in range(10))

_TRAIN_SOURCES = 1200  # of the 1797 source digits; the other 597 draw the test images
_VALIDATION_SOURCES = 400  # of those 1200, set aside when a validation split is asked for
_SEEN_CLASSES, _VALIDATION_SEEN_CLASSES = 80, 60
_TRAIN_PER_CLASS, _TEST_SEEN_PER_CLASS, _TEST_UNSEEN_PER_CLASS = 40, 10, 30


@dataclass(frozen=True)
class Split:
    """Images of one split.

    Attributes:
        images: (N, 1, 12, 24) float32, grey values in [0, 1].
        labels: (N,) int64, rows of the set's `class_attributes`.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class TwoDigits:
    """A two-digit zero-shot set with K classes and A = 20 attributes.

    Attributes:
        train, test_seen, test_unseen: the splits; `train` and `test_seen` show seen classes only, `test_unseen`
            unseen ones only, and no source digit is drawn both in `train` and in a test split.
        class_attributes: (K, 20) float32, rows of Euclidean length 1: two equal entries at the class's own attributes.
        seen, unseen: (K_s,) and (K_u,) int64, ascending, disjoint, together all K classes.
        class_names: K names, "00" to "99" ("00" to "99" without the unseen ones in a validation split).
    """

    train: Split
    test_seen: Split
    test_unseen: Split
    class_attributes: Tensor
    seen: Tensor
    unseen: Tensor
    class_names: tuple[str, ...]
    attribute_names: tuple[str, ...] = ATTRIBUTE_NAMES


def training_size(*, validation: bool) -> int:
    """How many training images `make_two_digits` draws."""
    return _TRAIN_PER_CLASS * (_VALIDATION_SEEN_CLASSES if validation else _SEEN_CLASSES)


def make_two_digits(seed: int, *, validation: bool = False) -> TwoDigits:
    """Draw the two-digit set; the seed decides sources, unseen classes, digits and positions.

    3200 training images of 80 seen classes, 800 test images of the same classes and 600 of 20 unseen classes, where
    every digit is unseen exactly twice on the left and twice on the right.

    Args:
        seed: any non-negative integer.
        validation: draw a set for choosing hyper-parameters instead. It knows neither the test digits nor the unseen
            classes of the same seed: K = 80, with 60 seen and 20 "unseen" classes taken from the 80 seen ones, and
            800 + 400 of the 1200 training digits as sources.

    Raises:
        ValueError: the seed is negative.
    """
    if seed < 0:
        raise ValueError(f"seed must be a non-negative integer, got {seed}")
    from sklearn.datasets import load_digits

    rng = np.random.default_rng(seed)
    sources = load_digits()
    order = rng.permutation(len(sources.target))
    train_sources, test_sources = order[:_TRAIN_SOURCES], order[_TRAIN_SOURCES:]
    partner = rng.permutation(10)
    unseen = _diagonals(partner, (0, 1))
    classes = np.arange(100)
    if validation:
        classes = np.setdiff1d(classes, unseen)
        unseen = _diagonals(partner, (2, 3))
        train_sources, test_sources = np.split(train_sources, [_TRAIN_SOURCES - _VALIDATION_SOURCES])
    seen = np.setdiff1d(classes, unseen)

    def draw(numbers: np.ndarray, per_class: int, which: np.ndarray) -> Split:
        numbers = np.repeat(numbers, per_class)
        images = _draw_images(numbers, sources.images[which] / 16, sources.target[which], rng)
        return Split(torch.from_numpy(images), torch.from_numpy(np.searchsorted(classes, numbers)))

    return TwoDigits(
        train=draw(seen, _TRAIN_PER_CLASS, train_sources),
        test_seen=draw(seen, _TEST_SEEN_PER_CLASS, test_sources),
        test_unseen=draw(unseen, _TEST_UNSEEN_PER_CLASS, test_sources),
        class_attributes=_class_attributes(classes),
        seen=torch.from_numpy(np.searchsorted(classes, seen)),
        unseen=torch.from_numpy(np.searchsorted(classes, unseen)),
        class_names=tuple(CLASS_NAMES[number] for number in classes),
    )


def _diagonals(partner: np.ndarray, offsets: tuple[int, ...]) -> np.ndarray:
    """Numbers (left, partner[left + offset]): one per left digit and per right digit for every offset."""
    left = np.arange(10)
    return np.sort(np.concatenate([10 * left + partner[(left + offset) % 10] for offset in offsets]))


def _draw_images(numbers: np.ndarray, digits: np.ndarray, targets: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One (1, 12, 24) image per number: a random source of each digit at a random place of its half."""
    images = np.zeros((len(numbers), 1, *IMAGE_SIZE), dtype=np.float32)
    sources_of = [np.flatnonzero(targets == digit) for digit in range(10)]
    for image, number in zip(images, numbers, strict=True):
        for side, digit in enumerate(divmod(int(number), 10)):
            top, left = rng.integers(0, MAX_JITTER + 1, size=2)
            left += side * HALF_SIZE
            image[0, top : top + DIGIT_SIZE, left : left + DIGIT_SIZE] = digits[rng.choice(sources_of[digit])]
    return images


def _class_attributes(numbers: np.ndarray) -> Tensor:
    attributes = torch.zeros(len(numbers), len(ATTRIBUTE_NAMES))
    for row, (left, right) in zip(attributes, zip(*np.divmod(numbers, 10), strict=True), strict=True):
        row[[left, 10 + right]] = 0.5**0.5
    return attributes
