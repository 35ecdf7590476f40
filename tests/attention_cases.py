"""Forms of residual attention, and one check for all of them: outputs and gradients against float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bda_fused import functional as F
from bda_fused.testing import assert_close, philox_keep, record_seeds

B, H, L, S, DK, DV = 3, 2, 5, 19, 7, 37


@dataclass(frozen=True)
class Case:
    """Shapes of the operands, None for those that are not there, and the options of ``functional.attend``.

    value None: the key is the value. residual "query": the query is the residual. masked: what a row of the bias is
    filled with, and another but for two keys.
    """

    query: tuple[int, ...]
    key: tuple[int, ...]
    value: tuple[int, ...] | None
    residual: tuple[int, ...] | str | None = None
    bias: tuple[int, ...] | None = None
    scale: float = 0.6
    dropout_p: float = 0.0
    need_row_sum: bool = False
    masked: float | None = None
    residual_dtype: torch.dtype | None = None

    def operands(self, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
        shapes = {"query": self.query, "key": self.key, "value": self.value, "bias": self.bias}
        if isinstance(self.residual, tuple):
            shapes["residual"] = self.residual
        made = {}
        for name, shape in shapes.items():
            if shape is not None:
                x = torch.randn(shape)
                if name == "bias" and self.masked is not None:
                    x[..., 1, :], x[..., 0, 2:] = self.masked, self.masked
                kind = (
                    torch.float32 if name == "bias" else (self.residual_dtype or dtype) if name == "residual" else dtype
                )
                made[name] = x.to(device=device, dtype=kind).requires_grad_()
        return made


def heads(*sizes: int) -> tuple[int, ...]:
    return sizes


CASES = {
    "SSA": Case((B, L, DK), (S, DK), (S, DV), (B, L, DV)),
    "SSA with a key bias": Case((B, L, DK), (S, DK), (S, DV), (B, L, DV), bias=(S,), need_row_sum=True),
    "SSA of several tiles": Case((B, 70, 45), (37, 45), (37, 70), (B, 70, 70), bias=(37,)),
    "SSA absorbed, the query is the residual": Case((B, L, DK), (S, DK), (S, DK), "query", bias=(S,)),
    "SSA with two column groups": Case((2, 33, 20), (150, 20), (150, 35), (2, 33, 35), bias=(150,), dropout_p=0.3),
    "VSA": Case((L, DK), (B, S, DK), (B, S, DV), (L, DV)),
    "VSA, key is value": Case((L, DK), (B, S, DK), None, (L, DK), need_row_sum=True, dropout_p=0.4),
    "VSA, shared query is the residual": Case((L, DK), (B, S, DK), (B, S, DK), "query"),
    "VSA with a query and a bias per image": Case((B, L, DK), (B, S, DK), None, None, bias=(B, 1, S)),
    "VSA with two column groups": Case((70, 33), (2, 197, 33), (2, 197, 40), (70, 40)),
    "RSA": Case((B, S, DK), (B, S, DK), None, None, bias=(S, S), need_row_sum=True),
    "RSA with dropout": Case((B, S, DK), (B, S, DK), (B, S, DV), None, bias=(S, S), dropout_p=0.2),
    "all shared": Case((L, DK), (S, DK), (S, DV), (L, DV)),
    "the map shared, values per image": Case((L, DK), (S, DK), (B, S, DV), None, dropout_p=0.5),
    "the map shared, residual per image": Case((L, DK), (S, DK), (S, DV), (B, L, DV), bias=(L, 1)),
    "scalar bias": Case((B, L, DK), (S, DK), (S, DV), None, bias=()),
    "bias of everything": Case((B, L, DK), (S, DK), (S, DV), None, bias=(B, L, S)),
    "heads": Case((B, H, L, DK), (1, H, S, DK), (B, 1, S, DV), (1, 1, L, DV), bias=(1, H, L, S), dropout_p=0.3),
    "heads, shared keys": Case((B, H, L, DK), (1, 1, S, DK), (1, 1, S, DV), None, bias=(B, 1, 1, S)),
    "heads, keys per head": Case((B, H, L, DK), (1, H, S, DK), (1, H, S, DV), (B, H, L, DV), dropout_p=0.3),
    "masked keys and rows": Case((B, L, DK), (S, DK), (S, DV), (B, L, DV), bias=(L, S), masked=-torch.inf),
    "masked by the least number": Case(
        (B, L, DK), (S, DK), (S, DV), (B, L, DV), bias=(L, S), masked=torch.finfo(torch.float32).min
    ),
    "everything dropped": Case((B, L, DK), (S, DK), (S, DV), (B, L, DV), dropout_p=1.0, need_row_sum=True),
    "negative scale": Case((B, L, DK), (S, DK), (S, DV), None, scale=-0.9),
    "scale zero": Case((B, L, DK), (S, DK), (S, DV), None, scale=0.0),
    "SSA of one region": Case((B, 1, DK), (S, DK), (S, DV), (B, 1, DV)),
    "one of each": Case((1, 1), (1, 1), (1, 1), (1, 1)),
    "residual of another dtype": Case(
        (B, L, DK), (S, DK), (S, DV), (B, L, DV), residual_dtype=torch.float64, dropout_p=0.2
    ),
    "long score rows": Case((2, 7, 9), (601, 9), (601, 20), (2, 7, 20), bias=(601,), need_row_sum=True, dropout_p=0.3),
    "long score rows per image": Case((66, 9), (2, 601, 9), None, None, bias=(66, 601), need_row_sum=True),
}


def natural(case: Case, operands: dict[str, Tensor], mask: Tensor | None) -> tuple[Tensor, ...]:
    """Y, the map and the row sums in plain torch ops, products in the operands' dtype and the softmax in at least fp32."""
    query, key = operands["query"], operands["key"]
    value = operands.get("value", key)
    dtype = torch.promote_types(query.dtype, torch.float32)
    scores = case.scale * (query @ key.mT).to(dtype)
    if "bias" in operands:
        scores = scores + operands["bias"]
    dead = (scores == -torch.inf).all(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(dead, 0.0), -1).masked_fill(dead, 0.0)
    dropped = weights if mask is None else weights * mask.to(dtype)
    y = dropped.to(value.dtype) @ value
    residual = query if case.residual == "query" else operands.get("residual")
    if residual is not None:
        y = residual + y
    return y, weights.to(value.dtype), dropped.sum(-1)


def check(case: Case, dtype: torch.dtype, *, backend: str, device: str = "cpu", seed: int = 0) -> None:
    """AssertionError unless outputs and every gradient of ``backend`` obey the rule of numerics."""
    torch.manual_seed(seed)
    operands = case.operands(dtype, device)
    with record_seeds() as seeds:
        results = F.attend(
            operands["query"],
            operands["key"],
            operands.get("value"),
            operands.get("residual"),
            scale=case.scale,
            attn_bias=operands.get("bias"),
            dropout_p=case.dropout_p,
            residual_is_query=case.residual == "query",
            need_weights=True,
            need_row_sum=case.need_row_sum,
            backend=backend,
        )
    results = [x for x in results if x is not None]
    upstream = [torch.randn(x.shape, device=device, dtype=x.dtype) for x in results]
    mask = None
    if case.dropout_p:
        shape = (*results[0].shape[:-1], operands["key"].shape[-2])
        mask = philox_keep(seeds[0], case.dropout_p, shape).double()
        mask = mask / (1 - case.dropout_p) if case.dropout_p < 1 else torch.zeros_like(mask)

    def outcome(kind: torch.dtype | None) -> list[Tensor]:
        leaves = {n: x.detach().to(kind or x.dtype).requires_grad_() for n, x in operands.items()}
        expected = natural(case, leaves, mask)[: len(results)]
        expected = [x.expand(y.shape) for x, y in zip(expected, results, strict=True)]
        gradients = torch.autograd.grad(
            expected, list(leaves.values()), [g.to(x.dtype) for g, x in zip(upstream, expected, strict=True)]
        )
        return [*expected, *gradients]

    names = ["Y", "map", "row sums"][: len(results)] + [f"gradient of {name}" for name in operands]
    ours = [*results, *torch.autograd.grad(results, list(operands.values()), upstream)]
    for name, x, truth, yardstick in zip(names, ours, outcome(torch.float64), outcome(None), strict=True):
        term = _largest_term(name, operands, upstream[0])
        assert_close(x, truth, yardstick, gradient="gradient" in name, largest_term=term, name=name)
        assert x.isfinite().all() or not truth.isfinite().all(), name


def _largest_term(name: str, operands: dict[str, Tensor], grad_y: Tensor) -> float:
    """A bound on the largest summed term of a gradient that may be 0 in truth."""
    if "gradient" not in name:
        return 0.0
    value = operands.get("value", operands["key"])
    return float((grad_y.abs().max() * value.abs().max()).detach())
