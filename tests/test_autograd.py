"""Derivatives in float64: first and second order, of the public functions and of what the modules call."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from bda_fused import backends
from bda_fused import functional as F
from bda_fused.autograd import ResidualAttentionFunction, SSAFunction, VSAFunction
from bda_fused.backends.problem import Options

B, L, S, DK, DV = 2, 3, 4, 3, 2


def leaf(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


CASES = {
    "ssa": (lambda q, k, v, r: F.ssa(q, k, v, r), ((B, L, DK), (S, DK), (S, DV), (B, L, DV))),
    "vsa": (lambda q, k, v, r: F.vsa(q, k, v, r), ((L, DK), (B, S, DK), (B, S, DV), (L, DV))),
    "with the map and a bias": (
        lambda q, k, v, r, b: F.residual_attention(q, k, v, r, attn_bias=b, need_weights=True),
        ((B, L, DK), (B, S, DK), (B, S, DV), (B, L, DV), (L, S)),
    ),
    "all shared": (lambda q, k, v: F.residual_attention(q, k, v), ((L, DK), (S, DK), (S, DV))),
    "heads": (
        lambda q, k, v: F.residual_attention(q, k, v, scale=-0.7),
        ((B, 2, L, DK), (1, 2, S, DK), (B, 1, S, DV)),
    ),
    "map shared, values per image": (
        lambda q, k, v: F.residual_attention(q, k, v, need_weights=True),
        ((L, DK), (S, DK), (B, S, DV)),
    ),
    "query is residual": (
        lambda q, k, v: F.attend(q, k, v, residual_is_query=True)[0],
        ((B, L, DK), (S, DK), (S, DK)),
    ),
    "shared query is residual": (
        lambda q, k, v: F.attend(q, k, v, residual_is_query=True)[0],
        ((L, DK), (B, S, DK), (B, S, DK)),
    ),
    "key is value": (lambda q, k: F.attend(q, k, scale=0.4)[0], ((L, DK), (B, S, DK))),
    "shared key is value": (lambda q, k: F.attend(q, k, scale=0.4)[0], ((B, L, DK), (S, DK))),
    "row sums": (
        lambda q, k: F.attend(q, k, need_row_sum=True)[::2],
        ((B, L, DK), (B, S, DK)),
    ),
    "the whole core": (
        lambda u, a, w, b: _core(u, a, w, b),
        ((B, L, DK), (S, DK), (6, DK, DK), (6, DK)),
    ),
}


def _core(visual, attributes, weights, biases):
    """SSA and then VSA with their projections, as modules compute them."""
    q, k, v = (x @ w.mT + b for x, w, b in zip((visual, attributes, attributes), weights[:3], biases[:3], strict=True))
    refined = F.ssa(q, k, v, visual)
    q, k, v = (x @ w.mT + b for x, w, b in zip((attributes, refined, refined), weights[3:], biases[3:], strict=True))
    return F.vsa(q, k, v, attributes)


@pytest.mark.parametrize("case", CASES)
def test_first_and_second_derivatives(case):
    torch.manual_seed(0)
    function, shapes = CASES[case]
    operands = tuple(leaf(*shape) for shape in shapes)
    assert gradcheck(function, operands)
    assert gradgradcheck(function, operands)


@pytest.mark.parametrize("case", CASES)
def test_both_ways_of_computing_the_backward_agree(case):
    """With create_graph the backward is plain torch ops, without it the backend's own: the same gradients."""
    torch.manual_seed(0)
    function, shapes = CASES[case]
    operands = tuple(leaf(*shape) for shape in shapes)
    results = function(*operands)
    results = results if isinstance(results, tuple) else (results,)
    upstream = [torch.randn_like(y) for y in results]
    explicit = torch.autograd.grad(results, operands, upstream, retain_graph=True)
    differentiable = torch.autograd.grad(results, operands, upstream, create_graph=True)
    for x, y in zip(explicit, differentiable, strict=True):
        torch.testing.assert_close(x, y)
    assert any(y.requires_grad for y in differentiable)


def test_both_ways_of_computing_the_backward_agree_on_masked_rows():
    """A masked key, and a row without any key left."""
    torch.manual_seed(0)
    operands = leaf(B, L, DK), leaf(S, DK), leaf(S, DV)
    bias = torch.zeros(L, S, dtype=torch.float64)
    bias[0], bias[1, 2] = -torch.inf, -torch.inf
    y, weights = F.residual_attention(*operands, attn_bias=bias, need_weights=True)
    upstream = torch.randn_like(y), torch.randn_like(weights)
    explicit = torch.autograd.grad((y, weights), operands, upstream, retain_graph=True)
    differentiable = torch.autograd.grad((y, weights), operands, upstream, create_graph=True)
    for x, z in zip(explicit, differentiable, strict=True):
        assert x.isfinite().all()
        torch.testing.assert_close(x, z)
    assert not explicit[0][:, 0].any(), "a row that sees nothing asks for nothing"


@pytest.mark.parametrize("p", [0.4, 1.0])
def test_derivatives_through_dropout(p):
    def function(*operands):
        torch.manual_seed(7)  # the same mask in every evaluation
        y, weights, row_sum = F.attend(*operands, dropout_p=p, need_weights=True, need_row_sum=True)
        return y, weights, row_sum

    operands = leaf(B, L, DK), leaf(S, DK), leaf(S, DV), leaf(B, L, DV)
    assert gradcheck(function, operands)
    assert gradgradcheck(function, operands)


def test_gradient_penalty_equals_the_natural_formulation():
    """create_graph=True through the explicit backward: the gradient of a gradient's norm."""

    def penalty(function, operands):
        y = function(*operands)
        (grad,) = torch.autograd.grad(y.square().sum(), operands[0], create_graph=True)
        return torch.autograd.grad(((grad.norm(dim=-1) - 1) ** 2).mean(), operands)

    operands = leaf(B, L, DK), leaf(S, DK), leaf(S, DV), leaf(B, L, DV)
    fused = penalty(F.ssa, operands)
    natural = penalty(lambda q, k, v, r: r + torch.softmax(DK**-0.5 * q @ k.mT, -1) @ v, operands)
    for x, y in zip(fused, natural, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_second_derivatives_in_low_precision_have_the_operands_dtype(dtype):
    operands = [
        leaf(*shape).detach().to(dtype).requires_grad_() for shape in ((B, L, DK), (S, DK), (S, DV), (B, L, DV))
    ]
    grads = torch.autograd.grad(F.ssa(*operands).square().sum(), operands, create_graph=True)
    assert [g.dtype for g in grads] == [dtype] * 4
    second = torch.autograd.grad(grads[0].square().sum(), operands[:3])
    assert [g.dtype for g in second] == [dtype] * 3


def test_named_functions_check_their_shapes():
    ssa = leaf(B, 1, L, DK), leaf(1, 1, S, DK), leaf(1, 1, S, DV), leaf(B, 1, L, DV)
    options = (None, None, Options(0.5, 0.0, False, False, False, True))
    assert torch.equal(SSAFunction.apply(*ssa, *options)[0], ResidualAttentionFunction.apply(*ssa, *options)[0])
    vsa = leaf(1, 1, L, DK), leaf(B, 1, S, DK), leaf(B, 1, S, DV), leaf(1, 1, L, DV)
    assert torch.equal(VSAFunction.apply(*vsa, *options)[0], ResidualAttentionFunction.apply(*vsa, *options)[0])
    with pytest.raises(ValueError, match=r"key of ssa must be shared by all images"):
        SSAFunction.apply(*vsa, *options)
    with pytest.raises(ValueError, match=r"query of vsa must be shared by all images"):
        VSAFunction.apply(*ssa, *options)


def test_transforms():
    """torch.func.grad works; vmap and forward mode are refused in one sentence (the latter by torch)."""
    query, key = leaf(B, L, DK).detach(), leaf(S, DK).detach()

    def loss(x):
        return F.residual_attention(x, key, key).square().sum()

    torch.testing.assert_close(
        torch.func.grad(loss)(query), torch.autograd.grad(loss(query.requires_grad_()), query)[0]
    )
    with pytest.raises(RuntimeError, match=r"does not support torch\.func\.vmap: put the mapped axis"):
        torch.func.vmap(lambda x: F.residual_attention(x, key, key))(query)
    with pytest.raises(NotImplementedError, match="forward mode AD"):
        torch.func.jvp(lambda x: F.residual_attention(x, key, key), (query,), (query,))


def test_the_backward_runs_where_the_forward_ran(monkeypatch):
    """Also behind the context that chose the backend: what a forward keeps is for its own backend."""
    query, key = leaf(B, L, DK), leaf(S, DK)
    with backends.use("eager"):
        y = F.residual_attention(query, key, key)
    asked, select = [], backends.select
    monkeypatch.setattr(backends, "select", lambda problem, backend: asked.append(backend) or select(problem, backend))
    y.sum().backward()
    assert asked == ["eager"]


def test_two_backward_passes_are_bit_identical():
    operands = [leaf(8, 49, 35), leaf(85, 35), leaf(85, 35), leaf(8, 49, 35)]
    first, second = (torch.autograd.grad(F.ssa(*operands).sin().sum(), operands) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
