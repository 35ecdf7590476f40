"""The sum over the batch in a fixed order, by the extension modules: equal to the bit from run to run."""

from __future__ import annotations

import torch
from torch import Tensor

from bda_fused import _native

_DTYPES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}


def batch_sum(x: Tensor) -> Tensor:
    """y_j = sum_b x_bj, every column from the first image to the last, outside autograd.

    x: (B, n) on the CPU or a CUDA device, float32, float64, bfloat16 or float16, neighbouring columns adjacent in
    memory, any row stride. Returns: (n,), float64 for float64 and float32 otherwise; zeros where B is 0.

    Raises:
        TypeError: the dtype is none of the four.
        ValueError: the shape, the column stride or the device is another.
        NativeModuleError: the extension module of the device was not built, or does not load.
    """
    if x.dtype not in _DTYPES:
        raise TypeError(f"batch_sum takes float32, float64, bfloat16 or float16, got {x.dtype}")
    if x.dim() != 2:
        raise ValueError(f"batch_sum takes a (B, n) tensor, got shape {tuple(x.shape)}")
    if x.device.type not in ("cpu", "cuda"):
        raise ValueError(f"batch_sum takes CPU or CUDA tensors, got {x.device}")
    batch, columns = x.shape
    if columns > 1 and x.stride(1) != 1:
        raise ValueError(f"batch_sum takes a tensor whose column stride is 1, got {x.stride(1)}")
    y = x.new_empty(columns, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    arguments = (x.data_ptr(), y.data_ptr(), _DTYPES[x.dtype], batch, columns, x.stride(0))
    if x.device.type == "cpu":
        _native.module("_cpu").batch_sum(*arguments, num_threads=torch.get_num_threads())
    else:
        with torch.cuda.device(x.device):
            _native.module("_cuda").batch_sum(*arguments, stream=torch.cuda.current_stream().cuda_stream)
    return y
