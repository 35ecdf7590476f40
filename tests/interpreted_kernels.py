"""The Triton kernels under Triton's interpreter, on CPU tensors: test_kernels.py runs this with TRITON_INTERPRET=1."""

import pytest
import torch
from bda_fused.kernels.launch import Launch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from bda_fused import backends, modules
from bda_fused import functional as F
from bda_fused.backends.problem import Options, Problem
from bda_fused.testing import assert_close, philox_masks
from tests.attention_cases import FORMS, assert_parity
from tests.parity import recorded_dropout, replayed_dropout, results, twins

B, L, S, DK, DV = 3, 5, 19, 7, 37


def leaf(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", FORMS)
def test_form(name, dtype):
    assert_parity(FORMS[name].but(dtype=dtype), "triton")


MODULES = [
    ("SemanticSynthesisAttention", {}, ((2, 11, 40), (21, 40))),
    ("SemanticSynthesisAttention", {"out_proj": True, "dropout": 0.3, "kv_dropout": 0.2}, ((2, 11, 40), (21, 40))),
    ("VisualSynthesisAttention", {}, ((2, 21, 40), (11, 40))),
    ("VisualSynthesisAttention", {"out_proj": True, "dropout": 0.3}, ((2, 21, 40), (2, 11, 40))),
    ("RegionSelfAttention", {"grid": (3, 5), "out_proj": True, "dropout": 0.3}, ((2, 15, 40),)),
]


@pytest.mark.parametrize(("kind", "options", "shapes"), MODULES)
def test_fused_module_against_the_reference(kind, options, shapes, monkeypatch):
    monkeypatch.setattr("bda_fused.fold.PADDED_DEVICES", ("cpu",))
    torch.manual_seed(0)
    natural, fused = twins(kind, 40, torch.float32, **options)
    truth = twins(kind, 40, **options)[0]
    truth.load_state_dict(natural.state_dict())
    inputs = tuple(torch.randn(shape) for shape in shapes)
    with backends.use("triton"), philox_masks():
        with recorded_dropout() as (masks, seeds):
            ours = results(fused, inputs)
        with replayed_dropout(masks, seeds):
            yardstick = results(natural, inputs)
        with replayed_dropout(masks, seeds):
            expected = results(truth, tuple(x.double() for x in inputs))
    for name, x in expected.items():
        if name != "gradient of k_proj.bias" or options.get("kv_dropout"):
            assert_close(ours[name], x, yardstick[name], gradient="gradient" in name, name=name)


def test_folded_keys_and_values_have_padded_rows_of_zeros(monkeypatch):
    monkeypatch.setattr("bda_fused.fold.PADDED_DEVICES", ("cpu",))
    seen = []
    monkeypatch.setattr(Launch, "run", lambda launch: seen.append(launch.arguments))
    module = modules.SemanticSynthesisAttention(40)
    with backends.use("triton"):
        module(torch.randn(2, 11, 40), torch.randn(21, 40))
    for operand in (seen[0]["k"], seen[0]["v"]):
        assert operand.stride(2) == 64
        assert (operand.as_strided((21, 64), (64, 1))[:, 40:] == 0).all()


LAYOUTS = {
    "padded rows": lambda *shape: leaf(*shape[:-1], shape[-1] + 13)[..., : shape[-1]],
    "every second row": lambda *shape: leaf(*shape[:-2], 2 * shape[-2], shape[-1])[..., ::2, :],
    "transposed": lambda *shape: leaf(*shape[:-2], shape[-1], shape[-2]).mT,
    "images inside": lambda *shape: leaf(shape[-2], shape[0], shape[-1]).transpose(0, 1),
    "expanded": lambda *shape: leaf(*shape[1:]).expand(shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides_of_operands_and_of_the_incoming_gradient(layout):
    torch.manual_seed(0)
    make = LAYOUTS[layout]
    operands = [make(B, L, DK), make(B, S, DK), make(B, S, DV), make(B, L, DV)]
    upstream = make(B, L, DV).detach()
    ours = F.residual_attention(*operands, backend="triton")
    theirs = F.residual_attention(*operands, backend="eager")
    grads = [torch.autograd.grad(y, operands, upstream) for y in (ours, theirs)]
    for x, y in zip((ours, *grads[0]), (theirs, *grads[1]), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_an_incoming_gradient_of_the_map_that_is_one_for_all_images():
    torch.manual_seed(0)
    operands = [leaf(B, L, DK), leaf(S, DK), leaf(S, DV)]
    upstream = torch.randn(L, S).expand(B, L, S)
    ours, theirs = (
        torch.autograd.grad(
            F.residual_attention(*operands, need_weights=True, backend=backend)[1], operands[:2], upstream
        )
        for backend in ("triton", "eager")
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shapes", [
    ((0, L, DK), (S, DK), (S, DV), (0, L, DV)),
    ((B, 0, DK), (S, DK), (S, DV), (B, 0, DV)),
    ((B, L, DK), (0, DK), (0, DV), (B, L, DV)),
])  # fmt: skip
def test_empty_operands(shapes):
    operands = [leaf(*shape) for shape in shapes]
    y = F.residual_attention(*operands, backend="triton")
    assert torch.equal(y, operands[3])
    y.sum().backward()
    assert all(x.grad.isfinite().all() for x in operands)


class Allocations(TorchDispatchMode):
    """Collects the bytes of the memory that operators return and did not get."""

    def __init__(self):
        super().__init__()
        self.bytes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if (
            "empty" in str(function)
            or "new_" in str(function)
            or (isinstance(result, torch.Tensor) and not function.is_view)
        ):
            self.bytes.append(result.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("need_grad", [False, True])
def test_the_forward_allocates_what_it_returns_and_nothing_else(need_grad, need_weights, dtype, monkeypatch):
    launched = []
    monkeypatch.setattr(
        Launch, "run", lambda launch: launched.append(launch)
    )  # the interpreter copies what it is given
    query, key = torch.randn(B, 1, L, DK, dtype=dtype), torch.randn(1, 1, S, DK, dtype=dtype)
    value, residual = torch.randn(1, 1, S, DV, dtype=dtype), torch.randn(B, 1, L, DV, dtype=dtype)
    problem = Problem.of(query, key, value, residual, None)
    options = Options(0.5, 0.0, False, need_weights, False, need_grad)
    with Allocations() as allocations:
        y, weights, *_ = backends.module("triton").forward(problem, query, key, value, residual, None, None, options)
    pitch = S if need_weights else 32  # the map that is kept has rows of whole sectors
    expected = [B * L * DV * dtype.itemsize] + [B * L * pitch * dtype.itemsize] * (need_grad or need_weights)
    assert sorted(size for size in allocations.bytes if size) == sorted(expected)
    assert weights.numel() == (B * L * S if need_grad or need_weights else 0)
    handed = {x.data_ptr() for launch in launched for x in launch.arguments.values() if isinstance(x, torch.Tensor)}
    written = {y.data_ptr(), weights.data_ptr()} if need_grad or need_weights else {y.data_ptr()}
    assert handed == {x.data_ptr() for x in (query, key, value, residual)} | written


@pytest.fixture
def launches(monkeypatch):
    names = []
    run = Launch.run
    monkeypatch.setattr(Launch, "run", lambda launch: names.append(launch.kernel.__name__) or run(launch))
    return names


def test_only_what_is_needed_is_launched(launches):
    query, key, value = leaf(L, DK), leaf(B, S, DK), leaf(B, S, DV)
    y = F.residual_attention(query.detach(), key.detach(), value, backend="triton")
    launches.clear()
    y.sum().backward()
    assert launches == ["residual_attention_summed_product"]
    query = leaf(B, L, DK)
    y = F.residual_attention(query, key.detach(), value.detach(), backend="triton")
    launches.clear()
    y.sum().backward()
    assert launches == ["residual_attention_backward_rows"]


def test_two_runs_are_bit_identical():
    operands = [leaf(8, 29, 35), leaf(85, 35), leaf(85, 35), leaf(8, 29, 35)]
    first, second = (torch.autograd.grad(F.ssa(*operands, backend="triton").sin().sum(), operands) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_compiles_to_one_graph_for_any_batch():
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def compiled(visual, attributes):
        refined, ssa_map = F.ssa(visual, attributes, attributes, visual, need_weights=True, backend="triton")
        return F.vsa(attributes, refined, refined, attributes, backend="triton"), ssa_map

    for batch in range(1, 5):
        leaves = leaf(batch, L, DK), leaf(S, DK)
        result, ssa_map = compiled(*leaves)
        grads = torch.autograd.grad(result.square().sum() + ssa_map.square().sum(), leaves)
        refined, expected_map = F.ssa(leaves[0], leaves[1], leaves[1], leaves[0], need_weights=True, backend="eager")
        expected = F.vsa(leaves[1], refined, refined, leaves[1], backend="eager")
        expected_grads = torch.autograd.grad(expected.square().sum() + expected_map.square().sum(), leaves)
        torch.testing.assert_close(
            [result, ssa_map, *grads], [expected, expected_map, *expected_grads], rtol=1e-4, atol=1e-4
        )
    assert counter.frame_count <= 2


def test_what_is_refused_is_refused_in_one_sentence():
    operands = [torch.randn(B, L, DK, dtype=torch.float64), torch.randn(S, DK, dtype=torch.float64)]
    with pytest.raises(backends.BackendError, match="takes float16, bfloat16 and float32, got float64$"):
        F.residual_attention(*operands, operands[1], backend="triton")
    explanation = backends.explain(*operands, operands[1])
    assert explanation.backend in ("cpu", "eager")
    assert backends.explain(*(x.float() for x in operands), operands[1].float(), backend="triton").backend == "triton"


NEGATED = {
    "a negative view": lambda *shape: torch._neg_view(torch.randn(shape)),
    "an imaginary part": lambda *shape: torch.randn(shape, dtype=torch.complex64).conj().imag,
}


@pytest.mark.parametrize("kind", NEGATED)
def test_operands_with_the_negative_bit(kind):
    """Their memory holds the opposite of what they are: the dispatcher resolves them before a kernel sees them."""
    torch.manual_seed(0)
    make = NEGATED[kind]
    operands = [make(B, L, DK), make(S, DK), make(S, DV), make(B, L, DV), make(L, S)]
    upstream = make(B, L, DV)
    assert all(x.is_neg() for x in (*operands, upstream))
    leaves = [x.requires_grad_() for x in operands]
    ours, theirs = (
        F.residual_attention(*leaves[:4], attn_bias=leaves[4], backend=backend) for backend in ("triton", "eager")
    )
    grads = [torch.autograd.grad(y, leaves, upstream) for y in (ours, theirs)]
    plain = F.residual_attention(*(x.resolve_neg() for x in operands[:4]), attn_bias=operands[4].resolve_neg())
    torch.testing.assert_close(theirs, plain)
    for x, y in zip((ours, *grads[0]), (theirs, *grads[1]), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


class Wrapper(torch.Tensor):
    """A tensor subclass without storage of its own."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, strides=inner.stride())

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        inner = [x.inner if isinstance(x, cls) else x for x in args]
        return function(*inner, **(kwargs or {}))


def test_tensors_without_storage_never_reach_a_kernel():
    operands = [torch.randn(B, L, DK), torch.randn(S, DK), torch.randn(S, DV)]
    expected = F.residual_attention(*operands, backend="triton")
    with torch.no_grad():
        assert torch.equal(F.residual_attention(Wrapper(operands[0]), *operands[1:], backend="triton"), expected)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y = F.residual_attention(*(mode.from_tensor(x) for x in operands), backend="triton")
    assert isinstance(y, FakeTensor) and y.shape == expected.shape
    grad = torch.func.grad(lambda query: F.residual_attention(query, *operands[1:], backend="triton").sum())
    query = operands[0].clone().requires_grad_()
    F.residual_attention(query, *operands[1:], backend="triton").sum().backward()
    torch.testing.assert_close(grad(operands[0]), query.grad)
