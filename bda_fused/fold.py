"""The algebras of plan.py on an attention module's parameters: from its inputs to the operands of residual attention.

Folds of weights, and of operands that all images share, run in float32 (float64 for float64) and are rounded once to
the dtype of the products. Where the key is never projected, b_k shifts all scores of a row alike and cannot matter: it
stays connected, with a gradient of zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from bda_fused import functional, plan
from bda_fused.memo import is_frozen, once
from bda_fused.numerics import autocast_dtype, cast, gemm_dtype, softmax_dtype, without_autocast

if TYPE_CHECKING:
    from bda_fused.reference import Attention


T = TypeVar("T")


class Output(NamedTuple):
    """What is applied to P V: ``(P V) weight^T + (P 1) row_bias + bias``, None for what is not needed."""

    weight: Tensor | None = None
    row_bias: Tensor | None = None
    bias: Tensor | None = None


class Dtypes(NamedTuple):
    """result: of the module without its residual. gemm: of the products. fold: of the folds."""

    result: torch.dtype
    gemm: torch.dtype
    fold: torch.dtype

    @classmethod
    def of(cls, module: Attention, x: Tensor) -> Dtypes:
        dtype = module.q_proj.weight.dtype
        autocast = autocast_dtype(x.device)
        if autocast is not None and dtype != torch.float64:
            dtype = autocast
        return cls(dtype, gemm_dtype(dtype, x.device), softmax_dtype(dtype))

    def of_rows(self, x: Tensor) -> torch.dtype:
        """Rows that all images share are few: they are projected like a fold. Rows of every image are products."""
        return self.fold if x.dim() == 2 else self.gemm


def is_plain(module: Attention) -> bool:
    """Whether weights and biases say all about the projections: nn.Linear, parametrised or not, and without hooks."""
    for projection in (module.q_proj, module.k_proj, module.v_proj, module.out_proj):
        if projection is None:
            continue
        if not isinstance(projection, nn.Linear) or type(projection).forward is not nn.Linear.forward:
            return False
        if projection._forward_hooks or projection._forward_pre_hooks:
            return False
        if projection._backward_hooks or projection._backward_pre_hooks:
            return False
    return True


def attend(
    module: Attention,
    queries: Tensor,
    source: Tensor,
    *,
    attn_bias: Tensor | None = None,
    images: int | None = None,
    need_weights: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """What ``module`` computes for queries (B, L, C) or (L, C) that ask the rows of source (B, S, C) or (S, C).

    attn_bias (L, S), finite, is added to the scaled scores. ``images`` asks for so many results, each with its own
    dropout mask, of queries and source that all images share. Returns Y, and the map before dropout or None.
    """
    dtypes = Dtypes.of(module, queries)
    _check_inputs(module, queries, source, dtypes)
    dropout_p = module.dropout if module.training else 0.0
    heads = module.num_heads
    with without_autocast(queries.device):
        algebra = _choose(module, queries, source, dtypes)
        fold = _Fold(module, dtypes, map_dropped=dropout_p > 0)
        x = cast(queries, dtypes.of_rows(queries))
        y = x if source is queries else cast(source, dtypes.of_rows(source))
        query, key, bias = fold.scores(algebra.scores, x, y)
        value, output = fold.values(algebra.values, y)
        if attn_bias is not None:
            bias = attn_bias if bias is None else bias + attn_bias
        residual = queries if module.residual else None
        in_op = residual is not None and heads == 1 and output.weight is None and output.bias is None
        one_operand = in_op and residual is query and images is None
        op_residual = residual if in_op and not one_operand else None
        if images is not None:  # a residual per image, in which all are the same, asks for a mask per image
            op_residual = (query.new_zeros(()) if op_residual is None else op_residual).expand(images, *query.shape)
        result, weights, row_sum = functional.attend(
            _operand(query, dtypes.gemm, heads),
            _operand(key, dtypes.gemm, heads),
            None if value is key else _operand(value, dtypes.gemm, heads),
            None if op_residual is None else _split(op_residual, heads),
            scale=module.scale * module.kv_scale,
            attn_bias=bias,
            dropout_p=dropout_p,
            residual_is_query=one_operand,
            need_weights=need_weights,
            need_row_sum=output.row_bias is not None and dropout_p > 0,
        )
        if heads > 1:
            result = _join(result)
            if queries.dim() == source.dim() == 2 and images is None:
                result, weights = result[0], None if weights is None else weights[0]
        result = fold.apply(output, result, row_sum)
        if residual is not None and not in_op:
            result = result + residual
        dtype = dtypes.result if residual is None else torch.promote_types(residual.dtype, dtypes.result)
        return cast(result, dtype), None if weights is None else cast(weights, dtypes.result)


def _check_inputs(module: Attention, queries: Tensor, source: Tensor, dtypes: Dtypes) -> None:
    name, dim = type(module).__name__, module.q_proj.in_features
    for x in (queries, source):
        if x.dim() not in (2, 3) or x.shape[-1] != dim:
            raise ValueError(
                f"the inputs of {name} must be (rows, {dim}) or (B, rows, {dim}), got shape {tuple(x.shape)}"
            )
        if x.dtype != dtypes.result and autocast_dtype(x.device) is None:
            raise TypeError(
                f"the inputs of {name} must have the parameters' dtype {dtypes.result} outside autocast, got {x.dtype}"
            )
        if not x.is_floating_point():
            raise TypeError(f"the inputs of {name} must be floating-point tensors, got {x.dtype}")
    for size, other in zip(reversed(queries.shape[:-2]), reversed(source.shape[:-2]), strict=False):
        if size != other and size != 1 and other != 1:
            raise ValueError(
                f"the inputs of {name} must have equal batch sizes, or 1, "
                f"got shapes {tuple(queries.shape)} and {tuple(source.shape)}"
            )


def _choose(module: Attention, queries: Tensor, source: Tensor, dtypes: Dtypes) -> plan.Plan:
    images = queries.shape[0] if queries.dim() == 3 else source.shape[0] if source.dim() == 3 else 1
    size = plan.Size(
        images=plan.TRACED_IMAGES if torch.compiler.is_compiling() else images,
        queries=queries.shape[-2],
        keys=source.shape[-2],
        dim=queries.shape[-1],
        queries_shared=queries.dim() == 2,
        keys_shared=source.dim() == 2,
        heads=module.num_heads,
        itemsize=dtypes.gemm.itemsize,
    )
    return plan.choose(
        size,
        out_proj=module.out_proj is not None,
        kv_dropout=module.training and module.kv_dropout > 0,
        frozen=is_frozen(module),
    )


class _Fold:
    """The parameters of one module in the fold dtype, and one method for each algebra."""

    def __init__(self, module: Attention, dtypes: Dtypes, map_dropped: bool) -> None:
        self.module, self.dtypes, self.map_dropped = module, dtypes, map_dropped
        self.w_q, self.b_q = self._parameters(module.q_proj)
        self.w_k, self.b_k = self._parameters(module.k_proj)
        self.w_v, self.b_v = self._parameters(module.v_proj)
        self.w_o: Tensor | None = None
        self.b_o: Tensor | None = None
        if module.out_proj is not None:
            self.w_o, self.b_o = self._parameters(module.out_proj)
        if module.kv_scale != 1:  # of the keys it multiplies the scale of the scores
            self.w_v = self.w_v * module.kv_scale
            self.b_v = None if self.b_v is None else self.b_v * module.kv_scale

    def _parameters(self, linear: nn.Linear) -> tuple[Tensor, Tensor | None]:
        fold, bias = self.dtypes.fold, linear.bias
        return cast(linear.weight, fold), None if bias is None else cast(bias, fold)

    def once(self, name: str, compute: Callable[[], T], *inputs: Tensor) -> T:
        return once(self.module, (name, self.dtypes, self.module.scale, self.module.kv_scale), compute, *inputs)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        dtype = self.dtypes.of_rows(x)
        if dtype != self.dtypes.fold:
            weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        return nnf.linear(cast(x, dtype), weight, bias)

    def dropped(self, x: Tensor) -> Tensor:
        return nnf.dropout(x, self.module.kv_dropout, self.module.training)

    # Scores: query, key and key bias (S,) or (B, 1, S), already scaled, or None.

    def scores(self, algebra: plan.Scores, queries: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        operands: tuple[Tensor, Tensor, Tensor | None] = getattr(self, algebra)(queries, source)
        return operands

    def project(self, queries: Tensor, source: Tensor) -> tuple[Tensor, Tensor, None]:
        query = self.once("q", lambda: self.linear(queries, self.w_q, self.b_q), queries)
        key = self.once("k", lambda: self.dropped(self.linear(source, self.w_k, self.b_k)), source)
        return query, key, None

    def fold_key(self, queries: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        def fold() -> tuple[Tensor, Tensor | None]:
            projected = self.dropped(self.linear(source, self.w_k, self.b_k))
            return projected @ cast(self.w_q, projected.dtype), self._key_bias(projected, self.b_q)

        return queries, *self.once("k W_q", fold, source)

    def merge_key(self, queries: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        merged = self.once("W_k W_q", lambda: self.w_q.mT @ self.w_k)
        bias = None if self.b_k is None else self.b_k @ self.w_q

        def fold() -> tuple[Tensor, Tensor | None]:
            return self.linear(source, merged, bias), self._key_bias(
                source, None if self.b_q is None else self.b_q @ self.w_k
            )

        return queries, *self.once("y W_k W_q", fold, source)

    def fold_query(self, queries: Tensor, source: Tensor) -> tuple[Tensor, Tensor, None]:
        def fold() -> Tensor:
            projected = self.linear(queries, self.w_q, self._connected_query_bias())
            return projected @ cast(self.w_k, projected.dtype)

        return self.once("q W_k", fold, queries), source, None

    def merge_query(self, queries: Tensor, source: Tensor) -> tuple[Tensor, Tensor, None]:
        merged = self.once("W_q W_k", lambda: self.w_k.mT @ self.w_q)
        bias = self._connected_query_bias()
        bias = None if bias is None else bias @ self.w_k
        return self.once("x W_q W_k", lambda: self.linear(queries, merged, bias), queries), source, None

    def _key_bias(self, rows: Tensor, direction: Tensor | None) -> Tensor | None:
        if direction is None:
            return None
        bias = self.module.scale * self.module.kv_scale * (cast(rows, self.dtypes.fold) @ direction)
        return bias if bias.dim() == 1 else bias[:, None]

    def _connected_query_bias(self) -> Tensor | None:
        return None if self.b_q is None or self.b_k is None else self.b_q + 0.0 * self.b_k

    # Values: the value, and what is left to do after the map.

    def values(self, algebra: plan.Values, source: Tensor) -> tuple[Tensor, Output]:
        operands: tuple[Tensor, Output] = getattr(self, algebra)(source)
        return operands

    def before(self, source: Tensor) -> tuple[Tensor, Output]:
        if self.w_o is None:
            return self._projected_value(source), Output()
        w_o, (riding, outside) = self.w_o, self._output_bias()
        folded = self.once("v W_o", lambda: self.linear(self._projected_value(source), w_o, riding), source)
        return folded, Output(bias=outside)

    def before_merged(self, source: Tensor) -> tuple[Tensor, Output]:
        weight, bias = self._merged_value()
        riding, outside = self._output_bias()
        if riding is not None:
            bias = riding if bias is None else bias + riding
        return self.once("y W_v W_o", lambda: self.linear(source, weight, bias), source), Output(bias=outside)

    def after(self, source: Tensor) -> tuple[Tensor, Output]:
        weight, row_bias = self._merged_value()
        return source, Output(weight, row_bias, self.b_o)

    def apart(self, source: Tensor) -> tuple[Tensor, Output]:
        return self._projected_value(source), Output(weight=self.w_o, bias=self.b_o)

    def _projected_value(self, source: Tensor) -> Tensor:
        return self.once("v", lambda: self.dropped(self.linear(source, self.w_v, self.b_v)), source)

    def _merged_value(self) -> tuple[Tensor, Tensor | None]:
        w_o = self.w_o
        if w_o is None:
            return self.w_v, self.b_v
        weight = self.once("W_v W_o", lambda: w_o @ self.w_v)
        return weight, None if self.b_v is None else w_o @ self.b_v

    def _output_bias(self) -> tuple[Tensor | None, Tensor | None]:
        """b_o inside the values, where the rows of the map sum to 1, or outside."""
        return (None, self.b_o) if self.map_dropped else (self.b_o, None)

    def apply(self, output: Output, y: Tensor, row_sum: Tensor | None) -> Tensor:
        """The output's projection and biases, applied to P V."""
        weight, row_bias, bias = output
        if row_bias is not None and row_sum is None:
            bias, row_bias = row_bias if bias is None else row_bias + bias, None
        if weight is not None:
            y = nnf.linear(y, cast(weight, y.dtype), None if bias is None else cast(bias, y.dtype))
        elif bias is not None:
            y = y + cast(bias, y.dtype)
        if row_bias is not None and row_sum is not None:
            y = y + cast(row_sum[..., None] * row_bias, y.dtype)
        return y


# Where kernels run whose loads want aligned rows.
PADDED_DEVICES = ("cuda",)


def _operand(x: Tensor, dtype: torch.dtype, heads: int) -> Tensor:
    """A query, key or value as the operator takes it."""
    x = cast(x, dtype)
    if x.device.type in PADDED_DEVICES and x.dim() == 2:
        x = _padded(x)
    return x if heads == 1 else _split(x, heads)


def _padded(x: Tensor) -> Tensor:
    """Rows that all images share, in memory of a pitch of 32 elements with zeros behind each row.

    The rows are few, and kernels then copy them 16 bytes at a time.
    """
    padding = -x.shape[-1] % 32
    return x if padding == 0 else nnf.pad(x, (0, padding))[:, : x.shape[-1]]


def _split(x: Tensor, heads: int) -> Tensor:
    """(B, L, C) or (L, C) as (B or 1, H, L, C / H) where there are several heads."""
    if heads == 1:
        return x
    x = x.unflatten(-1, (heads, -1))
    return x.transpose(-3, -2) if x.dim() == 4 else x.transpose(-3, -2)[None]


def _join(y: Tensor) -> Tensor:
    """(B, H, L, C / H) as (B, L, C)."""
    return y.transpose(1, 2).flatten(2)
