"""The losses of BDA (Lee et al., Computational Visual Media 11(5), 2025, and its released code).

L = L_SCE + lambda_cal L_cal + lambda_reg L_reg + lambda_vce L_VCE
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as nnf


def semantic_cross_entropy(scores: Tensor, labels: Tensor) -> Tensor:
    """L_SCE: cross entropy of the uncalibrated class scores (B, K), over seen and unseen classes; labels (B,) int64."""
    return nnf.cross_entropy(scores, labels)


def self_calibration(calibrated_scores: Tensor, unseen: Tensor) -> Tensor:
    """L_cal = -log( mean_b sum_{k unseen} softmax(s_b + c)_k ), the mean inside the logarithm.

    calibrated_scores: (B, K). unseen: boolean (K,). In logarithms throughout, so that a vanishing unseen mass gives a
    large finite loss with a gradient, not an infinite one.
    """
    log_mass = nnf.log_softmax(calibrated_scores, -1)[:, unseen].logsumexp(-1)
    return log_mass.new_tensor(log_mass.shape[0]).log() - log_mass.logsumexp(0)


def attribute_regression(attribute_scores: Tensor, class_attributes: Tensor, labels: Tensor) -> Tensor:
    """L_reg: mean squared error of the attribute scores (B, A) against the labels' rows of class_attributes (K, A)."""
    return nnf.mse_loss(attribute_scores, class_attributes[labels])


def visual_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """L_VCE: cross entropy of the class head's logits (B, K)."""
    return nnf.cross_entropy(logits, labels)
