"""What is measured: SSA followed by VSA with their projections, ours and as others would write it."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from bda_fused import modules, plan, reference
from bda_fused.testing import assert_close

ATTRIBUTES = {"AWA2": 85, "SUN": 102, "CUB": 312}
DIMS = (350, 512)
REGIONS = (49, 196)
IMAGES = (8, 32)
PASSES = ("forward", "forward+backward")
RIVAL_TOLERANCE = 1e-2  # of the largest entry: a rival may be less exact than ours, but not another function
BACKWARD_FLOPS = 2  # every product has two gradients of its own size


@dataclass(frozen=True)
class Case:
    """One cell of the tables: a data set's number of attributes, C, HW, B and the pass."""

    dataset: str
    dim: int
    regions: int
    images: int
    passes: str

    @property
    def name(self) -> str:
        return f"{self.dataset} C={self.dim} HW={self.regions} B={self.images} {self.passes}"

    def sizes(self) -> tuple[plan.Size, plan.Size]:
        """The sizes of SSA's and of VSA's call."""
        attributes = ATTRIBUTES[self.dataset]
        return (
            plan.Size(self.images, self.regions, attributes, self.dim, keys_shared=True),
            plan.Size(self.images, attributes, self.regions, self.dim, queries_shared=True),
        )

    def flops(self, rival: str) -> int:
        """Of one run of ``rival``, by the plan's model."""
        costs = {
            "natural": plan.natural_cost,
            "compiled": plan.natural_cost,
            "sdpa": plan.Plan("project", "before").cost,
            "algebra": lambda size: plan.choose(size).cost(size),
            "ours": lambda size: plan.choose(size).cost(size),
        }
        factor = 1 + BACKWARD_FLOPS * (self.passes != "forward")
        return factor * sum(costs[rival](size).flops for size in self.sizes())


def cases(
    datasets: tuple[str, ...] = tuple(ATTRIBUTES),
    dims: tuple[int, ...] = DIMS,
    regions: tuple[int, ...] = REGIONS,
    images: tuple[int, ...] = IMAGES,
    passes: tuple[str, ...] = PASSES,
) -> Iterator[Case]:
    """Every combination, in the order of the tables."""
    return (Case(*values) for values in itertools.product(datasets, dims, regions, images, passes))


class Core(nn.Module):
    """SSA and VSA of one namespace, without feed-forward: U_V from regions U (B, HW, C) and attributes V_A (A, C)."""

    def __init__(self, namespace: object, dim: int) -> None:
        super().__init__()
        self.ssa = namespace.SemanticSynthesisAttention(dim)  # type: ignore[attr-defined]
        self.vsa = namespace.VisualSynthesisAttention(dim)  # type: ignore[attr-defined]

    def forward(self, visual: Tensor, attributes: Tensor) -> Tensor:
        return self.vsa(self.ssa(visual, attributes), attributes)


class Natural(Core):
    """As nn code is usually written: the attributes expanded to the batch, then everything per image."""

    def __init__(self, dim: int) -> None:
        super().__init__(reference, dim)

    def forward(self, visual: Tensor, attributes: Tensor) -> Tensor:
        return super().forward(visual, attributes.expand(visual.shape[0], -1, -1))


class SDPA(Core):
    """Attributes projected once, and torch's fused attention over stride-0 batches of them."""

    def __init__(self, dim: int) -> None:
        super().__init__(reference, dim)

    def forward(self, visual: Tensor, attributes: Tensor) -> Tensor:
        refined = self._attend(self.ssa, visual, attributes, visual.shape[0])
        return self._attend(self.vsa, attributes, refined, visual.shape[0])

    @staticmethod
    def _attend(module: reference.Attention, x: Tensor, y: Tensor, images: int) -> Tensor:
        q, k, v = (
            projected.expand(images, *projected.shape[-2:])[:, None]
            for projected in (module.q_proj(x), module.k_proj(y), module.v_proj(y))
        )
        return x + nnf.scaled_dot_product_attention(q, k, v, scale=module.scale)[:, 0]


class Algebra(Core):
    """Our own algebra in plain torch ops: what a kernel must beat to be worth anything."""

    def __init__(self, dim: int) -> None:
        super().__init__(reference, dim)

    def forward(self, visual: Tensor, attributes: Tensor) -> Tensor:
        ssa, vsa = self.ssa, self.vsa
        keys = ssa.k_proj(attributes)
        bias = ssa.scale * (keys @ ssa.q_proj.bias)
        scores = ssa.scale * (visual @ (keys @ ssa.q_proj.weight).mT) + bias
        visual = visual + torch.softmax(scores, -1) @ ssa.v_proj(attributes)
        queries = vsa.q_proj(attributes) @ vsa.k_proj.weight
        weights = torch.softmax(vsa.scale * (queries @ visual.mT), -1)
        if len(attributes) < visual.shape[1]:
            return attributes + vsa.v_proj(weights @ visual)
        return attributes + weights @ vsa.v_proj(visual)


RIVALS: dict[str, Callable[[int], nn.Module]] = {
    "natural": Natural,
    "sdpa": SDPA,
    "compiled": lambda dim: cast(nn.Module, torch.compile(Natural(dim), fullgraph=True, dynamic=False)),
    "algebra": Algebra,
    "ours": lambda dim: Core(modules, dim),
}


@dataclass(frozen=True)
class Contest:
    """All contestants of one case, with the same parameters and inputs, each as a function that runs it once."""

    case: Case
    models: dict[str, nn.Module]
    visual: Tensor
    attributes: Tensor
    upstream: Tensor

    @classmethod
    def of(
        cls, case: Case, rivals: tuple[str, ...], *, device: str = "cpu", dtype: torch.dtype = torch.float32
    ) -> Contest:
        generator = torch.Generator().manual_seed(0)
        models = {name: RIVALS[name](case.dim).to(device, dtype) for name in rivals}
        first = next(iter(models.values()))
        for model in models.values():
            uncompiled(model).load_state_dict(uncompiled(first).state_dict())
        attributes = ATTRIBUTES[case.dataset]

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        backward = case.passes != "forward"
        return cls(
            case,
            models,
            normal(case.images, case.regions, case.dim).requires_grad_(backward),
            normal(attributes, case.dim).requires_grad_(backward),
            normal(case.images, attributes, case.dim),
        )

    def run(self, rival: str) -> list[Tensor]:
        """The output and, in a backward pass, the gradients of U, V_A and every parameter."""
        model = self.models[rival]
        if self.case.passes == "forward":
            with torch.no_grad():
                return [model(self.visual, self.attributes)]
        y = model(self.visual, self.attributes)
        inputs = [self.visual, self.attributes, *model.parameters()]
        grads = torch.autograd.grad(y, inputs, self.upstream, allow_unused=True, materialize_grads=True)
        return [y.detach(), *grads]

    def check(self) -> None:
        """AssertionError unless ours keeps the rule of numerics and every rival computes the same."""
        yardstick = self.run("natural")
        exact = copy.deepcopy(self.models["natural"]).double()
        visual, attributes = (
            x.detach().double().requires_grad_(x.requires_grad) for x in (self.visual, self.attributes)
        )
        expected = Contest(self.case, {"natural": exact}, visual, attributes, self.upstream.double()).run("natural")
        largest = max(float(x.abs().max()) for x in expected)
        for name in self.models:
            for index, (x, t, y) in enumerate(zip(self.run(name), expected, yardstick, strict=True)):
                what = f"{name}, tensor {index} of {self.case.name}"
                if name == "ours":
                    # The key biases' gradients are zero, and what comes out is rounding of large terms.
                    term = largest if float(t.abs().max()) < 1e-9 * largest else 0.0
                    assert_close(x, t, y, gradient=index > 0, largest_term=term, name=what)
                else:
                    error, scale = float((x - t).abs().max()), float(t.abs().max())
                    allowed = RIVAL_TOLERANCE * scale + 1e-6 * largest
                    assert error <= allowed, f"{what} is off by {error:.3e}, it computes another function"


def uncompiled(model: nn.Module) -> nn.Module:
    """The module inside what torch.compile returns, or the module itself."""
    inner = getattr(model, "_orig_mod", model)
    assert isinstance(inner, nn.Module)
    return inner
