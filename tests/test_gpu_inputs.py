"""Tensors that are not what their memory says: right on both GPU backends, in the simulator, or refused in words."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bda_fused import functional as F
from tests import cuda_device

pytest.importorskip("triton")
from tests import simulated_kernels

SIMULATED = {"cuda": cuda_device.simulated, "triton": simulated_kernels.simulated}
BACKENDS = pytest.mark.parametrize("backend", SIMULATED)


def negative(x):
    """The same numbers, behind the bit that says that memory holds their negatives."""
    result = torch._neg_view(-x)
    assert result.is_neg()
    return result


def imaginary(x):
    """The same numbers, as what a conjugation that has not been carried out makes of an imaginary part."""
    result = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert result.is_neg() and result.stride(-1) == 2
    return result


def step(query, key, upstream, backend):
    query, key = query.detach().requires_grad_(), key.detach().requires_grad_()
    y = F.ssa(query, key, key, query.detach(), backend=backend)
    return [y.detach(), *torch.autograd.grad(y, [query, key], upstream)]


@BACKENDS
@pytest.mark.parametrize("hide", [negative, imaginary])
def test_negative_bit(backend, hide):
    """In operands, in what the backward gets, and in what is saved for it."""
    operands = [torch.randn(shape) for shape in ((2, 9, 8), (5, 8), (2, 9, 8))]
    with SIMULATED[backend]():
        results = step(*map(hide, operands), backend)
        expected = step(*operands, backend)
    for x, y in zip(results, expected, strict=True):
        assert not x.is_neg()
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


@BACKENDS
def test_tensors_without_memory_run_nothing(backend):
    with SIMULATED[backend]() as ran, FakeTensorMode():
        query, key = torch.empty(2, 9, 8, requires_grad=True), torch.empty(5, 8, requires_grad=True)
        y = F.ssa(query, key, key, query, backend=backend)
        grads = torch.autograd.grad(y.sum(), [query, key])
    assert [tuple(x.shape) for x in (y, *grads)] == [(2, 9, 8), (2, 9, 8), (5, 8)]
    assert not (ran.launches if backend == "cuda" else ran)


@BACKENDS
def test_gradient_transform(backend):
    """torch.func.grad hands wrappers to the public function, and plain tensors reach the kernels."""
    query, key = torch.randn(2, 9, 8), torch.randn(5, 8)
    with SIMULATED[backend]():
        grad = torch.func.grad(lambda x: F.ssa(query, x, x, query, backend=backend).square().sum())(key)
        leaf = key.clone().requires_grad_()
        (expected,) = torch.autograd.grad(F.ssa(query, leaf, leaf, query, backend=backend).square().sum(), leaf)
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-5)


@BACKENDS
def test_mapped_wrappers_are_refused(backend):
    with SIMULATED[backend](), pytest.raises(RuntimeError, match=r"does not support torch\.func\.vmap"):
        torch.func.vmap(lambda x: F.residual_attention(x, x, x, backend=backend))(torch.randn(2, 9, 8))


@BACKENDS
def test_wrappers_without_memory_answer_for_themselves(backend):
    """A subclass that holds no memory sees the operators before a backend does."""

    class Wrapper(torch.Tensor):
        __torch_function__ = torch._C._disabled_torch_function_impl

        @staticmethod
        def __new__(cls, x):
            return torch.Tensor._make_wrapper_subclass(cls, x.shape, dtype=x.dtype)

        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            raise NotImplementedError("no memory")

    x = torch.randn(2, 9, 8)
    with SIMULATED[backend]() as ran, pytest.raises(NotImplementedError, match="no memory"):
        F.residual_attention(Wrapper(x), x, x, backend=backend)
    assert not (ran.launches if backend == "cuda" else ran)
