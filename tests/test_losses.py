"""The losses against values worked out by hand."""

import math

import torch

from bda_fused import losses

SCORES = torch.tensor([[0.0, math.log(2), 0.0], [math.log(3), 0.0, 0.0]], dtype=torch.float64)


def test_semantic_cross_entropy():
    """-log of the softmax at the label: 2/4 and 3/5."""
    found = losses.semantic_cross_entropy(SCORES, torch.tensor([1, 0]))
    assert math.isclose(found, -(math.log(2 / 4) + math.log(3 / 5)) / 2, rel_tol=1e-12)


def test_self_calibration_takes_the_mean_inside_the_logarithm():
    """Unseen class 2 has the masses 1/4 and 1/5."""
    found = losses.self_calibration(SCORES, torch.tensor([False, False, True]))
    assert math.isclose(found, -math.log((1 / 4 + 1 / 5) / 2), rel_tol=1e-12)


def test_self_calibration_is_finite_where_the_mass_underflows():
    scores = torch.tensor([[2000.0, 0.0], [3000.0, 0.0]], requires_grad=True)
    loss = losses.self_calibration(scores, torch.tensor([False, True]))
    loss.backward()
    assert torch.isfinite(loss)
    assert loss > 1000
    assert scores.grad.isfinite().all()
    assert scores.grad.abs().sum() > 0
    assert torch.softmax(scores, -1)[:, 1].sum() == 0, "the plain formula has nothing left to take the logarithm of"


def test_attribute_regression():
    class_attributes = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    found = losses.attribute_regression(torch.tensor([[0.5, 1.0], [1.0, 2.0]]), class_attributes, torch.tensor([0, 1]))
    assert math.isclose(found, (0.5**2 + 2.0**2) / 4, rel_tol=1e-6)


def test_visual_cross_entropy():
    assert math.isclose(losses.visual_cross_entropy(SCORES[1:], torch.tensor([0])), -math.log(3 / 5), rel_tol=1e-12)
