"""Matrix products of 4-D operands with shared batch axes, as GEMMs that expand nothing in memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def product(a: Tensor, b: Tensor, *, add: Tensor | None = None, alpha: float = 1.0) -> Tensor:
    """alpha * A B + add for A (., ., M, K) and B (., ., K, N), whose two batch axes broadcast, and so does ``add``."""
    batch = torch.broadcast_shapes(a.shape[:2], b.shape[:2])
    shape = torch.Size((*batch, a.shape[2], b.shape[3]))
    if b.shape[:2] == (1, 1) and _merges(a, 3):  # one GEMM over the rows of all images
        fused = add is not None and add.shape in (shape, (1, 1, 1, shape[3])) and _merges(add, 3)
        rows = add.flatten(0, 2) if fused else None
        out = _gemm(torch.addmm, rows, a.flatten(0, 2), b[0, 0], alpha)
    elif _merges(a.expand(*batch, -1, -1), 2) and _merges(
        b.expand(*batch, -1, -1), 2
    ):  # shared: a batch of stride 0
        fused = (
            add is not None and add.shape[:2] in (batch, (1, 1)) and _merges(add.expand(*batch, -1, -1), 2)
        )
        blocks = add.expand(*batch, -1, -1).flatten(0, 1) if fused else None
        a, b = (x.expand(*batch, -1, -1).flatten(0, 1) for x in (a, b))
        out = _gemm(torch.baddbmm, blocks, a, b, alpha)
    else:
        fused = False
        out = summed_product(a, b, shape, alpha=alpha)
    out = out.view(shape)
    return out if add is None or fused else out + add


def summed_product(a: Tensor, b: Tensor, shape: torch.Size, *, alpha: float = 1.0) -> Tensor:
    """alpha * A B, summed over the batch axes that ``shape`` has as 1: the gradient of an operand shared along them.

    The sum runs inside one long GEMM.
    """
    a, a_labels = _without_shared(a, "bhmk")
    b, b_labels = _without_shared(b, "bhkn")
    labels = "".join(
        label
        for label, size in zip("bhmn", shape, strict=True)
        if label in "mn" or (size != 1 and label in a_labels + b_labels)
    )
    return torch.einsum(f"{a_labels},{b_labels}->{labels}", a, b).mul_(alpha).reshape(shape)


def _without_shared(x: Tensor, labels: str) -> tuple[Tensor, str]:
    """The operand without its batch axes of size 1, and the labels of those it keeps."""
    shared = [axis for axis in (0, 1) if x.shape[axis] == 1]
    return x.squeeze(shared), "".join(label for axis, label in enumerate(labels) if axis not in shared)


def _merges(x: Tensor, axes: int) -> bool:
    """Whether the first ``axes`` axes are one axis in memory, so that flattening them copies nothing."""
    stride = None
    for axis in reversed(range(axes)):
        if x.shape[axis] != 1:
            if stride is not None and x.stride(axis) != stride:
                return False
            stride = x.stride(axis) * x.shape[axis]
    return True


def _gemm(fused: Callable[..., Tensor], add: Tensor | None, a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """torch.addmm or torch.baddbmm, which with beta = 0 read nothing of the tensor to be added."""
    if add is None:
        return fused(a.new_empty(()), a, b, beta=0, alpha=alpha)
    return fused(add, a, b, alpha=alpha)
