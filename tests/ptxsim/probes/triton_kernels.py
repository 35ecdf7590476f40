"""Triton kernels known from GPUs, written anew after Triton's documentation: what the simulator is proved on."""

import triton
import triton.language as tl


@triton.jit
def vector_add(X, Y, OUT, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    tl.store(OUT + at, tl.load(X + at, mask=inside) + tl.load(Y + at, mask=inside), mask=inside)


@triton.jit
def softmax(X, OUT, columns, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    x = tl.load(X + row * stride + at, mask=at < columns, other=float("-inf")).to(tl.float32)
    e = tl.exp(x - tl.max(x, 0))
    tl.store(OUT + row * stride + at, (e / tl.sum(e, 0)).to(OUT.dtype.element_ty), mask=at < columns)


@triton.jit
def layer_norm(X, W, B, OUT, columns, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    inside = at < columns
    x = tl.load(X + row * columns + at, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(x, 0) / columns
    centred = tl.where(inside, x - mean, 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, 0) / columns + eps)
    y = centred * scale * tl.load(W + at, mask=inside) + tl.load(B + at, mask=inside)
    tl.store(OUT + row * columns + at, y.to(OUT.dtype.element_ty), mask=inside)


@triton.jit
def matmul(A, B, C, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr):
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    ks = tl.arange(0, BK)
    acc = tl.zeros([BM, BN], tl.float32)
    for k in range(0, K, BK):
        a_inside = (rows[:, None] < M) & (k + ks[None, :] < K)
        b_inside = (k + ks[:, None] < K) & (columns[None, :] < N)
        a = tl.load(A + rows[:, None] * K + k + ks[None, :], mask=a_inside, other=0.0)
        b = tl.load(B + (k + ks[:, None]) * N + columns[None, :], mask=b_inside, other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    inside = (rows[:, None] < M) & (columns[None, :] < N)
    tl.store(C + rows[:, None] * N + columns[None, :], acc.to(C.dtype.element_ty), mask=inside)


@triton.jit
def flash_attention(Q, K, V, OUT, N, scale, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr):
    """Rows of OUT = softmax(scale Q K^T) V; scale includes log2(e)."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    ds = tl.arange(0, D)
    q = tl.load(Q + rows[:, None] * D + ds[None, :], mask=rows[:, None] < N, other=0.0)
    highest = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, D], tl.float32)
    for start in range(0, N, BN):
        keys = start + tl.arange(0, BN)
        k = tl.load(K + keys[:, None] * D + ds[None, :], mask=keys[:, None] < N, other=0.0)
        v = tl.load(V + keys[:, None] * D + ds[None, :], mask=keys[:, None] < N, other=0.0)
        scores = tl.where(keys[None, :] < N, tl.dot(q, tl.trans(k)) * scale, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        p = tl.exp2(scores - higher[:, None])
        rescale = tl.exp2(highest - higher)
        total = total * rescale + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None])
        highest = higher
    out = (acc / total[:, None]).to(OUT.dtype.element_ty)
    tl.store(OUT + rows[:, None] * D + ds[None, :], out, mask=rows[:, None] < N)


@triton.jit
def sum_by_atomics(X, OUT, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(OUT, tl.sum(tl.load(X + at, mask=at < n, other=0.0), 0))


@triton.jit
def scale(OUT, X, n, factor=2.0, BLOCK: tl.constexpr = 64):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(OUT + at, factor * tl.load(X + at, mask=at < n), mask=at < n)
