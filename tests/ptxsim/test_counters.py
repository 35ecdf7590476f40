"""Counters against closed formulas."""

import math

import numpy as np
import pytest
import torch

from tests.ptxsim import Named, Out
from tests.ptxsim.probes import NEEDS_NVCC, cuda_kernel

pytestmark = NEEDS_NVCC


def sectors(count, size, stride, offset):
    """Distinct 32-byte sectors of ``count`` elements of ``size`` bytes, ``stride`` elements apart, from ``offset`` on.

    Elements are aligned and at most 16 bytes, so each lies in one sector; the sectors rise with the element. Where the
    step is a sector or more every element has its own, otherwise all between the first and the last are touched.
    """
    step = size * stride
    if step >= 32:
        return count
    first, last = offset * size // 32, (offset * size + (count - 1) * step) // 32
    return last - first + 1


def draw_cases():
    rng = np.random.default_rng(0)
    for size in (2, 4, 16):
        for _ in range(8):
            n, offset, x_stride, out_stride = (int(v) for v in rng.integers([1, 0, 1, 1], [200, 40, 20, 20]))
            yield size, n, offset, x_stride, out_stride
        yield size, 128, 0, 1, 1


@pytest.mark.parametrize(("size", "n", "offset", "x_stride", "out_stride"), list(draw_cases()))
def test_sectors_of_strided_copies(size, n, offset, x_stride, out_stride):
    dtype = {2: torch.int16, 4: torch.int32, 16: torch.complex128}[size]
    x = torch.arange(offset + (n - 1) * x_stride + 1).to(dtype)
    out = torch.zeros((n - 1) * out_stride + 1, dtype=dtype)
    args = [Named("out", Out(out)), Named("x", x), n, offset, x_stride, out_stride]
    report = cuda_kernel(f"copy_strided_{size}").launch(-(-n // 64), 64, args)
    assert torch.equal(out[::out_stride], x[offset::x_stride])
    read, write = report.params["x"].read, report.params["out"].write
    warps = [(first, min(32, n - first)) for first in range(0, n, 32)]
    assert read.requests == write.requests == len(warps)
    assert read.bytes == write.bytes == read.unique_bytes == write.unique_bytes == n * size
    assert read.sectors == sum(sectors(count, size, x_stride, offset + first * x_stride) for first, count in warps)
    assert write.sectors == sum(sectors(count, size, out_stride, first * out_stride) for first, count in warps)
    assert read.ideal_sectors == write.ideal_sectors == sum(-(-count * size // 32) for _, count in warps)
    assert report.params["out"].unwritten == out.nbytes - n * size
    assert report.thread_instructions < 32 * report.warp_instructions or n % 64 == 0


@pytest.mark.parametrize("pitch", [32, 33])
def test_wavefronts_of_a_transposition(pitch):
    tiles = 3 * 3
    x, out = torch.zeros(96, 96), torch.zeros(96, 96)
    report = cuda_kernel(f"transpose_{pitch}").launch((3, 3), (32, 8), [out, x, 96])
    assert report.shared.by["st"].wavefronts == report.shared.by["st"].ideal == 32 * tiles
    assert report.shared.by["ld"].ideal == 32 * tiles
    assert report.shared.by["ld"].wavefronts == 32 * tiles * (32 if pitch == 32 else 1)  # a column lies in one bank
    assert report.global_load.sectors == report.global_store.sectors == 4 * 32 * tiles
    assert report.barriers == tiles
    assert report.classes["load.global"] == report.classes["store.global"] == 32 * tiles


@pytest.mark.parametrize("size", [4, 8, 16])
@pytest.mark.parametrize("stride", [1, 2, 3, 4, 7, 8, 16, 32])
def test_wavefronts_of_strided_shared_accesses(size, stride):
    words, lanes = size // 4, 128 // size  # the lanes that share a wavefront without conflicts
    x, out = torch.arange(32.0 * words), torch.zeros(32 * words)
    report = cuda_kernel(f"shared_strided_{size}").launch(1, 32, [out, x, stride], shared=32 * size * stride)
    assert torch.equal(out.view(32, words), x.view(32, words).flip(0))
    # Lanes `period` apart meet in a bank, for each word of an element alike.
    period = 32 // math.gcd(32, words * stride)
    expected = words * max(1, lanes // period)
    assert report.shared.by["ld"].wavefronts == report.shared.by["st"].wavefronts == expected
    assert report.shared.ideal == 2 * words


def test_unique_bytes_are_the_floor_of_a_matmul():
    M, N, K = 128, 64, 96
    a, b, c = torch.zeros(M, K).bfloat16(), torch.zeros(K, N).bfloat16(), torch.zeros(M, N)
    args = [Named("C", Out(c)), Named("A", a), Named("B", b), M, N, K]
    report = cuda_kernel("matmul_mma", "matmul_mma.cu").launch((1, 2), 128, args, shared=2 * 2 * (64 * 40 + 32 * 72))
    assert report.params["A"].read.unique_bytes == report.params["A"].read.bytes == a.nbytes
    assert report.params["B"].read.unique_bytes == b.nbytes
    assert report.params["B"].read.bytes == 2 * b.nbytes  # each of two row tiles reads all of B
    assert report.params["C"].write.unique_bytes == c.nbytes
    assert report.global_load.bytes == a.nbytes + 2 * b.nbytes
    assert report.macs == M * N * K
    assert report.classes["mma"] == report.mma == M * N * K // 2048
    assert report.classes["cp.async"] == (a.nbytes + 2 * b.nbytes) // 512
    assert report.barriers == 2 * 2 * K // 32
    assert (
        report.warp_instructions
        == sum(report.opcodes.values())
        == sum(report.classes.values())
        == sum(report.lines.values())
    )
    mma_lines = {
        line for (file, line), count in report.lines.items() if file.endswith("matmul_mma.cu") and count >= report.mma
    }
    assert mma_lines  # source lines carry counts
