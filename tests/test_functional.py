"""Residual attention against plain torch ops in float64: every form of its operands."""

import itertools

import pytest
import torch

from bda_fused import functional as F
from bda_fused import ops
from bda_fused.backends import _gemm
from bda_fused.testing import assert_close

B, H, L, S, DK, DV = 3, 2, 5, 7, 4, 6
BIASES = {
    "none": None,
    "scalar": (),
    "keys": (S,),
    "scores": (L, S),
    "rows": (L, 1),
    "images_keys": (B, 1, S),
    "full": (B, L, S),
}


def leaf(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def natural(query, key, value, residual, bias, scale):
    scores = scale * (query @ key.mT)
    weights = torch.softmax(scores if bias is None else scores + bias, -1)
    y = weights @ value
    return y if residual is None else residual + y, weights


def assert_equal_with_gradients(results, expected, operands):
    upstream = [torch.randn_like(x) for x in results]
    expected = [x.expand_as(y) for x, y in zip(expected, results, strict=True)]
    for x, y in zip(results, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)
    grads = torch.autograd.grad(results, operands, upstream)
    for x, y in zip(grads, torch.autograd.grad(expected, operands, upstream), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("bias_form", BIASES)
def test_every_sharing_of_operands(bias_form):
    """2-D, batch of 1 and per-image operands in all combinations, with the map and its gradient."""
    torch.manual_seed(0)
    for query_batch, key_batch, value_batch, residual_batch in itertools.product(
        ((), (1,), (B,)), ((), (1,), (B,)), ((), (1,), (B,)), (None, (), (B,))
    ):
        query, key, value = leaf(*query_batch, L, DK), leaf(*key_batch, S, DK), leaf(*value_batch, S, DV)
        residual = None if residual_batch is None else leaf(*residual_batch, L, DV)
        bias = None if bias_form == "none" else leaf(*BIASES[bias_form])
        results = F.residual_attention(query, key, value, residual, scale=0.7, attn_bias=bias, need_weights=True)
        expected = natural(query, key, value, residual, bias, 0.7)
        batch = torch.broadcast_shapes(*(x.shape[:-2] for x in expected))
        assert results[0].shape == (*batch, L, DV)
        assert results[1].shape == (*batch, L, S)
        operands = [x for x in (query, key, value, residual, bias) if x is not None]
        assert_equal_with_gradients(results, expected, operands)


@pytest.mark.parametrize("bias_shape", [(S,), (L, S), (1, H, L, S), (B, 1, 1, S), (B, H, L, S)])
def test_heads(bias_shape):
    torch.manual_seed(0)
    batches = ((1, 1), (B, 1), (1, H), (B, H))
    for query_batch, key_batch, value_batch, residual_batch in itertools.product(batches, repeat=4):
        query, key, value = leaf(*query_batch, L, DK), leaf(*key_batch, S, DK), leaf(*value_batch, S, DV)
        residual, bias = leaf(*residual_batch, L, DV), leaf(*bias_shape)
        results = F.residual_attention(query, key, value, residual, attn_bias=bias, need_weights=True)
        expected = natural(query, key, value, residual, bias, DK**-0.5)
        assert_equal_with_gradients(results, expected, (query, key, value, residual, bias))


def test_ssa_and_vsa_are_residual_attention():
    torch.manual_seed(0)
    visual, attributes = leaf(B, L, DK), leaf(S, DK)
    torch.testing.assert_close(
        F.ssa(visual, attributes, attributes, visual), natural(visual, attributes, attributes, visual, None, 0.5)[0]
    )
    torch.testing.assert_close(
        F.vsa(attributes, visual, visual, attributes), natural(attributes, visual, visual, attributes, None, 0.5)[0]
    )


@pytest.mark.parametrize("scale", [-1.5, 0.0, 3])
def test_any_finite_scale(scale):
    query, key, value = leaf(B, L, DK), leaf(S, DK), leaf(S, DV)
    expected = natural(query, key, value, None, None, scale)
    results = F.residual_attention(query, key, value, scale=scale, need_weights=True)
    assert_equal_with_gradients(results, expected, (query, key, value))


def strided(layout, *shape):
    """A leaf of the shape whose memory is laid out otherwise."""
    if layout == "padded rows":
        return leaf(*shape[:-1], shape[-1] + 3), lambda x: x[..., : shape[-1]]
    if layout == "every second row":
        return leaf(*shape[:-2], 2 * shape[-2], shape[-1]), lambda x: x[..., ::2, :]
    if layout == "transposed":
        return leaf(*shape[:-2], shape[-1], shape[-2]), lambda x: x.mT
    return leaf(*shape[1:]), lambda x: x.expand(shape)


@pytest.mark.parametrize("layout", ["padded rows", "every second row", "transposed", "expanded batch"])
def test_any_strides(layout):
    torch.manual_seed(0)
    leaves, views = zip(
        *(strided(layout, *shape) for shape in ((B, L, DK), (B, S, DK), (B, S, DV), (B, L, DV))), strict=True
    )
    query, key, value, residual = (view(x) for view, x in zip(views, leaves, strict=True))
    results = F.residual_attention(query, key, value, residual, need_weights=True)
    assert_equal_with_gradients(results, natural(query, key, value, residual, None, 0.5), leaves)


@pytest.mark.parametrize("upstream", ["expanded", "transposed", "sliced"])
def test_any_layout_of_the_incoming_gradient(upstream):
    operands = leaf(B, L, DK), leaf(S, DK), leaf(S, DV), leaf(B, L, DV)
    grad = {
        "expanded": torch.ones((), dtype=torch.float64).expand(B, L, DV),
        "transposed": torch.randn(DV, L, B, dtype=torch.float64).permute(2, 1, 0),
        "sliced": torch.randn(B, L, 2 * DV, dtype=torch.float64)[..., ::2],
    }[upstream]
    grads = torch.autograd.grad(F.ssa(*operands), operands, grad)
    expected = torch.autograd.grad(natural(*operands, None, 0.5)[0], operands, grad)
    for x, y in zip(grads, expected, strict=True):
        torch.testing.assert_close(x, y)


def test_an_expanded_operand_gets_a_gradient_per_image():
    query, key = leaf(B, L, DK), leaf(1, S, DK)
    expanded = key.expand(B, S, DK)
    expanded.retain_grad()
    F.residual_attention(query, expanded, expanded).sum().backward()
    assert expanded.grad.shape == (B, S, DK)


def test_masked_keys_and_rows():
    """-inf masks a key; a row without any key has weights 0, returns the residual, and has finite gradients."""
    query, key, value, residual = leaf(B, L, DK), leaf(S, DK), leaf(S, DV), leaf(B, L, DV)
    bias = torch.zeros(L, S, dtype=torch.float64)
    bias[0, 2:], bias[1] = -torch.inf, -torch.inf
    bias.requires_grad_()
    y, weights = F.residual_attention(query, key, value, residual, attn_bias=bias, need_weights=True)
    assert torch.equal(y[:, 1], residual[:, 1])
    assert (weights[:, 1] == 0).all()
    assert (weights[:, 0, 2:] == 0).all()
    torch.testing.assert_close(y[:, 0], F.residual_attention(query, key[:2], value[:2], residual)[:, 0])
    grads = torch.autograd.grad(y.square().sum(), (query, key, value, bias), create_graph=True)
    assert (grads[0][:, 1] == 0).all()
    assert (grads[3][1] == 0).all()
    second = torch.autograd.grad(sum(g.square().sum() for g in grads), (query, key, value))
    assert all(g.isfinite().all() for g in (*grads, *second))


@pytest.mark.parametrize(
    "shapes",
    [
        ((0, L, DK), (S, DK), (S, DV), (0, L, DV)),
        ((B, 0, DK), (S, DK), (S, DV), (B, 0, DV)),
        ((B, L, DK), (0, DK), (0, DV), (B, L, DV)),
        ((L, DK), (B, 0, DK), (B, 0, DV), (L, DV)),
    ],
    ids=["no image", "no query", "no key", "no key, shared query"],
)
def test_empty_operands(shapes):
    operands = [leaf(*shape) for shape in shapes]
    y = F.residual_attention(*operands)
    torch.testing.assert_close(y, operands[3].expand_as(y), msg="with nothing to attend to, the residual remains")
    y.sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in operands)


def test_results_never_alias_operands():
    residual = torch.randn(B, L, DV)
    key, value = torch.randn(0, DK), torch.randn(0, DV)
    y, weights = F.residual_attention(torch.randn(B, L, DK), key, value, residual, need_weights=True)
    y.add_(1)
    weights.add_(1)
    assert not torch.equal(y, residual)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("residual_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_of_the_results(dtype, residual_dtype):
    query, key, value = torch.randn(B, L, DK).to(dtype), torch.randn(S, DK).to(dtype), torch.randn(S, DV).to(dtype)
    residual = torch.randn(B, L, DV).to(residual_dtype).requires_grad_()
    bias = torch.randn(S, requires_grad=True)
    y, weights = F.ssa(query, key, value, residual, attn_bias=bias, need_weights=True)
    assert y.dtype == torch.result_type(residual, value)
    assert weights.dtype == dtype
    y.sum().backward()
    assert residual.grad.dtype == residual_dtype
    assert bias.grad.dtype == torch.float32


def test_autocast_casts_query_key_and_value_alone():
    query, key, value, residual = (
        torch.randn(*shape, requires_grad=True) for shape in ((B, L, DK), (S, DK), (S, DV), (B, L, DV))
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, weights = F.ssa(query, key, value, residual, need_weights=True)
        assert F.residual_attention(query, key, value).dtype == torch.bfloat16
        doubles = [x.double() for x in (query, key, value)]
        assert F.residual_attention(*doubles).dtype == torch.float64
    assert (y.dtype, weights.dtype) == (torch.float32, torch.bfloat16)
    expected = F.ssa(query.bfloat16(), key.bfloat16(), value.bfloat16(), residual)
    assert torch.equal(y, expected)
    y.sum().backward()
    assert query.grad.dtype == torch.float32


def test_only_what_is_needed_is_computed(monkeypatch):
    """Nobody asks for the gradient of frozen queries: no product is spent on it."""
    from bda_fused.backends import eager

    calls = []
    gradient = eager.gradient
    monkeypatch.setattr(eager, "gradient", lambda *args, **kwargs: calls.append(args[2]) or gradient(*args, **kwargs))
    query, key, value = leaf(L, DK), leaf(B, S, DK), leaf(B, S, DV)
    F.residual_attention(query.detach(), key, value).sum().backward()
    assert calls == [(B, 1, S, DV), (B, 1, S, DK)]
    calls.clear()
    F.residual_attention(query.detach(), key.detach(), value).sum().backward()
    assert calls == [(B, 1, S, DV)]


def test_no_shared_operand_is_expanded_in_memory():
    """A product with an operand shared by 64 images allocates no copy of it for each of them, in all of forward and backward."""
    from torch.profiler import ProfilerActivity, profile

    images, wide = 64, 512
    query, key = torch.randn(images, 2, wide, requires_grad=True), torch.randn(40, wide, requires_grad=True)
    shared_copy = images * key.numel() * key.element_size()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        F.ssa(query, key, key, query).sum().backward()
    allocated = sum(event.self_cpu_memory_usage for event in profiler.key_averages() if event.self_cpu_memory_usage > 0)
    assert 0 < allocated < shared_copy


def test_only_the_products_that_are_needed_run():
    """In the backward, as the profiler sees them; and the forward keeps no map where nothing needs a gradient."""
    from torch.profiler import ProfilerActivity, profile

    operands = {"query": torch.randn(B, L, DK), "value": torch.randn(S, DV)}
    key, products = torch.randn(S, DK), {}
    for wanted, tensor in operands.items():
        y = F.residual_attention(
            **{name: x.detach() for name, x in operands.items()} | {wanted: tensor.requires_grad_()}, key=key
        )
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            torch.autograd.grad(y, tensor, torch.ones_like(y))
        kinds = {"aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm"}
        products[wanted] = sum(event.count for event in profiler.key_averages() if event.key in kinds)
    assert products == {"query": 2, "value": 1}, "dP and dQ; dV alone"
    _, kept, _, _ = ops.residual_attention(
        operands["query"].detach()[:, None], key[None, None], None, None, None, None, 1.0, 0.0, *[False] * 4, "eager"
    )
    assert kept.numel() == 0


def test_the_map_is_kept_for_a_gradient_alone(monkeypatch):
    from bda_fused.backends import eager

    asked = []
    forward = eager.forward
    monkeypatch.setattr(eager, "forward", lambda *args: asked.append(args[-1].need_grad) or forward(*args))
    query, key = leaf(B, L, DK), leaf(S, DK)
    F.residual_attention(query, key, key)
    F.residual_attention(query.detach(), key.detach(), key.detach())
    with torch.no_grad():
        F.residual_attention(query, key, key)
    assert asked == [True, False, False]


@pytest.mark.parametrize("batch", [(), (B,), (B, H)], ids=["2-D", "3-D", "4-D"])
def test_results_may_be_written_to(batch):
    query, key = leaf(*batch, L, DK), leaf(*(1,) * len(batch), S, DK).squeeze(0) if batch == (B,) else leaf(S, DK)
    key = key[None, None] if len(batch) == 2 else key
    y = F.residual_attention(query, key, key, query)
    expected = y.detach() + 1
    y += 1
    torch.testing.assert_close(y.detach(), expected)
    y.relu_().sum().backward()
    assert query.grad.isfinite().all()


@pytest.mark.parametrize(("width", "enters"), [(7, False), (31, False), (32, True), (350, True)])
def test_a_residual_stays_out_of_a_narrow_gemm(width, enters, monkeypatch):
    """How much it would cost in accuracy depends on the CPU's GEMM, so errors alone do not tell everywhere."""
    added, gemm = [], _gemm._gemm
    monkeypatch.setattr(
        _gemm, "_gemm", lambda a, b, add, alpha: added.append(add is not None) or gemm(a, b, add, alpha)
    )
    query, key, value = torch.randn(2, 49, width), torch.randn(12, width), torch.randn(12, width)
    F.attend(query, key, value, residual_is_query=True, backend="eager")
    assert any(added) is enters


@pytest.mark.parametrize("width", [1, 2, 7, 8, 64])
@pytest.mark.parametrize("passes", ["output", "gradient"])
def test_float32_by_the_one_rule_at_any_width(width, passes):
    """A residual that enters a narrow GEMM is rounded with every term of it."""
    for seed in range(10):
        torch.manual_seed(seed)
        operands = [torch.randn(shape) for shape in ((2, 49, width), (312, width), (312, width))]
        upstream = torch.randn(2, 49, width)
        found = []
        for dtype, function in (
            (torch.float64, lambda q, k, v: natural(q, k, v, q, None, 0.5)[0]),
            (torch.float32, lambda q, k, v: natural(q, k, v, q, None, 0.5)[0]),
            (torch.float32, lambda q, k, v: F.attend(q, k, v, scale=0.5, residual_is_query=True)[0]),
        ):
            leaves = [x.to(dtype).requires_grad_() for x in operands]
            y = function(*leaves)
            found.append([y] if passes == "output" else torch.autograd.grad(y, leaves, upstream.to(dtype)))
        for truth, yardstick, ours in zip(*found, strict=True):
            assert_close(ours, truth, yardstick, gradient=passes == "gradient")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(("rows", "keys", "width"), [(1, 5, 64), (7, 5, 64), (1, 85, 350)])
def test_gradients_of_peaked_rows_by_the_one_rule(dtype, rows, keys, width):
    """Rounded weights do not sum to 1; what dP has in common over a row must not come out of that."""
    for seed in range(5):
        torch.manual_seed(seed)
        operands = [
            x.to(dtype)
            for x in (3 * torch.randn(1, rows, width), 3 * torch.randn(keys, width), 4 + torch.randn(keys, width))
        ]
        upstream = torch.randn(1, rows, width).to(dtype)
        scale = width**-0.5
        found = []
        for exact, function in (
            (True, lambda q, k, v: torch.softmax(scale * (q @ k.mT), -1) @ v),
            (False, lambda q, k, v: torch.softmax(scale * (q @ k.mT), -1, dtype=torch.float32).to(dtype) @ v),
            (False, lambda q, k, v: F.residual_attention(q, k, v, scale=scale)),
        ):
            leaves = [(x.double() if exact else x.clone()).requires_grad_() for x in operands]
            found.append(torch.autograd.grad(function(*leaves), leaves, upstream.double() if exact else upstream))
        for truth, yardstick, ours in zip(*found, strict=True):
            assert_close(ours, truth, yardstick, gradient=True)


def test_float16_scores_are_scaled_before_they_are_rounded(monkeypatch):
    monkeypatch.setattr("bda_fused.numerics.has_fast_gemm", lambda dtype, device: True)
    rows = torch.full((1, 3, 350), 20.0, dtype=torch.float16)  # scores of 140000 before, of 7483 after scaling
    for bias in (None, torch.zeros(3)):
        y = F.residual_attention(rows, rows, rows, attn_bias=bias)
        torch.testing.assert_close(y, rows)


def test_float16_gradients_are_scaled_before_they_are_rounded(monkeypatch):
    """Dropout multiplies dP by 4: where both keys survive, dS is 120000 before and 120 after scaling."""
    monkeypatch.setattr("bda_fused.numerics.has_fast_gemm", lambda dtype, device: True)
    torch.manual_seed(0)
    query = torch.zeros(1, 64, 1, dtype=torch.float16, requires_grad=True)
    rows = torch.tensor([[1.0], [-1.0]], dtype=torch.float16)
    upstream = torch.full((1, 64, 1), 6e4, dtype=torch.float16)
    y = F.residual_attention(query, rows, rows, scale=1e-3, dropout_p=0.75)
    (grad,) = torch.autograd.grad(y, query, upstream)
    assert grad.isfinite().all()
    assert grad.max() == 240


def test_operands_without_data():
    """On the meta device: shapes and dtypes of the results."""
    visual, attributes = torch.empty(B, L, DK, device="meta"), torch.empty(S, DK, device="meta")
    y, weights = F.ssa(visual, attributes, attributes, visual, need_weights=True)
    assert y.shape == visual.shape
    assert weights.shape == (B, L, S)
