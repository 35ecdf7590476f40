"""What the public functions accept: each refusal is one sentence that names what was given and what is allowed."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from bda_fused.numerics import autocast_dtype

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def is_finite(number: Real | float) -> bool:
    """Whether a number is finite as a float; an integer beyond the greatest float is not."""
    try:
        return math.isfinite(number)
    except OverflowError:
        return False


def check_finite(name: str, number: Any, allowed: str = "a finite float") -> None:
    """A real number that is finite as a float32, whatever the operands' dtype, or TypeError or ValueError."""
    if isinstance(number, bool) or not isinstance(number, Real):
        raise TypeError(f"{name} must be {allowed}, got {type(number).__name__}")
    if not is_finite(number):
        raise ValueError(f"{name} must be {allowed}, got {number}")
    if abs(float(number)) > torch.finfo(torch.float32).max:
        raise ValueError(f"{name} must be in the range of float32, got {number}")


def check_probability(name: str, p: Any) -> None:
    """A real number in [0, 1], or TypeError or ValueError."""
    if isinstance(p, bool) or not isinstance(p, Real):
        raise TypeError(f"{name} must be a float in [0, 1], got {type(p).__name__}")
    if not is_finite(p) or not 0 <= float(p) <= 1:  # refuses NaN too
        raise ValueError(f"{name} must be in [0, 1], got {p}")


def is_integer(number: Any) -> bool:
    """Whether it is an integer of some kind; True and False are none."""
    return isinstance(number, Integral) and not isinstance(number, bool)


def check_sizes(**sizes: Any) -> None:
    """Integers of at least 1, or TypeError or ValueError."""
    for name, size in sizes.items():
        if not is_integer(size):
            raise TypeError(f"{name} must be an integer, got {size!r}")
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")


def check_operand(name: str, tensor: Any) -> None:
    """A dense floating-point tensor, or TypeError."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided or tensor.is_nested:
        layout = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        raise TypeError(f"{name} must be a dense (strided) tensor, got layout {layout}")
    if tensor.dtype == torch.bool and name == "attn_bias":
        raise TypeError(
            "attn_bias must be a float tensor that is added to the scores, got bool: "
            "use 0 where a key may be attended and -inf where it is masked"
        )
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {_name(tensor.dtype)}")


def check_options(scale: Any, dropout_p: Any, need_weights: Any, backend: Any, backends: tuple[str, ...]) -> None:
    """The keywords of residual_attention, ssa and vsa."""
    if scale is not None:
        check_finite("scale", scale, "a finite float or None")
    check_probability("dropout_p", dropout_p)
    if not isinstance(need_weights, bool):
        raise TypeError(f"need_weights must be True or False, got {type(need_weights).__name__}")
    if not isinstance(backend, str):
        raise TypeError(f"backend must be a name, got {type(backend).__name__}")
    if backend not in backends:
        raise ValueError(f"backend must be one of {', '.join(backends)}, got {backend!r}")


def checked_operands(query: Any, key: Any, value: Any, residual: Any, attn_bias: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value in their common dtype (autocast's, where it is on), or the first refusal that applies."""
    operands = {"query": query, "key": key, "value": value, "residual": residual, "attn_bias": attn_bias}
    for name, tensor in operands.items():
        if tensor is not None or name in ("query", "key", "value"):
            check_operand(name, tensor)
    check_same_device(operands)
    dtype = autocast_dtype(query.device)
    if dtype is not None and query.dtype != torch.float64:
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    check_same_dtype(query, key, value)
    check_shapes(query, key, value, residual, attn_bias)
    return query, key, value


def check_same_device(operands: dict[str, Tensor | None]) -> None:
    devices = {name: tensor.device for name, tensor in operands.items() if tensor is not None}
    for name, device in devices.items():
        if device != devices["query"]:
            raise ValueError(f"{name} must be on the query's device {devices['query']}, got {device}")


def check_same_dtype(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name} must have the query's dtype {_name(query.dtype)}, got {_name(tensor.dtype)}")


def _check_batch(axis: str, name: str, size: int, known: int, source: str) -> tuple[int, str]:
    """The broadcast of one batch axis, with the operand that fixed it."""
    if size == 1 or size == known:
        return known, source
    if known == 1:
        return size, name
    raise ValueError(
        f"{name} has {axis} size {size} but {source} has {known}: "
        f"the {axis} sizes of all operands must be equal, or 1 where shared"
    )


def check_shapes(query: Tensor, key: Tensor, value: Tensor, residual: Tensor | None, attn_bias: Tensor | None) -> None:
    """The shape rule: query, key, value and residual all 2-D or 3-D without heads, or all 4-D with heads."""
    operands = {"query": query, "key": key, "value": value}
    if residual is not None:
        operands["residual"] = residual
    heads = query.dim() == 4
    for name, tensor in operands.items():
        if tensor.dim() not in (2, 3, 4):
            raise ValueError(
                f"{name} must be 2-D (L, D), 3-D (B, L, D) or 4-D (B, H, L, D), got shape {_shape(tensor)}"
            )
        if (tensor.dim() == 4) != heads:
            raise ValueError(
                f"{name} has {tensor.dim()} dimensions but query has {query.dim()}: "
                "all operands must be 4-D (with heads) or all at most 3-D (without)"
            )
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(f"key must have the query's width {query.shape[-1]}, got {key.shape[-1]}")
    if query.shape[-1] == 0 or value.shape[-1] == 0:
        raise ValueError(f"query, key and value must be at least 1 wide, got {query.shape[-1]} and {value.shape[-1]}")
    if value.shape[-2] != key.shape[-2]:
        raise ValueError(f"value must have one row for each of the {key.shape[-2]} keys, got {value.shape[-2]}")
    if residual is not None and residual.shape[-2:] != (query.shape[-2], value.shape[-1]):
        raise ValueError(
            f"residual must end in (L, Dv) = ({query.shape[-2]}, {value.shape[-1]}), got shape {_shape(residual)}"
        )
    batch, batch_source, head, head_source = 1, "query", 1, "query"
    for name, tensor in operands.items():
        if tensor.dim() > 2:
            batch, batch_source = _check_batch("batch", name, tensor.shape[0], batch, batch_source)
        if heads:
            head, head_source = _check_batch("head", name, tensor.shape[1], head, head_source)
    if attn_bias is not None:
        _check_bias(attn_bias, query, key, heads, (batch, batch_source), (head, head_source))


def _check_bias(
    attn_bias: Tensor,
    query: Tensor,
    key: Tensor,
    heads: bool,
    batch: tuple[int, str],
    head: tuple[int, str],
) -> None:
    if attn_bias.dim() > (4 if heads else 3) or (heads and attn_bias.dim() == 3):
        allowed = "at most 2-D, or 4-D" if heads else "at most 3-D"
        raise ValueError(f"attn_bias must be {allowed} when query is {query.dim()}-D, got shape {_shape(attn_bias)}")
    score_shape = (query.shape[-2], key.shape[-2])
    for size, expected in zip(reversed(attn_bias.shape[-2:]), reversed(score_shape), strict=False):
        if size != expected and size != 1:
            raise ValueError(
                f"attn_bias must broadcast to the scores (..., L, S) = (..., {score_shape[0]}, {score_shape[1]}), "
                f"got shape {_shape(attn_bias)}"
            )
    if attn_bias.dim() > 2:
        _check_batch("batch", "attn_bias", attn_bias.shape[0], *batch)
    if attn_bias.dim() == 4:
        _check_batch("head", "attn_bias", attn_bias.shape[1], *head)


def _check_ranks(function: str, ranks: dict[str, tuple[Tensor, int]]) -> None:
    for name, (tensor, rank) in ranks.items():
        check_operand(name, tensor)
        shared = rank == 2
        fits = tensor.dim() == rank or (tensor.dim() == 4 and (not shared or tensor.shape[0] == 1))
        if not fits:
            allowed = (
                "shared by all images, (rows, width) or (1, H, rows, width)"
                if shared
                else ("per image, (B, rows, width) or (B, H, rows, width)")
            )
            raise ValueError(
                f"{name} of {function} must be {allowed}, got shape {_shape(tensor)}: "
                "residual_attention takes every other combination"
            )


def check_ssa(query: Tensor, key: Tensor, value: Tensor, residual: Tensor) -> None:
    """Regions ask: query and residual per image, key and value shared."""
    _check_ranks("ssa", {"query": (query, 3), "key": (key, 2), "value": (value, 2), "residual": (residual, 3)})


def check_vsa(query: Tensor, key: Tensor, value: Tensor, residual: Tensor) -> None:
    """Attributes ask: query and residual shared, key and value per image."""
    _check_ranks("vsa", {"query": (query, 2), "key": (key, 3), "value": (value, 3), "residual": (residual, 2)})
