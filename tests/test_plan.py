"""The cost model against counted FLOPs, and the choices that it makes."""

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import bda_fused.flops  # noqa: F401, what it registers is used
from bda_fused import modules, ops, plan, reference
from bda_fused.plan import Cost, Plan, Size
from tests.parity import twins

SIZES = [(2, 6, 5, 8), (3, 4, 9, 6), (1, 7, 7, 16)]  # images, regions, attributes, dim


def counted(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def module_call(kind, images, regions, attributes, dim, shared, **options):
    """A fused module, its inputs, and the size of the call."""
    extra = {"grid": (1, regions), "geometry": False} if kind == "RegionSelfAttention" else {}
    # Without biases, whose folds are products with a vector: the model leaves them out.
    _, module = twins(kind, dim, torch.float32, bias=False, **options, **extra)
    visual = torch.randn(images, regions, dim)
    if kind == "RegionSelfAttention":
        return module, (visual,), Size(images, regions, regions, dim)
    rows = torch.randn(*(() if shared else (images,)), attributes, dim)
    if kind == "SemanticSynthesisAttention":
        return module, (visual, rows), Size(images, regions, attributes, dim, keys_shared=shared)
    return module, (visual, rows), Size(images, attributes, regions, dim, queries_shared=shared)


@pytest.mark.parametrize("out_proj", [False, True])
@pytest.mark.parametrize(
    ("kind", "shared"),
    [
        ("SemanticSynthesisAttention", True),
        ("SemanticSynthesisAttention", False),
        ("VisualSynthesisAttention", True),
        ("VisualSynthesisAttention", False),
        ("RegionSelfAttention", False),
    ],
)
def test_flops_of_every_plan_are_those_counted(kind, shared, out_proj):
    for shape in SIZES:
        module, inputs, size = module_call(kind, *shape, shared, out_proj=out_proj)
        scores, values = plan.allowed(out_proj=out_proj, heads=1, kv_dropout=False)
        for score in scores:
            for value in values:
                with plan.force(scores=score, values=value):
                    assert counted(lambda: module(*inputs)) == Plan(score, value).cost(size, out_proj=out_proj).flops


def test_frozen_flops_are_those_counted_in_the_second_call():
    for kind in ("SemanticSynthesisAttention", "VisualSynthesisAttention", "RegionSelfAttention"):
        module, inputs, size = module_call(kind, 2, 6, 5, 8, shared=True, out_proj=True)
        module.eval()
        with modules.frozen(module):
            module(*inputs)
            chosen = plan.choose(size, out_proj=True, frozen=True)
            assert counted(lambda: module(*inputs)) == chosen.cost(size, out_proj=True, frozen=True).flops


def test_natural_flops_are_those_of_the_reference_on_expanded_attributes():
    ssa = reference.SemanticSynthesisAttention(8)
    visual, attributes = torch.randn(3, 6, 8), torch.randn(5, 8)
    size = Size(3, 6, 5, 8, keys_shared=True)
    assert counted(lambda: ssa(visual, attributes.expand(3, -1, -1).contiguous())) == plan.natural_cost(size).flops


@pytest.mark.parametrize(
    ("query", "key", "value"),
    [
        ((2, 1, 6, 8), (1, 1, 5, 8), (1, 1, 5, 7)),
        ((1, 1, 6, 8), (2, 1, 5, 8), None),
        ((2, 3, 6, 8), (1, 3, 5, 8), (2, 1, 5, 7)),
    ],
)
def test_registered_flops_are_those_of_the_eager_backend(query, key, value):
    """torch's counter sees one operator; the formula registered for it must count what runs inside."""
    from bda_fused.backends import eager
    from bda_fused.backends.problem import BackwardOptions, Options, Problem

    q, k = torch.randn(query), torch.randn(key)
    v = None if value is None else torch.randn(value)
    options = Options(0.5, 0.0, False, False, False, True, "eager")
    problem = Problem.of(q, k, k if v is None else v, None, None)
    inside = counted(lambda: eager.forward(problem, q, k, k if v is None else v, None, None, None, options))
    outside = counted(lambda: ops.residual_attention(q, k, v, None, None, None, *options))
    assert inside == outside > 0

    y, weights, _, lse = ops.residual_attention(q, k, v, None, None, None, *options)
    for needs in ([True] * 3 + [False], [True, False, False, False], [False, True, False, False]):
        kept, given = (weights, lse, None), BackwardOptions(0.5, 0.0, False, needs, "eager")
        inside = counted(
            lambda: eager.backward(problem, y, None, None, q, k, k if v is None else v, None, *kept, v is None, given)
        )
        outside = counted(lambda: ops.residual_attention_backward(y, None, None, q, k, v, None, *kept, *given))
        assert inside == outside > 0


def test_bytes_of_a_product_are_its_operands_and_result():
    assert plan.gemm(2, 3, 4, batch=5, itemsize=2) == Cost(2 * 5 * 2 * 3 * 4, 5 * 2 * (2 * 4 + 4 * 3 + 2 * 3))
    assert Cost(1, 2) + Cost(3, 4) == Cost(4, 6)


C = 350
CHOICES = {
    "SSA: W_q moves into the shared keys": (Size(50, 196, 312, C, keys_shared=True), {}, "fold_key", "before"),
    "VSA: W_k moves into the shared queries": (Size(50, 312, 196, C, queries_shared=True), {}, "fold_query", "before"),
    "VSA with fewer attributes than regions: values after": (
        Size(50, 85, 196, C, queries_shared=True), {}, "fold_query", "after",
    ),
    "VSA with attributes per image: a merged matrix, on the fewer rows": (Size(50, 312, 196, C), {}, "merge_key", "before"),
    "RSA: a merged matrix, values after, which read the keys": (Size(50, 196, 196, C), {"out_proj": True}, "merge_query", "after"),
    "RSA under key and value dropout: projected": (
        Size(50, 196, 196, C), {"out_proj": True, "kv_dropout": True}, "project", "before",
    ),
    "SSA under key and value dropout still folds": (
        Size(50, 196, 312, C, keys_shared=True), {"out_proj": True, "kv_dropout": True}, "fold_key", "before",
    ),
    "SSA of one small image: its rows are the fewer ones": (Size(1, 49, 312, C, keys_shared=True), {}, "fold_query", "after"),
    "several heads: projected": (Size(50, 196, 312, C, keys_shared=True, heads=2), {"out_proj": True}, "project", "apart"),
}  # fmt: skip


@pytest.mark.parametrize("case", CHOICES)
def test_choice(case):
    size, options, scores, values = CHOICES[case]
    assert plan.choose(size, **options) == Plan(scores, values)


def test_no_other_plan_is_cheaper_than_the_chosen_one():
    for size, options, *_ in CHOICES.values():
        chosen = plan.choose(size, **options)
        out_proj = options.get("out_proj", False)
        scores, values = plan.allowed(out_proj=out_proj, heads=size.heads, kv_dropout=options.get("kv_dropout", False))
        best = min(Plan(s, v).cost(size, out_proj=out_proj).flops for s in scores for v in values)
        assert chosen.cost(size, out_proj=out_proj).flops == best


def test_bytes_would_change_no_choice():
    """Though every byte cost as much as 300 FLOPs, which is more than on any GPU of today."""
    shapes = itertools.product((1, 4, 50), (1, 49, 196), (1, 85, 312), (64, 350, 2048), (False, True), (False, True))
    for images, queries, keys, dim, queries_shared, keys_shared in shapes:
        size = Size(images, queries, keys, dim, queries_shared=queries_shared, keys_shared=keys_shared)
        for out_proj in (False, True):
            scores, values = plan.allowed(out_proj=out_proj, heads=1, kv_dropout=False)
            costs = {(s, v): Plan(s, v).cost(size, out_proj=out_proj) for s in scores for v in values}
            chosen = plan.choose(size, out_proj=out_proj)
            least = min(cost.flops + 300 * cost.bytes for cost in costs.values())
            cost = costs[chosen.scores, chosen.values]
            assert cost.flops + 300 * cost.bytes == least, size


def test_force_refuses_what_is_unknown_or_not_exact():
    with pytest.raises(ValueError, match="scores must be one of fold_query, merge_query"), plan.force(scores="fold"):
        pass
    size = Size(2, 6, 5, 8)
    with (
        plan.force(scores="fold_query"),
        pytest.raises(
            ValueError, match="scores='fold_query' is not exact for this module, allowed are project, fold_key"
        ),
    ):
        plan.choose(size, kv_dropout=True)
    with (
        plan.force(values="after"),
        pytest.raises(ValueError, match="values='after' is not exact for this module, allowed are before"),
    ):
        plan.choose(size, kv_dropout=True)
