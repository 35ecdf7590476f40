"""Kernels of many kinds, compiled by nvcc for sm_80 and executed, against torch."""

import ctypes

import numpy as np
import pytest
import torch

from tests.ptxsim import Out
from tests.ptxsim.probes import NEEDS_NVCC, cuda_kernel

pytestmark = NEEDS_NVCC


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("M", "N", "K"), [(16, 16, 16), (33, 50, 21)])
def test_tiled_matmul(M, N, K):
    a, b, c = draw(M, K), draw(K, N, seed=1), torch.empty(M, N)
    kernel = cuda_kernel("matmul_tiled")
    report = kernel.launch((-(-N // 16), -(-M // 16)), (16, 16), [Out(c), a, b, M, N, K])
    torch.testing.assert_close(c.double(), a.double() @ b.double(), rtol=0, atol=1e-5)
    assert report.barriers == -(-N // 16) * -(-M // 16) * 2 * -(-K // 16)


@pytest.mark.parametrize(("n", "block"), [(1, 32), (5000, 256), (777, 1024)])
def test_shuffle_reduction(n, block):
    x, out = torch.randint(-99, 99, (n,), generator=torch.Generator().manual_seed(0)).float(), torch.empty(3)
    cuda_kernel("block_sum").launch(3, block, [Out(out), x, n])
    assert out.sum() == x.sum()


@pytest.mark.parametrize("seed", range(3))
def test_tensor_core_matmul(seed):
    M, N, K = 128, 64, 96
    a, b, c = draw(M, K).bfloat16(), draw(K, N, seed=1).bfloat16(), torch.empty(M, N)
    kernel = cuda_kernel("matmul_mma", "matmul_mma.cu")
    report = kernel.launch((1, 2), 128, [Out(c), a, b, M, N, K], shared=2 * 2 * (64 * 40 + 32 * 72), seed=seed)
    torch.testing.assert_close(c.double(), a.double() @ b.double(), rtol=0, atol=1e-5)
    assert report.macs == M * N * K
    assert report.mma == M * N * K // (16 * 8 * 16)


def test_pipeline_of_asynchronous_copies():
    x, out = draw(5 * 64 * 4), torch.empty(5 * 64 * 4)
    report = cuda_kernel("pipeline_copy").launch(1, 64, [Out(out), x, 5], shared=2 * 64 * 16)
    assert torch.equal(out, 2 * x)
    assert report.classes["cp.async"] > 0


def test_half2():
    x, y, out = draw(2 * 300).half(), draw(2 * 300, seed=1).half(), torch.empty(600).half()
    cuda_kernel("half2_axpy").launch(3, 128, [Out(out), x, y, np.float16(1.7), 300])
    exact = float(np.float16(1.7)) * x.double() + y.double()
    assert torch.equal(out, exact.half().clamp(min=0))


@pytest.mark.parametrize("n", [1, 20, 40, 64])
def test_barrier_after_some_threads_have_returned(n):
    x, out = draw(64), torch.zeros(64)
    cuda_kernel("reversed_without_the_rest").launch(1, 64, [out, x, n])
    assert torch.equal(out[:n], x[:n].flip(0))


def test_divergent_loops_with_early_exits():
    start = torch.arange(-5, 95, dtype=torch.int32)
    steps = torch.empty_like(start)
    cuda_kernel("collatz").launch(2, 64, [Out(steps), start, 100, 60])

    def collatz(x):
        count = 0
        while x != 1 and count < 60:
            x, count = (x // 2 if x % 2 == 0 else 3 * x + 1), count + 1
        return count if x == 1 else 60

    assert steps.tolist() == [collatz(x) if x > 0 else -1 for x in start.tolist()]


class Task(ctypes.Structure):
    _fields_ = [
        ("x", ctypes.c_uint64),
        ("rows", ctypes.c_int),
        ("columns", ctypes.c_int),
        ("scale", ctypes.c_float * 3),
    ]


@pytest.mark.parametrize("order", range(3))
def test_struct_constant_and_local_memory(order):
    x, out = draw(70, 9), torch.empty(70)
    task = Task(x.data_ptr(), 70, 9, (1.0, 2.0, 3.0))
    cuda_kernel("weighted_columns").launch(3, 32, [Out(out), task, order], tensors={"x": x})
    last = torch.zeros(70, 4)
    for c in range(9):
        last[:, (c + order) % 4] += x[:, c]
    picked = torch.stack([last[:, k * order % 4] for k in range(4)], 1)
    torch.testing.assert_close(out, (picked * torch.tensor([1, -2, 0.5, 4])).sum(1) * (order + 1))


def test_all_parameters_may_come_as_packed_bytes():
    x, out = draw(8, 4), torch.empty(8)
    packed = out.data_ptr().to_bytes(8, "little") + bytes(Task(x.data_ptr(), 8, 4, (1.0, 1.0, 1.0))) + bytes(4)
    report = cuda_kernel("weighted_columns").launch(1, 32, packed, tensors={"x": x, "y": Out(out)})
    torch.testing.assert_close(out, 3.5 * x[:, 0])
    assert report.params["y"].write.unique_bytes == 32
    assert report.params["x"].read.bytes == x.nbytes


def test_atomics_and_votes():
    x = torch.randint(0, 256, (1000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    x[64:96] = 7
    counts, agreeing = torch.zeros(50, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    cuda_kernel("histogram").launch(8, 128, [counts, agreeing, x, 1000, 50], shared=200)
    assert counts.tolist() == torch.bincount(x.long() % 50, minlength=50).tolist()
    assert agreeing.item() == 1


@pytest.mark.parametrize("seed", range(5))
def test_named_barriers(seed):
    out = torch.empty(4, 64, dtype=torch.int32)
    cuda_kernel("producer_consumer").launch(1, 128, [Out(out), 4], seed=seed)
    assert torch.equal(out, torch.arange(4)[:, None] * 100 + torch.arange(63, -1, -1))


def test_functions_of_the_math_library():
    x = torch.cat([draw(200) * 5, torch.tensor([0.0, -0.0, 1e-30, 88.0, -100.0, float("inf")])])
    out = torch.empty(7, len(x))
    cuda_kernel("functions").launch(2, 128, [Out(out), x, len(x)])
    d = x.double()
    truth = [d.exp(), (d.abs() + 1).log(), d.tanh(), 1 / d, d.abs().sqrt(), d.sin(), d.erf()]
    for result, expected in zip(out, truth, strict=True):
        torch.testing.assert_close(result, expected.float(), rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("pitch", [32, 33])
def test_transposition(pitch):
    x, out = draw(96, 96), torch.empty(96, 96)
    cuda_kernel(f"transpose_{pitch}").launch((3, 3), (32, 8), [Out(out), x, 96])
    assert torch.equal(out, x.T)


def test_groups_within_a_warp_and_a_count_at_a_barrier():
    x = torch.arange(-40, 88, dtype=torch.int32)
    out = torch.empty_like(x)
    cuda_kernel("tiles_of_eight").launch(1, 128, [Out(out), x])
    assert torch.equal(out, x.reshape(-1, 8).sum(1).repeat_interleave(8) + 1000 * 87)


@pytest.mark.parametrize("seed", range(3))
def test_generic_pointers_atomics_and_votes_at_barriers(seed):
    x, out = torch.arange(64.0), torch.zeros(66)
    halves, wide, votes = torch.zeros(2).half(), torch.zeros(1, dtype=torch.int64), torch.zeros(4, dtype=torch.int32)
    report = cuda_kernel("generic_pointers").launch(1, 64, [out, x, halves, wide, votes], seed=seed)
    expected = [100 + 63 - t if t % 3 == 0 else t ^ 1 if t % 3 == 1 else -t if t & 1 else t for t in range(64)]
    assert out.tolist() == [*expected, 32, 100 + 32]
    assert halves.tolist() == [64, 32]
    assert 32 <= wide.item() <= 64  # 64 if the first warp runs first, otherwise its lanes alone advance it
    assert votes.tolist() == [1, 1, 1, 1]
    assert report.shared.by["atom"].wavefronts > 0
