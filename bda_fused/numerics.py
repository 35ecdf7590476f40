"""The dtypes in which a result is computed: one rule for every backend and module."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch
from torch import Tensor

LOW_PRECISION = (torch.float16, torch.bfloat16)


def has_fast_gemm(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether matrix products of ``dtype`` run at full speed on ``device``.

    A CPU multiplies bfloat16 and float16 quickly only with instructions for it; without them torch's own
    path is ten times and more slower than float32.
    """
    if dtype not in LOW_PRECISION or device.type != "cpu":
        return True
    if dtype == torch.float16:
        return torch.cpu._is_amx_fp16_supported()
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def gemm_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of the operands of matrix products: ``dtype`` itself, or float32 where that is faster."""
    return dtype if has_fast_gemm(dtype, device) else torch.float32


def softmax_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of scores, softmax and of every fold of weights: float32, and float64 for float64."""
    return torch.float32 if dtype in LOW_PRECISION else dtype


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x.to(dtype)``, without a call of torch where there is nothing to do: small problems notice dozens of them."""
    return x if x.dtype == dtype else x.to(dtype)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of autocast on the device, None where it is off or the device has none (such as "meta")."""
    if not _has_autocast(device.type) or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


_has_autocast = lru_cache(torch.amp.is_autocast_available)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context in which autocast is off on the device; entering torch's own costs more, so only where it is on."""
    if autocast_dtype(device) is not None:
        return torch.autocast(device.type, enabled=False)
    return NO_CONTEXT


NO_CONTEXT = nullcontext()
