"""Between the shapes that users pass and the 4-D operands of the operators."""

from __future__ import annotations

from torch import Tensor


def batch_of(*operands: Tensor) -> tuple[int, int]:
    """(B, H): the broadcast of the batch axes of 4-D operands that are known to fit."""
    batch = heads = 1
    for x in operands:  # plain, because every call of every attention comes here several times
        shape = x.shape
        if shape[0] != 1:
            batch = shape[0]
        if shape[1] != 1:
            heads = shape[1]
    return batch, heads


def step(x: Tensor, axis: int) -> int:
    """The stride, in elements, 0 along an axis of size 1: what kernels are told."""
    return 0 if x.shape[axis] == 1 else x.stride(axis)


def with_unit_stride(x: Tensor) -> Tensor:
    """The tensor itself where neighbouring columns are adjacent in memory, else one copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def padded_rows(like: Tensor, shape: tuple[int, ...], multiple: int) -> Tensor:
    """Uninitialised, of ``shape``, in rows whose pitch is the next multiple of so many elements."""
    *outer, width = shape
    return like.new_empty((*outer, -(-width // multiple) * multiple))[..., :width]


def lift(x: Tensor) -> Tensor:
    """(L, D) and (B, L, D) as (B or 1, 1, L, D)."""
    dim = x.dim()
    if dim == 2:
        return x[None, None]
    return x.unsqueeze(1) if dim == 3 else x


def lift_bias(bias: Tensor, heads: bool) -> Tensor:
    """Any accepted bias as (B or 1, H or 1, L or 1, S or 1)."""
    if bias.dim() == 3 and not heads:
        return bias.unsqueeze(1)
    return bias.view(*(1,) * (4 - bias.dim()), *bias.shape)


def lower(x: Tensor, query_dim: int, flat: bool) -> Tensor:
    """A result without the axes that its operands lacked."""
    if query_dim == 4:
        return x
    return x.squeeze((0, 1)) if flat else x.squeeze(1)  # whose backward is a view, where indexing's fills and copies
