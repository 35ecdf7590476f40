"""The zero-shot accuracies against cases worked by hand."""

import pytest
import torch

from bda_fused.zsl.metrics import ZeroShotMetrics, per_class_accuracy, zero_shot_metrics

SEEN, UNSEEN = torch.tensor([0, 1]), torch.tensor([2, 3])


def one_hot_scores(predictions: list[int]) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(predictions), 4).float()


def test_every_class_counts_the_same_however_many_images_it_has():
    predictions = torch.tensor([0, 0, 0, 1, 0])
    labels = torch.tensor([0, 0, 0, 0, 1])
    accuracy = per_class_accuracy(predictions, labels, SEEN)
    assert accuracy.tolist() == [0.75, 0.0]


def test_classes_are_reported_in_the_order_asked_for():
    labels = torch.tensor([3, 1, 1])
    accuracy = per_class_accuracy(torch.tensor([3, 0, 1]), labels, torch.tensor([3, 1]))
    assert accuracy.tolist() == [1.0, 0.5]


def test_hand_worked_case():
    # Class 2: both images go to class 2. Class 3: one to seen class 0, whose best unseen class is 3, one to class 2.
    unseen_scores = torch.tensor([[0, 0, 1, 0], [0, 0, 1, 0], [3, 0, 1, 2], [0, 0, 2, 1]]).float()
    metrics = zero_shot_metrics(
        one_hot_scores([0, 0, 0, 2, 1]),
        torch.tensor([0, 0, 0, 0, 1]),
        unseen_scores,
        torch.tensor([2, 2, 3, 3]),
        seen=SEEN,
        unseen=UNSEEN,
    )
    assert metrics == ZeroShotMetrics(T1=75.0, U=50.0, S=87.5, H=pytest.approx(2 * 50 * 87.5 / 137.5))


def test_harmonic_mean_is_zero_when_both_accuracies_are():
    metrics = zero_shot_metrics(
        one_hot_scores([2, 2]),
        torch.tensor([0, 1]),
        one_hot_scores([0, 1]),
        torch.tensor([2, 3]),
        seen=SEEN,
        unseen=UNSEEN,
    )
    assert (metrics.U, metrics.S, metrics.H) == (0.0, 0.0, 0.0)


def test_a_class_without_a_test_image_is_refused():
    with pytest.raises(ValueError, match=r"needs a test image, got none for the classes \[1\]"):
        per_class_accuracy(torch.tensor([0]), torch.tensor([0]), SEEN)


def test_lengths_that_disagree_are_refused():
    with pytest.raises(ValueError, match=r"equally long, got shapes \(2,\) and \(3,\)"):
        per_class_accuracy(torch.zeros(2), torch.zeros(3), SEEN)


def test_scores_that_are_not_finite_are_refused():
    scores = one_hot_scores([0, 1])
    labels = torch.tensor([0, 1])
    broken = scores.clone()
    broken[1, 2] = float("nan")
    with pytest.raises(ValueError, match="class scores must be finite"):
        zero_shot_metrics(scores, labels, broken, labels + 2, seen=SEEN, unseen=UNSEEN)
