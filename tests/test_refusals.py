"""Every wrong call is refused in one sentence that names what was given and what is allowed, before anything runs."""

import pytest
import torch

from bda_fused import backends
from bda_fused import functional as F
from bda_fused.backends import BackendError

B, H, L, S, DK, DV = 2, 3, 4, 5, 6, 7


def call(function=F.residual_attention, **changes):
    arguments = {
        "query": torch.randn(B, L, DK),
        "key": torch.randn(S, DK),
        "value": torch.randn(S, DV),
        "residual": torch.randn(B, L, DV),
        **changes,
    }
    return function(**arguments)


def heads(**changes):
    arguments = {
        "query": torch.randn(B, H, L, DK),
        "key": torch.randn(1, H, S, DK),
        "value": torch.randn(1, H, S, DV),
        "residual": torch.randn(B, H, L, DV),
    }
    return call(**arguments | changes)


def ssa(**changes):
    return call(F.ssa, **changes)


def vsa(**changes):
    operands = {
        "query": torch.randn(L, DK),
        "key": torch.randn(B, S, DK),
        "value": torch.randn(B, S, DV),
        "residual": torch.randn(L, DV),
    }
    return call(F.vsa, **operands | changes)


def t(*shape, **kwargs):
    return torch.zeros(shape, **kwargs)


WRONG_CALLS = [
    # what it is not
    (call, {"query": [[1.0]]}, TypeError, "query must be a torch.Tensor, got list"),
    (call, {"key": None}, TypeError, "key must be a torch.Tensor, got NoneType"),
    (call, {"residual": 0.0}, TypeError, "residual must be a torch.Tensor, got float"),
    (call, {"attn_bias": 1}, TypeError, "attn_bias must be a torch.Tensor, got int"),
    (call, {"key": t(S, DK).to_sparse()}, TypeError, "key must be a dense (strided) tensor, got layout sparse_coo"),
    (
        call,
        {"value": torch.nested.nested_tensor([t(S, DV)], layout=torch.jagged)},
        TypeError,
        "value must be a dense (strided) tensor, got layout nested",
    ),
    # dtypes
    (call, {"query": t(B, L, DK, dtype=torch.int64)}, TypeError, "query must be float16, bfloat16, float32 or float64, got int64"),
    (call, {"key": t(S, DK, dtype=torch.complex64)}, TypeError, "key must be float16, bfloat16, float32 or float64, got complex64"),
    (call, {"value": t(S, DV, dtype=torch.bool)}, TypeError, "value must be float16, bfloat16, float32 or float64, got bool"),
    (call, {"residual": t(B, L, DV, dtype=torch.int32)}, TypeError, "residual must be float16, bfloat16, float32 or float64, got int32"),
    (
        call,
        {"query": t(B, L, DK).to(torch.float8_e4m3fn)},
        TypeError,
        "query must be float16, bfloat16, float32 or float64, got float8_e4m3fn",
    ),
    (call, {"key": t(S, DK, dtype=torch.float64)}, TypeError, "key must have the query's dtype float32, got float64"),
    (call, {"value": t(S, DV, dtype=torch.bfloat16)}, TypeError, "value must have the query's dtype float32, got bfloat16"),
    (call, {"attn_bias": t(S, dtype=torch.bool)}, TypeError, "use 0 where a key may be attended and -inf where it is masked"),
    (call, {"attn_bias": t(S, dtype=torch.int8)}, TypeError, "attn_bias must be float16, bfloat16, float32 or float64, got int8"),
    # devices
    (call, {"key": t(S, DK, device="meta")}, ValueError, "key must be on the query's device cpu, got meta"),
    (call, {"attn_bias": t(S, device="meta")}, ValueError, "attn_bias must be on the query's device cpu, got meta"),
    # ranks
    (call, {"query": t(DK)}, ValueError, "query must be 2-D (L, D), 3-D (B, L, D) or 4-D (B, H, L, D), got shape (6,)"),
    (call, {"query": t(1, B, 1, L, DK)}, ValueError, "query must be 2-D (L, D), 3-D (B, L, D) or 4-D (B, H, L, D), got shape (1, 2, 1, 4, 6)"),
    (call, {"key": t(1, 1, S, DK)}, ValueError, "key has 4 dimensions but query has 3: all operands must be 4-D (with heads) or all at most 3-D"),
    (heads, {"key": t(S, DK)}, ValueError, "key has 2 dimensions but query has 4: all operands must be 4-D (with heads) or all at most 3-D"),
    (heads, {"residual": t(B, L, DV)}, ValueError, "residual has 3 dimensions but query has 4"),
    # sizes
    (call, {"key": t(S, DK + 1)}, ValueError, "key must have the query's width 6, got 7"),
    (call, {"query": t(B, L, 0), "key": t(S, 0)}, ValueError, "query, key and value must be at least 1 wide, got 0 and 7"),
    (call, {"value": t(S, 0), "residual": t(B, L, 0)}, ValueError, "query, key and value must be at least 1 wide, got 6 and 0"),
    (call, {"value": t(S + 1, DV)}, ValueError, "value must have one row for each of the 5 keys, got 6"),
    (call, {"residual": t(B, L, DV + 1)}, ValueError, "residual must end in (L, Dv) = (4, 7), got shape (2, 4, 8)"),
    (call, {"residual": t(B, 1, DV)}, ValueError, "residual must end in (L, Dv) = (4, 7), got shape (2, 1, 7)"),
    (call, {"key": t(B + 1, S, DK)}, ValueError, "key has batch size 3 but query has 2"),
    (call, {"residual": t(B + 1, L, DV)}, ValueError, "residual has batch size 3 but query has 2"),
    (call, {"query": t(L, DK), "key": t(B, S, DK), "residual": t(3, L, DV)}, ValueError, "residual has batch size 3 but key has 2"),
    (heads, {"key": t(1, H + 1, S, DK)}, ValueError, "key has head size 4 but query has 3"),
    (heads, {"residual": t(B, 2, L, DV)}, ValueError, "residual has head size 2 but query has 3"),
    # biases
    (call, {"attn_bias": t(S + 1)}, ValueError, "attn_bias must broadcast to the scores (..., L, S) = (..., 4, 5), got shape (6,)"),
    (call, {"attn_bias": t(L + 1, S)}, ValueError, "attn_bias must broadcast to the scores (..., L, S) = (..., 4, 5), got shape (5, 5)"),
    (call, {"attn_bias": t(3, L, S)}, ValueError, "attn_bias has batch size 3 but query has 2"),
    (call, {"attn_bias": t(1, 1, L, S)}, ValueError, "attn_bias must be at most 3-D when query is 3-D, got shape (1, 1, 4, 5)"),
    (heads, {"attn_bias": t(H, L, S)}, ValueError, "attn_bias must be at most 2-D, or 4-D when query is 4-D, got shape (3, 4, 5)"),
    (heads, {"attn_bias": t(1, 2, L, S)}, ValueError, "attn_bias has head size 2 but query has 3"),
    # options
    (call, {"scale": float("nan")}, ValueError, "scale must be a finite float or None, got nan"),
    (call, {"scale": float("inf")}, ValueError, "scale must be a finite float or None, got inf"),
    (call, {"scale": 10**400}, ValueError, "scale must be a finite float or None, got 1000"),
    (call, {"scale": -1e39}, ValueError, "scale must be in the range of float32, got -1e+39"),
    (call, {"scale": "auto"}, TypeError, "scale must be a finite float or None, got str"),
    (call, {"scale": torch.ones(())}, TypeError, "scale must be a finite float or None, got Tensor"),
    (call, {"dropout_p": -1}, ValueError, "dropout_p must be in [0, 1], got -1"),
    (call, {"dropout_p": 2}, ValueError, "dropout_p must be in [0, 1], got 2"),
    (call, {"dropout_p": 10**400}, ValueError, "dropout_p must be in [0, 1], got 1000"),
    (call, {"dropout_p": float("nan")}, ValueError, "dropout_p must be in [0, 1], got nan"),
    (call, {"dropout_p": True}, TypeError, "dropout_p must be a float in [0, 1], got bool"),
    (call, {"need_weights": 1}, TypeError, "need_weights must be True or False, got int"),
    (call, {"backend": "cudnn"}, ValueError, "backend must be one of auto, cuda, triton, cpu, eager, got 'cudnn'"),
    (call, {"backend": None}, TypeError, "backend must be a name, got NoneType"),
    # the two named attentions
    (ssa, {"query": t(L, DK)}, ValueError, "query of ssa must be per image, (B, rows, width) or (B, H, rows, width), got shape (4, 6)"),
    (ssa, {"key": t(B, S, DK)}, ValueError, "key of ssa must be shared by all images, (rows, width) or (1, H, rows, width), got shape (2, 5, 6)"),
    (ssa, {"residual": None}, TypeError, "residual must be a torch.Tensor, got NoneType"),
    (vsa, {"query": t(B, L, DK)}, ValueError, "query of vsa must be shared by all images"),
    (vsa, {"value": t(S, DV)}, ValueError, "value of vsa must be per image"),
]  # fmt: skip


@pytest.mark.parametrize(("function", "changes", "error", "message"), WRONG_CALLS, ids=[c[3][:60] for c in WRONG_CALLS])
def test_wrong_call(function, changes, error, message, monkeypatch):
    def nothing_runs(*_):
        raise AssertionError("a refused call reached the operators")

    monkeypatch.setattr("bda_fused.autograd.ResidualAttentionFunction.apply", nothing_runs)
    with pytest.raises(error) as refusal:
        function(**changes)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_there_are_enough_wrong_calls_and_each_says_something_of_its_own():
    assert len({message for *_, message in WRONG_CALLS}) == len(WRONG_CALLS) >= 40


def test_the_right_calls_beside_the_wrong_ones_pass():
    for function in (call, heads, ssa, vsa):
        function()


@pytest.mark.parametrize(
    ("backend", "reason"),
    [
        ("cuda", "the cuda backend takes CUDA tensors, got cpu"),
        ("triton", "the triton backend takes CUDA tensors, got cpu"),
    ],
)
def test_a_named_backend_never_falls_back(backend, reason):
    with pytest.raises(BackendError, match=f"backend='{backend}' cannot run: {reason}"):
        call(backend=backend)
    explanation = backends.explain(torch.randn(B, L, DK), torch.randn(S, DK), torch.randn(S, DV), backend=backend)
    assert explanation.backend is None
    assert explanation.refused[backend] == reason


def test_explain_names_the_backend_that_runs_and_every_reason():
    explanation = backends.explain(torch.randn(B, L, DK), torch.randn(S, DK), torch.randn(S, DV))
    assert explanation.backend == "eager"
    assert set(explanation.refused) == {"cuda", "triton", "cpu"}
    lines = str(explanation).splitlines()
    assert lines[0] == "eager runs"
    assert len(lines) == 4


def test_explain_refuses_what_the_function_refuses():
    with pytest.raises(ValueError, match="key must have the query's width 6, got 7"):
        backends.explain(torch.randn(B, L, DK), torch.randn(S, DK + 1), torch.randn(S, DV))
