"""Which algebra computes an attention module: its projections where they cost least, chosen by FLOPs.

With Q = X W_q + b_q, K = Y W_k + b_k and V = Y W_v + b_v, the scores Q K^T need not be computed from both projections:

    project      Q and K as written
    fold_key     X (K W_q^T)^T + b_q K^T: the query's projection moves into the keys
    merge_key    X (Y W_k W_q^T + b_k W_q^T)^T + b_q K^T: the same, through one merged matrix
    fold_query   (Q W_k^T) Y^T, and a term that is constant along the softmax
    merge_query  (X W_q W_k^T + b_q W_k^T) Y^T

and neither need the values be projected before the map P is applied:

    before       P V
    after        (P Y) W_v + (P 1) b_v

With an output projection W_o, ``before`` applies W_v and then W_o to the source, ``before_merged`` their product,
``after`` their product behind the map, and ``apart`` W_v before and W_o after it. Dropout on the projected keys and
values forbids what bypasses them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple, TypeVar, get_args

import torch

# In the order in which a tie is decided: keys and values that are the source itself are one operand.
Scores = Literal["fold_query", "merge_query", "fold_key", "merge_key", "project"]
Values = Literal["after", "before", "before_merged", "apart"]
_SCORES, _VALUES = get_args(Scores), get_args(Values)
Name = TypeVar("Name", Scores, Values)

# A traced graph serves every batch size, so it is planned for one like this, whatever the batch that traces it.
TRACED_IMAGES = 32


@dataclass(frozen=True)
class Cost:
    """FLOPs (2 per multiply-add) and bytes of operands and results of matrix products; vectors are not counted."""

    flops: int = 0
    bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


def gemm(m: int, n: int, k: int, batch: int = 1, itemsize: int = 4) -> Cost:
    """``batch`` products of (m, k) by (k, n), each operand read and each result written once."""
    return Cost(2 * batch * m * n * k, batch * itemsize * (m * k + k * n + m * n))


class Size(NamedTuple):
    """The sizes of one attention module's call.

    images: B. queries, keys: rows per image. queries_shared, keys_shared: whether all images share them. dim: C.
    """

    images: int
    queries: int
    keys: int
    dim: int
    queries_shared: bool = False
    keys_shared: bool = False
    heads: int = 1
    itemsize: int = 4

    @property
    def query_rows(self) -> int:
        return self.queries * (1 if self.queries_shared else self.images)

    @property
    def key_rows(self) -> int:
        return self.keys * (1 if self.keys_shared else self.images)

    @property
    def result_rows(self) -> int:
        return self.queries * (1 if self.queries_shared and self.keys_shared else self.images)


@dataclass(frozen=True)
class Plan:
    """An algebra for the scores and one for the values."""

    scores: Scores
    values: Values

    def cost(self, size: Size, *, out_proj: bool = False, frozen: bool = False) -> Cost:
        """One forward of the module. ``frozen``: products of parameters and of shared operands are at hand already."""
        return (
            _score_cost(self.scores, size, frozen) + _value_cost(self.values, size, out_proj, frozen) + map_cost(size)
        )


def map_cost(size: Size) -> Cost:
    """Q K^T and P V themselves, which every algebra has."""
    pairs = size.result_rows * size.keys
    operands = (size.query_rows + 2 * size.key_rows + size.result_rows) * size.dim
    return Cost(4 * pairs * size.dim, size.itemsize * (operands + 2 * size.heads * pairs))


def _projections(size: Size, queries: int, keys: int, frozen: bool) -> Cost:
    """So many (C, C) projections of every query row and of every key row."""
    cost = Cost()
    for count, rows, shared in (
        (queries, size.query_rows, size.queries_shared),
        (keys, size.key_rows, size.keys_shared),
    ):
        for _ in range(0 if shared and frozen else count):
            cost = cost + gemm(rows, size.dim, size.dim, itemsize=size.itemsize)
    return cost


def _merged_matrix(size: Size, frozen: bool) -> Cost:
    return Cost() if frozen else gemm(size.dim, size.dim, size.dim, itemsize=size.itemsize)


def _score_cost(scores: Scores, size: Size, frozen: bool) -> Cost:
    if scores == "project":
        return _projections(size, 1, 1, frozen)
    if scores == "fold_key":
        return _projections(size, 0, 2, frozen)
    if scores == "fold_query":
        return _projections(size, 2, 0, frozen)
    one_side = (0, 1) if scores == "merge_key" else (1, 0)
    return _merged_matrix(size, frozen) + _projections(size, *one_side, frozen)


def _value_cost(values: Values, size: Size, out_proj: bool, frozen: bool) -> Cost:
    after_map = gemm(size.result_rows, size.dim, size.dim, itemsize=size.itemsize)
    if values == "before":
        return _projections(size, 0, 2 if out_proj else 1, frozen)
    if values == "before_merged":
        return _merged_matrix(size, frozen) + _projections(size, 0, 1, frozen)
    if values == "after":
        return (_merged_matrix(size, frozen) if out_proj else Cost()) + after_map
    return _projections(size, 0, 1, frozen) + after_map


def allowed(*, out_proj: bool, heads: int, kv_dropout: bool) -> tuple[tuple[Scores, ...], tuple[Values, ...]]:
    """The algebras that are exact for a module: for scores and for values."""
    if heads > 1:  # a fold would make every head as wide as the features
        return ("project",), ("apart",) if out_proj else ("before",)
    if kv_dropout:  # masks on the projected keys and values: only what acts on them afterwards can move
        return ("project", "fold_key"), ("before", "apart") if out_proj else ("before",)
    return _SCORES, _VALUES if out_proj else ("after", "before")


def choose(
    size: Size,
    *,
    out_proj: bool = False,
    kv_dropout: bool = False,
    frozen: bool = False,
) -> Plan:
    """The plan of fewest FLOPs, or the one that ``force`` demands.

    Bytes do not enter: every product has C columns, so its bytes rise with its rows as its FLOPs do, and weighing them
    in changes no choice (a test tries).
    """
    cheapest = _cheapest if torch.compiler.is_compiling() else _remembered_cheapest
    plan = cheapest(size, out_proj, kv_dropout, frozen)
    if _forced is None:
        return plan
    return _forced.apply(plan, *allowed(out_proj=out_proj, heads=size.heads, kv_dropout=kv_dropout))


def _cheapest(size: Size, out_proj: bool, kv_dropout: bool, frozen: bool) -> Plan:
    scores, values = allowed(out_proj=out_proj, heads=size.heads, kv_dropout=kv_dropout)
    return Plan(
        _least(scores, [_score_cost(name, size, frozen).flops for name in scores]),
        _least(values, [_value_cost(name, size, out_proj, frozen).flops for name in values]),
    )


def _least(names: tuple[Name, ...], flops: list[int]) -> Name:
    """The first name of fewest FLOPs; a plain loop, because ``min`` cannot be traced over symbolic sizes."""
    best = 0
    for index, count in enumerate(flops):
        if count < flops[best]:
            best = index
    return names[best]


_remembered_cheapest = lru_cache(maxsize=1024)(_cheapest)


@dataclass(frozen=True)
class _Force:
    scores: Scores | None
    values: Values | None

    def apply(self, plan: Plan, scores: tuple[Scores, ...], values: tuple[Values, ...]) -> Plan:
        for name, given, options in (("scores", self.scores, scores), ("values", self.values, values)):
            if given is not None and given not in options:
                raise ValueError(f"{name}={given!r} is not exact for this module, allowed are {', '.join(options)}")
        return Plan(self.scores or plan.scores, self.values or plan.values)


_forced: _Force | None = None


@contextmanager
def force(*, scores: Scores | None = None, values: Values | None = None) -> Iterator[None]:
    """Inside the context every fused module uses these algebras; ValueError where one is not exact."""
    for name, given, options in (("scores", scores, get_args(Scores)), ("values", values, get_args(Values))):
        if given is not None and given not in options:
            raise ValueError(f"{name} must be one of {', '.join(options)}, got {given!r}")
    global _forced
    before, _forced = _forced, _Force(scores, values)
    try:
        yield
    finally:
        _forced = before


def natural_cost(size: Size) -> Cost:
    """The module as it is usually written: shared rows expanded to the batch, then projected, then attended."""
    expanded = size._replace(queries_shared=False, keys_shared=False)
    return Plan("project", "before").cost(expanded)
