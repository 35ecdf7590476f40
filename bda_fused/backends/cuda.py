"""The CUDA C++ backend for GPUs from sm_80 up.

The forward is one kernel. So is the backward up to dS and dQ; what is left are long matrix products, dK = dS^T Q and
dV = (P * M)^T dY, and dQ where all images share the queries: one more kernel, and the sums of its partial results.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from bda_fused import _native
from bda_fused.backends import cuda_plan, cuda_products
from bda_fused.backends.batch_sum import batch_sum
from bda_fused.backends.cuda_plan import Device, Launch, RowProblem
from bda_fused.backends.cuda_products import Sum
from bda_fused.backends.problem import BackwardOptions, Options, Problem
from bda_fused.shapes import batch_of, padded_rows, with_unit_stride

# The map is written by the forward and read by the backward: that saves a third of the backward's products.
KEEPS_WEIGHTS = True
# The pitch of the rows of a kept map is a multiple of so many elements: all rows can be copied 16 bytes at a time.
# kKeptMapPitch of csrc/cuda/arguments.h.
WEIGHTS_PITCH = 8

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MOST = 2**28  # rows, keys or columns, which the kernels count in 32 bits; what they address has 64


def availability() -> str | None:
    """None, or one sentence that says why this backend cannot run here."""
    reason = _native.status("_cuda")
    if reason is not None:
        return reason
    module = _native.module("_cuda")
    runtime, driver = module.runtime_version(), module.driver_version()
    if driver == 0:
        return "the cuda backend needs an NVIDIA driver, and there is none"
    if driver // 1000 < runtime // 1000:
        return (
            f"the cuda backend was built with CUDA {runtime // 1000}, and the driver runs CUDA {driver // 1000} at most"
        )
    return None


def can_run(problem: Problem) -> str | None:
    """None, or one sentence that says why this backend cannot take the problem."""
    if problem.device.type != "cuda":
        return f"the cuda backend takes CUDA tensors, got {problem.device}"
    for dtype in (problem.dtype, problem.result_dtype):
        if dtype not in _DTYPES:
            name = str(dtype).removeprefix("torch.")
            return f"the cuda backend computes in float32, bfloat16 and float16, got {name}"
    *outer, keys = problem.scores
    if max(math.prod(outer), keys, *problem.widths) > _MOST:
        return f"the cuda backend takes up to {_MOST} rows, keys and columns, got scores {problem.scores}"
    reason = availability()
    if reason is not None:
        return reason
    capability = torch.cuda.get_device_capability(problem.device)
    if capability < (8, 0):
        return f"the cuda backend needs compute capability 8.0 or newer, got {capability[0]}.{capability[1]}"
    built = _native.build_info()["_cuda"]
    if not has_code_for(capability, tuple(built["arches"]), tuple(built["ptx"])):
        built_for = ", ".join(built["arches"] + built["ptx"])
        return (
            f"the cuda backend was built for {built_for}, and this GPU has compute capability "
            f"{capability[0]}.{capability[1]}; install again with it in TORCH_CUDA_ARCH_LIST"
        )
    return None


@lru_cache  # asked at every call
def has_code_for(capability: tuple[int, int], arches: tuple[str, ...], ptx: tuple[str, ...]) -> bool:
    """Whether a module built for these ("sm_80", "compute_80") runs: code on its own major version's GPUs from its
    minor version up, PTX on every newer GPU.
    """
    major, minor = capability
    codes = [divmod(int(arch.removeprefix("sm_")), 10) for arch in arches]
    sources = [divmod(int(arch.removeprefix("compute_")), 10) for arch in ptx]
    return any(x == major and y <= minor for x, y in codes) or any(source <= capability for source in sources)


def advice(problem: Problem) -> str | None:
    """None, or one sentence that says why another backend should be faster: by the model of docs/gpu_model.md."""
    return problem.advice_against_fusing("cuda")


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
    *outer, queries, keys = problem.scores
    scored = [query, key] if attn_bias is None else [query, key, attn_bias]
    y = query.new_empty((*outer, queries, value.shape[3]), dtype=problem.result_dtype)
    weights = value.new_empty(0)
    if options.need_weights or options.need_grad:
        pitch = 1 if options.need_weights else WEIGHTS_PITCH
        weights = padded_rows(value, (*batch_of(*scored), queries, keys), pitch)
    row_sum = query.new_empty((*outer, queries) if options.need_row_sum else 0, dtype=torch.float32)
    lse = row_sum.new_empty(0)
    if keys == 0:  # nothing to attend to
        return y.zero_() if residual is None else y.copy_(residual), weights, row_sum.zero_(), lse
    if y.numel() == 0:
        return y, weights, row_sum, lse

    launches: list[Launch] = []
    first, second = _aligned((key, value), launches)
    assert first is not None
    device = _device(query.device)
    left = with_unit_stride(query)
    out = _accumulator(y, keys)
    rows = RowProblem(
        device,
        "forward",
        problem.scores,
        left=left,
        first=first,
        second=second,
        added=left if residual is query else None if residual is None else with_unit_stride(residual),
        out=out,
        weights=weights if weights.numel() else None,
        scale=options.scale,
        bias=None if attn_bias is None else with_unit_stride(attn_bias.float()),
        seed=seed,
        dropout_p=options.dropout_p,
        pointers={
            "row_sum": row_sum if options.need_row_sum else None,
            "statistics": _statistics(row_sum, problem),
        },
    )
    _run(launches + rows.launches(), query.device)
    return y if out is y else y.copy_(out), weights, row_sum, lse


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
    """Gradients of query, key, value and attn_bias, of their shapes; empty where ``options.needs`` says no.

    With ``residual_is_query`` the query's gradient includes the residual's, with ``key_is_value`` the key's includes
    the value's.
    """
    scale, dropout_p, residual_is_query, needs, _ = options
    need_query, need_key, need_value, need_bias = needs
    dy = with_unit_stride(grad_y.to(query.dtype))
    grad_query, grad_key, grad_value, grad_bias = (query.new_empty(0) for _ in range(4))
    *outer, _, keys = problem.scores
    if keys == 0 or dy.numel() == 0:  # nothing was attended to
        grad_query, grad_key, grad_value = (x.new_zeros(x.shape) for x in (query, key, value))
        if residual_is_query:
            grad_query = dy.sum_to_size(query.shape)
        if attn_bias is not None:
            grad_bias = torch.zeros_like(attn_bias)
        return _needed((grad_query, grad_key, grad_value, grad_bias), needs)

    # The kernel's results: dS for the long products, P * M for dV, dQ where every row has its own query, and what the
    # bias's gradient is summed from.
    device = _device(query.device)
    query_per_row = list(query.shape[:2]) == outer
    scores_grad = _map_like(dy, problem) if need_key or (need_query and not query_per_row) else None
    need_map = need_value or (need_key and key_is_value)
    dropped = _map_like(dy, problem) if need_map and seed is not None else None
    need_summands = False
    if need_bias:
        assert attn_bias is not None
        need_summands = attn_bias.shape[3] > 1
        if not need_summands:  # the same for all keys of a row: it cannot matter
            grad_bias = torch.zeros_like(attn_bias)
    out = None
    if need_query and query_per_row:
        grad_query = query.new_empty(query.shape)
        out = _accumulator(grad_query, keys)
    summands = None
    launches: list[Launch] = []
    if scores_grad is not None or dropped is not None or out is not None or need_summands:
        first, second = _aligned((value, None if out is None else key), launches)
        assert first is not None
        rows = RowProblem(
            device,
            "backward",
            problem.scores,
            left=dy,
            first=first,
            second=second,
            added=dy if residual_is_query else None,
            out=out,
            weights=weights,
            scale=scale,
            weights_grad=None if grad_weights is None else with_unit_stride(grad_weights),
            seed=seed,
            dropout_p=dropout_p,
            pointers={
                "row_sum_grad": None if grad_row_sum is None else grad_row_sum.contiguous(),
                "scores_grad": scores_grad,
                "dropped": dropped,
                "statistics": _statistics(query, problem),
            },
        )
        if need_summands:
            assert attn_bias is not None
            by_key = tuple(attn_bias.shape) == (1, 1, 1, keys)
            shape = (rows.shape().grid, keys) if by_key else problem.scores
            summands = query.new_empty(shape, dtype=torch.float32)
            rows.pointers["bias_grad_sums" if by_key else "bias_grad"] = summands
        launches += rows.launches()

    batch = problem.scores[:2]
    values = (weights if dropped is None else dropped, dy)
    sums = []
    if need_value:
        grad_value = value.new_empty(value.shape)
        sums.append(Sum([values], grad_value))
    if need_key:
        assert scores_grad is not None
        grad_key = key.new_empty(key.shape)
        terms = [(scores_grad, with_unit_stride(query))]  # scaled, as the kernel leaves it
        sums.append(Sum([*terms, values] if key_is_value else terms, grad_key))
    if sums:
        launches += cuda_products.launches("keys", sums, batch, device)
    if need_query and not query_per_row:
        assert scores_grad is not None
        grad_query = query.new_empty(query.shape)
        of_query = Sum([(scores_grad, with_unit_stride(key))], grad_query, added=dy if residual_is_query else None)
        launches += cuda_products.launches("queries", [of_query], batch, device)
    _run(launches, query.device)
    if out is not None and out is not grad_query:
        grad_query.copy_(out)
    if summands is not None and attn_bias is not None:
        grad_bias = _summed(summands, attn_bias.shape).to(attn_bias.dtype)
    return _needed((grad_query, grad_key, grad_value, grad_bias), needs)


def _needed(grads: tuple[Tensor, ...], needs: list[bool]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    query, key, value, bias = (x if need else x.new_empty(0) for x, need in zip(grads, needs, strict=True))
    return query, key, value, bias


def _map_like(x: Tensor, problem: Problem) -> Tensor:
    """(B, H, L, S) in the kernels' padded rows."""
    return padded_rows(x, problem.scores, WEIGHTS_PITCH)


def _accumulator(out: Tensor, keys: int) -> Tensor:
    """Where the kernel writes ``out``: several groups of keys add up in float32."""
    if len(cuda_plan.key_groups(keys)) == 1 or out.dtype == torch.float32:
        return out
    return torch.empty_like(out, dtype=torch.float32)


def _aligned(operands: Sequence[Tensor | None], launches: list[Launch]) -> list[Tensor | None]:
    """Keys and values as the kernel loads them: as they are, or packed once, by a launch that is added."""
    packed: dict[tuple[object, ...], Tensor] = {}
    result: list[Tensor | None] = []
    for x in operands:
        if x is not None:
            x = with_unit_stride(x)
            if not cuda_plan.is_aligned(x):
                place = (x.data_ptr(), x.shape, x.stride())
                if place not in packed:
                    packed[place], launch = cuda_plan.pack(x)
                    launches.append(launch)
                x = packed[place]
        result.append(x)
    return result


def _statistics(x: Tensor, problem: Problem) -> Tensor | None:
    """What the groups of keys know of each other, where there are several: two numbers of each for every row."""
    groups = len(cuda_plan.key_groups(problem.scores[3]))
    return x.new_empty((2, groups, *problem.scores[:3]), dtype=torch.float32) if groups > 1 else None


def _summed(x: Tensor, shape: Sequence[int]) -> Tensor:
    """(summands, S), or (B, H, L, S), summed in a fixed order to the ``shape`` of a bias."""
    if x.dim() == 2:
        return batch_sum(x).view(*shape)
    if tuple(shape) == (1, 1, *x.shape[2:]):
        return batch_sum(x.flatten(2).flatten(0, 1)).view(*shape)
    return x.sum_to_size(*shape)


@lru_cache
def _device(device: torch.device) -> Device:
    properties = torch.cuda.get_device_properties(device)
    return Device(properties.multi_processor_count, properties.shared_memory_per_block_optin)  # type: ignore[attr-defined]


def _run(launches: Sequence[Launch], device: torch.device) -> None:
    """Enqueues the launches on the device's current stream."""
    module = _native.module("_cuda")
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream().cuda_stream
        for launch in launches:
            try:
                module.launch(
                    launch.kernel, launch.grid, launch.block, launch.shared, bytes(launch.arguments), stream=stream
                )
            except RuntimeError as error:
                raise RuntimeError(f"{error}; its operands: {launch.what}") from error
