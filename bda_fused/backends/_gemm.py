"""Matrix products of 4-D operands with shared batch axes, as GEMMs that expand nothing in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from bda_fused.shapes import batch_of

# A GEMM this narrow adds to its result after every few terms, and so rounds at the size of what it is added to: up to
# 29 times the error of a sum that is added once was seen for 7 columns.
_NARROW = 32


def product(a: Tensor, b: Tensor, *, add: Tensor | None = None, alpha: float = 1.0) -> Tensor:
    """alpha * A B + add for A (., ., M, K) and B (., ., K, N), whose two batch axes broadcast, and so does ``add``."""
    batch = batch_of(a, b)
    shape = (*batch, a.shape[2], b.shape[3])
    if b.shape[:2] == (1, 1) and _merges(a, 3):  # one GEMM over the rows of all images
        axes, b = 3, b.view(b.shape[2:])
        fits = add is not None and add.shape in (shape, (1, 1, 1, shape[3])) and _merges(add, 3)
    else:  # a batched GEMM, in which a shared operand is a batch of stride 0
        a, b = a.expand(*batch, -1, -1), b.expand(*batch, -1, -1)
        if not (_merges(a, 2) and _merges(b, 2)):
            out = summed_product(a, b, shape, alpha=alpha)
            return out if add is None else out + add
        if add is not None and add.shape[:2] in (batch, (1, 1)):
            add = add.expand(*batch, -1, -1)
        axes, b = 2, b.flatten(0, 1)
        fits = add is not None and add.shape[:2] == batch and _merges(add, 2)
    a = a.flatten(0, axes - 1)
    if add is not None and fits and shape[3] >= _NARROW:
        return _gemm(a, b, add.flatten(0, axes - 1), alpha).view(shape)
    out = _gemm(a, b, None, alpha).view(shape)
    return out if add is None else out + add


def score_product(q: Tensor, k: Tensor, *, add: Tensor | None = None, alpha: float = 1.0) -> Tensor:
    """alpha * Q K^T + add; one GEMM over the keys of all images, transposed afterwards, where that is faster."""
    # Of shared queries that outnumber an image's keys, the products image by image are narrow.
    if q.shape[:2] == (1, 1) != k.shape[:2] and q.shape[2] > k.shape[2] and _merges(k, 3):
        out = product(k, q.mT, alpha=alpha).mT.contiguous()
        return out if add is None else out + add
    return product(q, k.mT, add=add, alpha=alpha)


def _gemm(a: Tensor, b: Tensor, add: Tensor | None, alpha: float) -> Tensor:
    """alpha * A B + add of matrices, or of batches of them."""
    gemm, fused = (torch.mm, torch.addmm) if a.dim() == 2 else (torch.bmm, torch.baddbmm)
    if add is not None:
        return fused(add, a, b, alpha=alpha)
    if alpha == 1:
        return gemm(a, b)
    return fused(a.new_empty(()), a, b, beta=0, alpha=alpha)  # with beta = 0 the first operand is not read


def summed_product(a: Tensor, b: Tensor, shape: tuple[int, ...], *, alpha: float = 1.0) -> Tensor:
    """alpha * A B, summed over the batch axes that ``shape`` has as 1: the gradient of an operand shared along them.

    The sum runs inside one long GEMM.
    """
    if shape[0] == shape[1] == 1 and a.shape[:2] == b.shape[:2]:
        return _gemm(a.mT.flatten(0, 2).mT, b.flatten(0, 2), None, alpha).view(shape)
    a, a_labels = _without_shared(a, "bhmk")
    b, b_labels = _without_shared(b, "bhkn")
    labels = "".join(
        label
        for label, size in zip("bhmn", shape, strict=True)
        if label in "mn" or (size != 1 and label in a_labels + b_labels)
    )
    return torch.einsum(f"{a_labels},{b_labels}->{labels}", a, b).mul_(alpha).reshape(shape)


def gradient(a: Tensor, b: Tensor, shape: torch.Size, *, add: Tensor | None = None, alpha: float = 1.0) -> Tensor:
    """alpha * A B + add as the gradient of an operand of ``shape``: summed over the batch axes that it shares."""
    if tuple(shape[:2]) == batch_of(a, b):
        return product(a, b, add=None if add is None else add.sum_to_size(shape), alpha=alpha)
    grad = summed_product(a, b, shape, alpha=alpha)
    return grad if add is None else grad.add_(add.sum_to_size(shape))


def _without_shared(x: Tensor, labels: str) -> tuple[Tensor, str]:
    """The operand without its batch axes of size 1, and the labels of those it keeps."""
    shared = [axis for axis in (0, 1) if x.shape[axis] == 1]
    return x.squeeze(shared), "".join(label for axis, label in enumerate(labels) if axis not in shared)


def _merges(x: Tensor, axes: int) -> bool:
    """Whether the first ``axes`` axes are one axis in memory, so that flattening them copies nothing."""
    if x.is_contiguous():
        return True
    stride = None
    for axis in reversed(range(axes)):
        if x.shape[axis] != 1:
            if stride is not None and x.stride(axis) != stride:
                return False
            stride = x.stride(axis) * x.shape[axis]
    return True
