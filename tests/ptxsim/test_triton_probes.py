"""Triton's own kinds of kernels, compiled for sm_80 and executed, against torch in float64."""

import math

import pytest
import torch

from tests import ptxsim

pytest.importorskip("triton")
from tests.ptxsim.probes import triton_kernels as kernels

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_near(result, truth, *, rounding):
    """Within ``rounding`` of the truth's largest entry."""
    assert (result.double() - truth).abs().max() <= rounding * truth.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 1000, 4096])
def test_vector_add(dtype, n):
    x, y, out = draw(n, dtype=dtype), draw(n, dtype=dtype, seed=1), torch.empty(n, dtype=dtype)
    report = ptxsim.run_triton(kernels.vector_add, -(-n // 512), x, y, ptxsim.Out(out), n, BLOCK=512)
    assert torch.equal(out, x + y)
    size = n * x.element_size()
    assert [report.params[name].read.unique_bytes for name in "XY"] == [size, size]
    assert report.params["OUT"].write.unique_bytes == size
    assert report.params["OUT"].unwritten == 0


def test_arguments_are_bound_as_python_binds_them():
    x, y = draw(100), torch.zeros(100)
    ptxsim.run_triton(kernels.scale, 2, y, n=100, X=x)
    assert torch.equal(y, 2 * x)
    ptxsim.run_triton(kernels.scale, 1, y, x, 100, 3.0, 128)
    assert torch.equal(y, 3 * x)
    for args, keywords in (((y, x), {}), ((y, x, 100, 2.0, 128, 1), {}), ((y, x, 100, 2.0, 128), {"BLOCK": 64})):
        with pytest.raises(TypeError, match=r"'n'|too many|'BLOCK'"):
            ptxsim.run_triton(kernels.scale, 1, *args, **keywords)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [17, 781])
def test_softmax(dtype, columns):
    x, out = draw(5, columns, dtype=dtype), torch.empty(5, columns, dtype=dtype)
    block = 1 << (columns - 1).bit_length()
    ptxsim.run_triton(kernels.softmax, 5, x, ptxsim.Out(out), columns, columns, BLOCK=block)
    assert_near(out, torch.softmax(x.double(), 1), rounding=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_norm(dtype):
    x, w, b = draw(6, 350, dtype=dtype), draw(350, seed=1), draw(350, seed=2)
    out = torch.empty_like(x)
    ptxsim.run_triton(kernels.layer_norm, 6, x, w, b, ptxsim.Out(out), 350, 1e-5, BLOCK=512)
    truth = torch.nn.functional.layer_norm(x.double(), (350,), w.double(), b.double(), 1e-5)
    assert_near(out, truth, rounding=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("dtype", "precision", "rounding"),
    [
        (torch.float16, "ieee", 1e-3),
        (torch.bfloat16, "ieee", 8e-3),
        (torch.float32, "tf32", 2e-3),
        (torch.float32, "tf32x3", 2e-6),
        (torch.float32, "ieee", 1e-6),
    ],
)
def test_matmul(dtype, precision, rounding, stages):
    M, N, K = 100, 72, 200
    a, b, c = draw(M, K, dtype=dtype), draw(K, N, dtype=dtype, seed=1), torch.empty(M, N, dtype=dtype)
    report = ptxsim.run_triton(
        kernels.matmul,
        (2, 2),
        *(a, b, ptxsim.Out(c), M, N, K),
        BM=64,
        BN=64,
        BK=32,
        PRECISION=precision,
        num_stages=stages,
    )
    assert_near(c, a.double() @ b.double(), rounding=rounding)
    padded = 2 * 64 * 2 * 64 * 224
    assert report.macs == {"ieee": padded * (dtype != torch.float32), "tf32": padded, "tf32x3": 3 * padded}[precision]


@pytest.mark.parametrize("stages", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("N", "D"), [(128, 64), (150, 32)])
def test_flash_attention(dtype, N, D, stages):
    q, k, v = (draw(N, D, dtype=dtype, seed=s) for s in range(3))
    out = torch.empty_like(q)
    scale = math.log2(math.e) / math.sqrt(D)
    for seed in range(2):
        ptxsim.run_triton(
            kernels.flash_attention,
            -(-N // 64),
            *(q, k, v, ptxsim.Out(out), N, scale),
            BM=64,
            BN=64,
            D=D,
            num_stages=stages,
            launch={"seed": seed},
        )
        truth = torch.softmax(q.double() @ k.double().T / math.sqrt(D), -1) @ v.double()
        assert_near(out, truth, rounding=2 * torch.finfo(dtype).eps)


def test_a_sum_by_atomics_is_exact_in_any_order_of_blocks():
    x = torch.randint(-1000, 1000, (5000,), generator=torch.Generator().manual_seed(0)).float()
    for seed in range(3):
        out = torch.zeros(1)
        report = ptxsim.run_triton(kernels.sum_by_atomics, 10, x, out, 5000, BLOCK=512, launch={"seed": seed})
        assert out.item() == x.sum().item()
        assert report.params["OUT"].atomic.requests == 10


def test_a_flash_attention_block_is_fast():
    """64 rows against 128 keys, D = 64, bf16, 4 warps: under 0.2 s is the aim; it takes milliseconds."""
    arguments = [torch.randn(128, 64).bfloat16() for _ in range(4)]
    kernel = kernels.flash_attention
    seconds = min(ptxsim.run_triton(kernel, 1, *arguments, 128, 0.18, BM=64, BN=64, D=64).seconds for _ in range(3))
    assert seconds < 0.2
