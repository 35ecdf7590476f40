"""Zero-shot accuracies, averaged per class: CZSL T1 and GZSL U, S and H, in percent.

The protocol of the field (Xian et al., "Zero-Shot Learning: A Comprehensive Evaluation of the Good, the Bad and the
Ugly", TPAMI 2019): every class counts the same, however many test images it has.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ZeroShotMetrics:
    """All in percent.

    Attributes:
        T1: accuracy on unseen classes when only unseen classes may be predicted (conventional zero-shot learning).
        U: accuracy on unseen classes when every class may be predicted (generalised zero-shot learning).
        S: the same on the held-out images of seen classes.
        H: harmonic mean of U and S, 0 when both are.
    """

    T1: float
    U: float
    S: float
    H: float


class NotFiniteError(ValueError):
    """Class scores that are inf or nan."""


def per_class_accuracy(predictions: Tensor, labels: Tensor, classes: Tensor) -> Tensor:
    """Fraction of each class's images that were predicted right.

    Args:
        predictions, labels: (N,) integer class indices.
        classes: (M,) class indices to report, each with at least one image.

    Returns:
        (M,) float64 in [0, 1].

    Raises:
        ValueError: shapes disagree, or a class of `classes` has no image.
    """
    if predictions.shape != labels.shape or labels.ndim != 1:
        raise ValueError(
            "predictions and labels must be 1-D and equally long, "
            f"got shapes {tuple(predictions.shape)} and {tuple(labels.shape)}"
        )
    of_class = labels == classes[:, None]  # (M, N)
    counts = of_class.sum(1)
    if (counts == 0).any():
        missing = classes[counts == 0].tolist()
        raise ValueError(f"every evaluated class needs a test image, got none for the classes {missing}")
    return (of_class & (predictions == labels)).sum(1).double() / counts


def zero_shot_metrics(
    seen_scores: Tensor,
    seen_labels: Tensor,
    unseen_scores: Tensor,
    unseen_labels: Tensor,
    *,
    seen: Tensor,
    unseen: Tensor,
) -> ZeroShotMetrics:
    """T1, U, S and H of class scores that already hold the calibration between seen and unseen classes.

    Args:
        seen_scores, unseen_scores: (N_s, K) and (N_u, K) scores of the test images of seen and unseen classes.
        seen_labels, unseen_labels: (N_s,) and (N_u,) int64 columns of the scores.
        seen, unseen: the classes of either kind, each with at least one test image.

    Raises:
        NotFiniteError: a score is not finite.
        ValueError: shapes disagree, or a class has no test image.
    """
    if not (seen_scores.isfinite().all() and unseen_scores.isfinite().all()):
        raise NotFiniteError("class scores must be finite, got inf or nan")
    restricted = unseen[unseen_scores[:, unseen].argmax(1)]
    t1 = _mean_percent(restricted, unseen_labels, unseen)
    u = _mean_percent(unseen_scores.argmax(1), unseen_labels, unseen)
    s = _mean_percent(seen_scores.argmax(1), seen_labels, seen)
    return ZeroShotMetrics(T1=t1, U=u, S=s, H=2 * u * s / (u + s) if u + s else 0.0)


def _mean_percent(predictions: Tensor, labels: Tensor, classes: Tensor) -> float:
    return 100 * per_class_accuracy(predictions, labels, classes).mean().item()
