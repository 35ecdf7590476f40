"""The raw operators and torch.compile."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

from bda_fused import backends, modules, ops
from bda_fused import functional as F

B, L, S, DK, DV = 2, 3, 5, 4, 6


def operands(batch=B, dtype=torch.float32, requires_grad=False):
    shapes = (batch, 1, L, DK), (1, 1, S, DK), (1, 1, S, DV), (batch, 1, L, DV)
    return [torch.randn(shape, dtype=dtype, requires_grad=requires_grad) for shape in shapes]


FORWARD_CASES = {
    "plain": {},
    "for a gradient": {"need_grad": True},
    "map and row sums": {"need_weights": True, "need_row_sum": True},
    "bias per image": {"attn_bias": (B, 1, 1, S), "need_weights": True},
    "key is value": {"value": None, "residual": None},
    "query is residual": {"value": (1, 1, S, DK), "residual": None, "residual_is_query": True},
    "dropout": {"seed": True, "dropout_p": 0.5, "need_row_sum": True, "need_grad": True},
}


def forward_arguments(
    dtype=torch.float32,
    value=(1, 1, S, DV),
    residual=(B, 1, L, DV),
    attn_bias=None,
    seed=False,
    dropout_p=0.0,
    residual_is_query=False,
    need_weights=False,
    need_row_sum=False,
    need_grad=False,
):
    query, key, *_ = operands(dtype=dtype)
    tensors = [None if shape is None else torch.randn(shape).to(dtype) for shape in (value, residual, attn_bias)]
    seed = torch.tensor(3) if seed else None
    return (
        query,
        key,
        *tensors,
        seed,
        0.5,
        dropout_p,
        residual_is_query,
        need_weights,
        need_row_sum,
        need_grad,
        "auto",
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("case", FORWARD_CASES)
def test_opcheck_forward(case, dtype):
    opcheck(ops.residual_attention, forward_arguments(dtype, **FORWARD_CASES[case]))


@pytest.mark.parametrize("needs", [[True] * 4, [False, True, False, False], [True, False, False, True]])
def test_opcheck_backward(needs):
    query, key, value, residual = operands()
    bias = torch.randn(1, 1, 1, S)
    y, weights, _, lse = ops.residual_attention(
        query, key, value, residual, bias, None, 0.5, 0.0, False, False, False, True, "auto"
    )
    opcheck(
        ops.residual_attention_backward,
        (torch.randn_like(y), None, None, query, key, value, bias, weights, lse, None, 0.5, 0.0, False, needs, "auto"),
    )


@pytest.mark.parametrize("backend", ["eager", "triton", "cuda"])
def test_traced_shapes_are_those_that_every_backend_gives(backend, monkeypatch):
    """The fake of the operator asks the chosen backend what it keeps, and in what rows."""
    chosen = backends.module(backend)
    monkeypatch.setattr(chosen, "can_run", lambda problem: None)
    tensors = [x.to("meta") for x in operands()]
    y, weights, _, lse = ops._forward_fake(*tensors, None, None, 0.5, 0.0, False, False, False, True, backend)
    assert y.shape == (B, 1, L, DV)
    assert weights.shape == (B, 1, L, S)
    assert weights.stride(2) == -(-S // chosen.WEIGHTS_PITCH) * chosen.WEIGHTS_PITCH
    assert lse.numel() == 0


def test_raw_operators_refuse_a_gradient():
    tensors = operands(requires_grad=True)
    y, *_ = ops.residual_attention(*tensors, None, None, 0.5, 0.0, False, False, False, True, "auto")
    with pytest.raises(RuntimeError, match=r"have no gradient of their own: call bda_fused\.functional"):
        y.sum().backward()


def test_compiles_to_one_graph_with_one_recompilation_for_any_batch():
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def compiled(visual, attributes):
        refined, ssa_map = F.ssa(visual, attributes, attributes, visual, need_weights=True)
        return F.vsa(attributes, refined, refined, attributes), ssa_map

    for batch in range(1, 9):
        leaves = torch.randn(batch, L, DK, requires_grad=True), torch.randn(S, DK, requires_grad=True)
        result, ssa_map = compiled(*leaves)
        grads = torch.autograd.grad(result.square().sum() + ssa_map.square().sum(), leaves)
        refined, expected_map = F.ssa(leaves[0], leaves[1], leaves[1], leaves[0], need_weights=True)
        expected = F.vsa(leaves[1], refined, refined, leaves[1])
        expected_grads = torch.autograd.grad(expected.square().sum() + expected_map.square().sum(), leaves)
        torch.testing.assert_close([result, ssa_map, *grads], [expected, expected_map, *expected_grads])
    assert counter.frame_count <= 2


def test_compiles_with_dropout_and_draws_a_new_mask_each_call():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(query, key):
        return F.residual_attention(query, key, key, dropout_p=0.5)

    query, key = torch.randn(B, L, DK, requires_grad=True), torch.randn(40, DK)
    first, second = compiled(query, key), compiled(query, key)
    assert not torch.equal(first, second)
    first.sum().backward()
    assert query.grad.isfinite().all()


def test_compiles_inside_a_traced_gradient():
    """Inside a traced torch.func.grad no operand says that it needs a gradient."""
    query, key = torch.randn(B, L, DK), torch.randn(S, DK)

    def gradient(query, key):
        return torch.func.grad(lambda x: F.ssa(x, key, key, x).sin().sum())(query)

    compiled = torch.compile(gradient, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(query, key), gradient(query, key))


@pytest.mark.parametrize("strict", [False, True])
def test_exports_and_runs_where_gradients_are_on(strict):
    module = modules.SemanticSynthesisAttention(DK).eval()
    visual, attributes = torch.randn(B, L, DK), torch.randn(S, DK)
    exported = torch.export.export(module, (visual, attributes), strict=strict)
    for program in (exported, exported.run_decompositions()):
        torch.testing.assert_close(program.module()(visual, attributes), module(visual, attributes))


@pytest.mark.slow
def test_compiles_with_inductor():
    compiled = torch.compile(F.ssa, fullgraph=True)
    leaves = [x.squeeze(1) for x in operands(requires_grad=True)]
    leaves = [x[0] if x.shape[0] == 1 else x for x in leaves]
    torch.testing.assert_close(compiled(*leaves), F.ssa(*leaves))
