"""Cases of residual attention for kernels, and what a kernel's results are held against.

FORMS, small and ragged in every dimension, are what every GPU backend must take.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from bda_fused import functional as F
from bda_fused import testing


@dataclass(frozen=True)
class Case:
    """One problem. Shapes are those of the operands; None leaves one out.

    value None: the key is the value. residual "query": the query is the residual. layout: operand -> a function that
    gives it other strides. masked: share of the keys that the bias masks. masked_row: also mask the first row wholly.
    mask: the bias that does. bias_size: what normal numbers are multiplied by for the bias.
    """

    query: tuple[int, ...]
    key: tuple[int, ...]
    value: tuple[int, ...] | None
    residual: tuple[int, ...] | str | None
    bias: tuple[int, ...] | None = None
    bias_size: float = 1.0
    masked: float = 0.0
    masked_row: bool = False
    mask: float = -torch.inf
    scale: float | None = None
    dropout_p: float = 0.0
    need_weights: bool = False
    need_row_sum: bool = False
    dtype: torch.dtype = torch.bfloat16
    residual_dtype: torch.dtype | None = None
    bias_dtype: torch.dtype = torch.float32
    needs: str = "qkvrb"
    layout: dict = field(default_factory=dict)

    def but(self, **changes) -> Case:
        return replace(self, **changes)


def ssa(images, regions, attributes, width, **options) -> Case:
    return Case((images, regions, width), (attributes, width), (attributes, width), (images, regions, width), **options)


def vsa(images, regions, attributes, width, **options) -> Case:
    return Case((attributes, width), (images, regions, width), (images, regions, width), (attributes, width), **options)


def rsa(images, regions, width, **options) -> Case:
    shape = (images, regions, width)
    return Case(shape, shape, shape, shape, **({"bias": (regions, regions)} | options))


LEAST = torch.finfo(torch.float32).min
B, H, L, S, DK, DV = 3, 2, 5, 19, 7, 37


def _form(query, key, value, residual, bias=None, **options) -> Case:
    return Case(query, key, value, residual, bias, **({"scale": 0.6, "need_weights": True} | options))


FORMS = {
    "SSA": _form((B, L, DK), (S, DK), (S, DV), (B, L, DV)),
    "SSA with a key bias": _form((B, L, DK), (S, DK), (S, DV), (B, L, DV), (S,), need_row_sum=True),
    "SSA of several tiles": _form((B, 70, 45), (37, 45), (37, 70), (B, 70, 70), (37,)),
    "SSA absorbed, the query is the residual": _form((B, L, DK), (S, DK), (S, DK), "query", (S,)),
    "SSA with two column groups": _form((2, 33, 20), (150, 20), (150, 35), (2, 33, 35), (150,), dropout_p=0.3),
    "VSA": _form((L, DK), (B, S, DK), (B, S, DV), (L, DV)),
    "VSA, key is value": _form((L, DK), (B, S, DK), None, (L, DK), need_row_sum=True, dropout_p=0.4),
    "VSA, shared query is the residual": _form((L, DK), (B, S, DK), (B, S, DK), "query"),
    "VSA with a query and a bias per image": _form((B, L, DK), (B, S, DK), None, None, (B, 1, S)),
    "VSA with two column groups": _form((70, 33), (2, 197, 33), (2, 197, 40), (70, 40)),
    "RSA": _form((B, S, DK), (B, S, DK), None, None, (S, S), need_row_sum=True),
    "RSA with dropout": _form((B, S, DK), (B, S, DK), (B, S, DV), None, (S, S), dropout_p=0.2),
    "all shared": _form((L, DK), (S, DK), (S, DV), (L, DV)),
    "the map shared, values per image": _form((L, DK), (S, DK), (B, S, DV), None, dropout_p=0.5),
    "the map shared, residual per image": _form((L, DK), (S, DK), (S, DV), (B, L, DV), (L, 1)),
    "scalar bias": _form((B, L, DK), (S, DK), (S, DV), None, ()),
    "bias of everything": _form((B, L, DK), (S, DK), (S, DV), None, (B, L, S)),
    "heads": _form((B, H, L, DK), (1, H, S, DK), (B, 1, S, DV), (1, 1, L, DV), (1, H, L, S), dropout_p=0.3),
    "heads, shared keys": _form((B, H, L, DK), (1, 1, S, DK), (1, 1, S, DV), None, (B, 1, 1, S)),
    "heads, keys per head": _form((B, H, L, DK), (1, H, S, DK), (1, H, S, DV), (B, H, L, DV), dropout_p=0.3),
    "masked keys and rows": _form((B, L, DK), (S, DK), (S, DV), (B, L, DV), (L, S), masked=0.5, masked_row=True),
    "masked by the least number": _form(
        (B, L, DK), (S, DK), (S, DV), (B, L, DV), (L, S), masked=0.5, masked_row=True, mask=LEAST
    ),
    "everything dropped": _form((B, L, DK), (S, DK), (S, DV), (B, L, DV), dropout_p=1.0, need_row_sum=True),
    "negative scale": _form((B, L, DK), (S, DK), (S, DV), None, scale=-0.9),
    "scale zero": _form((B, L, DK), (S, DK), (S, DV), None, scale=0.0),
    "SSA of one region": _form((B, 1, DK), (S, DK), (S, DV), (B, 1, DV)),
    "one of each": _form((1, 1), (1, 1), (1, 1), (1, 1)),
    "residual of another dtype": _form(
        (B, L, DK), (S, DK), (S, DV), (B, L, DV), residual_dtype=torch.float64, dropout_p=0.2
    ),
    "long score rows": _form((2, 7, 9), (601, 9), (601, 20), (2, 7, 20), (601,), need_row_sum=True, dropout_p=0.3),
    "long score rows per image": _form((66, 9), (2, 601, 9), None, None, (66, 601), need_row_sum=True),
}


def padded(x: Tensor) -> Tensor:
    """Rows with a gap behind them, of odd length."""
    wide = x.new_full((*x.shape[:-1], x.shape[-1] + 3), torch.nan)
    wide[..., : x.shape[-1]] = x
    return wide[..., : x.shape[-1]]


def shifted(x: Tensor) -> Tensor:
    """One element behind an aligned address."""
    memory = x.new_full((x.numel() + 1,), torch.nan)
    memory[1:] = x.flatten()
    return memory[1:].view(x.shape)


def transposed(x: Tensor) -> Tensor:
    """The last stride is not 1."""
    return x.mT.contiguous().mT


def expanded(x: Tensor) -> Tensor:
    """Every image is the first, by a stride of 0."""
    return x[:1].expand(x.shape)


def make_operands(case: Case, seed: int = 0, device: str = "cpu") -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(seed)

    def draw(shape, dtype):
        return torch.randn(shape, generator=generator).to(dtype)

    residual = case.residual if isinstance(case.residual, tuple) else None
    operands = {
        "query": draw(case.query, case.dtype),
        "key": draw(case.key, case.dtype),
        "value": None if case.value is None else draw(case.value, case.dtype),
        "residual": None if residual is None else draw(residual, case.residual_dtype or case.dtype),
        "attn_bias": None,
    }
    if case.bias is not None:
        bias = case.bias_size * draw(case.bias, case.bias_dtype)
        masked = torch.rand(case.bias, generator=generator) < case.masked
        if case.masked_row:
            masked[..., 0, :] = True
        operands["attn_bias"] = bias.masked_fill(masked, case.mask)
    operands = {name: None if x is None else x.to(device) for name, x in operands.items()}
    for name, lay_out in case.layout.items():
        operands[name] = lay_out(operands[name])
    return operands


class _Tf32Product(torch.autograd.Function):
    """A product of float32 matrices, and those of its gradients, from factors rounded to TF32's 10 bits."""

    @staticmethod
    def forward(ctx, left: Tensor, right: Tensor) -> Tensor:
        left, right = _to_tf32(left), _to_tf32(right)
        ctx.save_for_backward(left, right)
        return left @ right

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        left, right = ctx.saved_tensors
        grad = _to_tf32(grad)
        return (grad @ right.mT).sum_to_size(left.shape), (left.mT @ grad).sum_to_size(right.shape)


def _to_tf32(x: Tensor) -> Tensor:
    """To the nearest, as tensor cores are given their factors."""
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def product(left: Tensor, right: Tensor) -> Tensor:
    """As a GPU multiplies: by torch's matmul precision, which a CPU need not follow."""
    if left.dtype == torch.float32 and torch.get_float32_matmul_precision() == "high":
        return _Tf32Product.apply(left, right)
    return left @ right


def natural(operands: dict[str, Tensor | None], case: Case, mask: Tensor | None) -> tuple[Tensor, ...]:
    """The formulation as it is written: products in the operands' dtype, softmax in float32 or float64."""
    query, key, value, residual, bias = operands.values()
    value = key if value is None else value
    residual = query if case.residual == "query" else residual
    wide = torch.promote_types(query.dtype, torch.float32)
    scale = query.shape[-1] ** -0.5 if case.scale is None else case.scale
    scores = product(query, key.mT).to(wide) * scale
    if bias is not None:
        bias = bias.to(wide)
        dead = (bias == -torch.inf).all(-1, keepdim=True)
        weights = torch.softmax(scores + bias.masked_fill(dead, 0.0), -1).masked_fill(dead, 0.0)
    else:
        weights = torch.softmax(scores, -1)
    dropped = weights if mask is None else weights * mask
    y = product(dropped.to(query.dtype), value)
    if residual is not None:
        y = residual + y
    batch = y.shape[:-2]
    return (
        y,
        weights.to(query.dtype).expand(*batch, *weights.shape[-2:]),
        dropped.sum(-1).expand(*batch, dropped.shape[-2]),
    )


def run(operands: dict[str, Tensor | None], case: Case, backend: str | None, mask: Tensor | None = None):
    """Results and gradients, by the backend or, where it is None, by the natural formulation."""
    letters = dict(zip(operands, "qkvrb", strict=True))
    leaves = {
        name: None if x is None else x.detach().requires_grad_(letters[name] in case.needs)
        for name, x in operands.items()
    }
    if backend is None:
        y, weights, row_sum = natural(leaves, case, mask)
    else:
        query, key, value, residual, bias = leaves.values()
        y, weights, row_sum = F.attend(
            query,
            key,
            value,
            residual,
            scale=case.scale,
            attn_bias=bias,
            dropout_p=case.dropout_p,
            residual_is_query=case.residual == "query",
            need_weights=case.need_weights,
            need_row_sum=case.need_row_sum,
            backend=backend,
        )
    results = {"y": y}
    if case.need_weights:
        results["map"] = weights
    if case.need_row_sum:
        results["row_sum"] = row_sum
    wanted = {name: x for name, x in leaves.items() if x is not None and x.requires_grad}
    if wanted:
        outputs = [x for x in results.values() if x.requires_grad]
        upstream = [upstream_of(x, case.dtype, x.numel() + index) for index, x in enumerate(outputs)]
        grads = torch.autograd.grad(outputs, list(wanted.values()), upstream)
        results |= {f"gradient of {name}": x for name, x in zip(wanted, grads, strict=True)}
    return {name: x.detach() for name, x in results.items()}


def upstream_of(x: Tensor, dtype: torch.dtype, seed: int) -> Tensor:
    """A gradient of about unit size that ``dtype`` holds exactly: the same for a result and for its float64 truth."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(x.shape, generator=generator).to(dtype).to(x.device, x.dtype)


def assert_parity(case: Case, backend: str, seed: int = 0, device: str = "cpu") -> dict[str, Tensor]:
    """The backend's results and gradients obey the rule of numerics."""
    torch.manual_seed(seed)
    operands = make_operands(case, seed, device)
    with testing.record_seeds() as seeds:
        ours = run(operands, case, backend)
    mask = _mask(operands, case, seeds)
    truth, yardstick = truth_and_yardstick(operands, case, seeds)
    wide = _wide(operands)
    terms = {"y": _largest_term(wide, case, mask), "map": 0.0, "row_sum": 0.0}
    for name, x in ours.items():
        assert x.shape == truth[name].shape, name
        assert x.dtype == yardstick[name].dtype, f"{name} is {x.dtype}"
        testing.assert_close(
            x,
            truth[name],
            yardstick[name],
            gradient="gradient" in name,
            largest_term=terms.get(name, largest(truth)),
            name=name,
        )
    return ours


def truth_and_yardstick(operands: dict[str, Tensor | None], case: Case, seeds: list[Tensor]):
    """Results and gradients of the natural formulation, in float64 and as it is, with the mask of the first seed."""
    mask = _mask(operands, case, seeds)
    return run(_wide(operands), case, None, mask), run(operands, case, None, None if mask is None else mask.float())


def _wide(operands: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: None if x is None else x.double() for name, x in operands.items()}


def _mask(operands: dict[str, Tensor | None], case: Case, seeds: list[Tensor]) -> Tensor | None:
    if not case.dropout_p:
        return None
    keep = testing.philox_keep(seeds[0], case.dropout_p, _score_shape(operands)).double()
    return keep / (1 - case.dropout_p) if case.dropout_p < 1 else torch.zeros_like(keep)


def _largest_term(operands: dict[str, Tensor | None], case: Case, mask: Tensor | None) -> float:
    """The largest entry that is summed to Y: of P * M times its row of V, or of the residual."""
    _, weights, _ = natural(operands, case, None)
    dropped = weights if mask is None else weights * mask
    value = operands["key"] if operands["value"] is None else operands["value"]
    residual = operands["query"] if case.residual == "query" else operands["residual"]
    products = dropped.abs().amax(-2) * value.abs().amax(-1)
    return largest({"products": products} | ({} if residual is None else {"residual": residual}))


def _score_shape(operands: dict[str, Tensor | None]) -> tuple[int, ...]:
    given = [x for x in operands.values() if x is not None]
    batch = torch.broadcast_shapes(*(x.shape[:-2] for x in given))
    return (*batch, operands["query"].shape[-2], operands["key"].shape[-2])


def largest(results: dict[str, Tensor]) -> float:
    return max((float(x.abs().max()) for x in results.values() if x.numel()), default=0.0)
