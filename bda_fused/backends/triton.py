"""The Triton backend for GPUs from sm_80 up; under TRITON_INTERPRET=1 Triton's interpreter runs it on CPU tensors."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from bda_fused.backends import eager
from bda_fused.backends.problem import BackwardOptions, Options, Problem
from bda_fused.shapes import batch_of, padded_rows

# The backward reads the map that the forward has stored: fewer products than computing it anew, and no more bytes.
KEEPS_WEIGHTS = True
# A map that nobody asked for is kept in rows of a pitch of so many elements: all rows begin at 32-byte sectors.
WEIGHTS_PITCH = 16

# The rows that the last tile, of at most 128, has behind the last one are numbered too, in 32 bits.
MOST_ROWS = 2**31 - 128

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@lru_cache  # Triton too reads it once, when it defines a kernel
def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def availability() -> str | None:
    """None, or one sentence that says why this backend cannot run here."""
    if find_spec("triton") is None:
        return "triton is not installed: it comes with the CUDA builds of torch for Linux"
    if not _interpreted() and not torch.cuda.is_available():
        return "the triton backend needs an NVIDIA GPU and torch finds none"
    return None


def can_run(problem: Problem) -> str | None:
    """None, or one sentence that says why this backend cannot take the problem."""
    device = problem.device
    if _interpreted() and device.type != "cpu":
        return f"under TRITON_INTERPRET=1 the triton backend takes CPU tensors, got {device}"
    if not _interpreted() and device.type != "cuda":
        return f"the triton backend takes CUDA tensors, got {device}"
    reason = availability()
    if reason is not None:
        return reason
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        major, minor = torch.cuda.get_device_capability(device)
        return f"the triton backend needs a GPU of compute capability 8.0 or newer, {device} has {major}.{minor}"
    if problem.dtype not in _DTYPES:
        return (
            f"the triton backend takes float16, bfloat16 and float32, got {str(problem.dtype).removeprefix('torch.')}"
        )
    images, heads, rows, _ = problem.scores
    if images * heads * rows > MOST_ROWS:
        return f"the triton backend takes at most {MOST_ROWS} query rows, got {images * heads * rows}"
    return None


def advice(problem: Problem) -> str | None:
    """None, or one sentence that says why another backend should be faster."""
    return None if _interpreted() else problem.advice_against_fusing("triton")


def forward(
    problem: Problem,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    residual: Tensor | None,
    attn_bias: Tensor | None,
    seed: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Y, the map before dropout, its row sums after dropout, and an empty log-sum-exp: this backend keeps the map."""
    scores = problem.scores
    if 0 in scores:  # there is nothing to launch
        return eager.forward(problem, query, key, value, residual, attn_bias, seed, options)
    from bda_fused.kernels import residual_attention

    scored = [query, key] if attn_bias is None else [query, key, attn_bias]
    weights = value.new_empty(0)
    if options.need_weights or options.need_grad:
        weights = padded_rows(value, (*batch_of(*scored), *scores[2:]), 1 if options.need_weights else WEIGHTS_PITCH)
    row_sum = query.new_empty(scores[:3] if options.need_row_sum else 0, dtype=torch.float32)
    with _on(query.device):
        y = residual_attention.forward(
            scores,
            problem.result_dtype,
            query,
            key,
            value,
            residual,
            attn_bias,
            seed,
            options.scale,
            options.dropout_p,
            weights if options.need_weights or options.need_grad else None,
            row_sum if options.need_row_sum else None,
        )
    return y, weights, row_sum, query.new_empty(0, dtype=torch.float32)


def backward(
    problem: Problem,
    grad_y: Tensor,
    grad_weights: Tensor | None,
    grad_row_sum: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None,
    weights: Tensor,
    lse: Tensor,
    seed: Tensor | None,
    key_is_value: bool,
    options: BackwardOptions,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and attn_bias, of their shapes; empty where ``options.needs`` says no."""
    if 0 in problem.scores:
        operands = (grad_y, grad_weights, grad_row_sum, query, key, value, attn_bias, weights, lse, seed)
        return eager.backward(problem, *operands, key_is_value, options)
    from bda_fused.kernels import residual_attention

    with _on(query.device):
        return residual_attention.backward(
            problem.scores,
            grad_y,
            grad_weights,
            grad_row_sum,
            query,
            key,
            value,
            attn_bias,
            weights,
            seed,
            options.scale,
            options.dropout_p,
            options.residual_is_query,
            key_is_value,
            options.needs,
        )


def _on(device: torch.device) -> AbstractContextManager[object]:
    """A context in which ``device`` is the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
