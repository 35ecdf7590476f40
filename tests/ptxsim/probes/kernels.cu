// CUDA kernels of the kinds that every GPU runs, one for each part of the language that the simulator covers.
#include <cooperative_groups.h>
#include <cuda_fp16.h>
#include <cuda/pipeline>

#include <cstdint>

// C = A B by 16 x 16 tiles in shared memory.
extern "C" __global__ void matmul_tiled(float* C, const float* A, const float* B, int M, int N, int K) {
  __shared__ float a[16][16], b[16][17];
  int x = threadIdx.x, y = threadIdx.y, row = blockIdx.y * 16 + y, col = blockIdx.x * 16 + x;
  float sum = 0;
  for (int k0 = 0; k0 < K; k0 += 16) {
    a[y][x] = row < M && k0 + x < K ? A[row * K + k0 + x] : 0;
    b[y][x] = k0 + y < K && col < N ? B[(k0 + y) * N + col] : 0;
    __syncthreads();
    for (int k = 0; k < 16; ++k) sum += a[y][k] * b[k][x];
    __syncthreads();
  }
  if (row < M && col < N) C[row * N + col] = sum;
}

// One sum for each block: shuffles within warps, then across them through shared memory.
extern "C" __global__ void block_sum(float* out, const float* x, int n) {
  __shared__ float partial[32];
  float sum = 0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) sum += x[i];
  for (int step = 16; step; step /= 2) sum += __shfl_down_sync(~0u, sum, step);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x < 32) {
    sum = threadIdx.x < blockDim.x / 32 ? partial[threadIdx.x] : 0;
    for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if (threadIdx.x == 0) out[blockIdx.x] = sum;
  }
}

// out = 2 x through shared memory, two stages of asynchronous copies in flight.
extern "C" __global__ void pipeline_copy(float4* out, const float4* x, int tiles) {
  extern __shared__ float4 stages[];
  auto pipeline = cuda::make_pipeline();
  int t = threadIdx.x, size = blockDim.x;
  auto fetch = [&](int tile) {
    pipeline.producer_acquire();
    if (tile < tiles)
      cuda::memcpy_async(&stages[tile % 2 * size + t], &x[tile * size + t], cuda::aligned_size_t<16>(16), pipeline);
    pipeline.producer_commit();
  };
  fetch(0);
  for (int tile = 0; tile < tiles; ++tile) {
    fetch(tile + 1);
    cuda::pipeline_consumer_wait_prior<1>(pipeline);
    __syncthreads();
    float4 v = stages[tile % 2 * size + (size - 1 - t)];
    out[tile * size + (size - 1 - t)] = {2 * v.x, 2 * v.y, 2 * v.z, 2 * v.w};
    __syncthreads();
  }
}

// a x + y, two halves at a time, clamped at zero.
extern "C" __global__ void half2_axpy(__half2* out, const __half2* x, const __half2* y, __half a, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) out[i] = __hmax2(__hfma2(__half2half2(a), x[i], y[i]), __float2half2_rn(0.0f));
}

// Steps of the Collatz sequence: early exits, and loops within loops that each lane leaves at its own time.
extern "C" __global__ void collatz(int* steps, const int* start, int n, int limit) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  long long x = start[i];
  if (x <= 0) {
    steps[i] = -1;
    return;
  }
  int count = 0;
  while (x != 1 && count < limit) {
    while (x % 2 == 0) {
      x /= 2;
      if (++count == limit) break;
    }
    if (x == 1 || count == limit) continue;
    x = 3 * x + 1;
    ++count;
  }
  steps[i] = x == 1 ? count : limit;
}

struct Task {
  const float* x;
  int rows, columns;
  float scale[3];
};

__constant__ float WEIGHTS[4] = {1, -2, 0.5f, 4};

// A struct by value, constant memory, and a local array that is indexed at run time.
extern "C" __global__ void weighted_columns(float* out, Task task, int order) {
  int row = blockIdx.x * blockDim.x + threadIdx.x;
  if (row >= task.rows) return;
  float last[4] = {};
  for (int c = 0; c < task.columns; ++c) last[(c + order) & 3] += task.x[row * task.columns + c];
  float sum = 0;
  for (int k = 0; k < 4; ++k) sum += last[(k * order) & 3] * WEIGHTS[k];
  out[row] = sum * task.scale[order % 3];
}

// A histogram in shared memory by atomics, then in global memory; counts warps that agree by a vote.
extern "C" __global__ void histogram(unsigned* counts, unsigned* agreeing, const uint8_t* x, int n, int bins) {
  extern __shared__ unsigned local[];
  for (int b = threadIdx.x; b < bins; b += blockDim.x) local[b] = 0;
  __syncthreads();
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  int value = i < n ? x[i] % bins : -1;
  if (value >= 0) atomicAdd(&local[value], 1u);
  if (__all_sync(~0u, value == __shfl_sync(~0u, value, 0)) && threadIdx.x % 32 == 0) atomicInc(agreeing, ~0u);
  __syncthreads();
  for (int b = threadIdx.x; b < bins; b += blockDim.x)
    if (local[b]) atomicAdd(&counts[b], local[b]);
}

// Half of the warps produce, half consume, through two named barriers.
extern "C" __global__ void producer_consumer(int* out, int rounds) {
  __shared__ int slot[64];
  int t = threadIdx.x % 64;
  bool producer = threadIdx.x < 64;
  for (int r = 0; r < rounds; ++r) {
    if (producer) {
      if (r) asm volatile("bar.sync 2, 128;" ::: "memory");
      slot[t] = r * 100 + t;
      asm volatile("bar.arrive 1, 128;" ::: "memory");
    } else {
      asm volatile("bar.sync 1, 128;" ::: "memory");
      out[r * 64 + t] = slot[63 - t];
      if (r + 1 < rounds) asm volatile("bar.arrive 2, 128;" ::: "memory");
    }
  }
}

// Accurate functions of the math library: their own code, not one instruction.
extern "C" __global__ void functions(float* out, const float* x, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  float v = x[i];
  out[i] = expf(v);
  out[n + i] = logf(fabsf(v) + 1);
  out[2 * n + i] = tanhf(v);
  out[3 * n + i] = 1.0f / v;
  out[4 * n + i] = sqrtf(fabsf(v));
  out[5 * n + i] = sinf(v);
  out[6 * n + i] = erff(v);
}

// Tiles of 32 x 32 through shared memory whose rows are PITCH words long.
template <int PITCH> __device__ void transpose(float* out, const float* x, int n) {
  __shared__ float tile[32][PITCH];
  int row = blockIdx.y * 32, col = blockIdx.x * 32;
  for (int r = threadIdx.y; r < 32; r += blockDim.y) tile[r][threadIdx.x] = x[(row + r) * n + col + threadIdx.x];
  __syncthreads();
  for (int r = threadIdx.y; r < 32; r += blockDim.y) out[(col + r) * n + row + threadIdx.x] = tile[threadIdx.x][r];
}
extern "C" __global__ void transpose_32(float* out, const float* x, int n) { transpose<32>(out, x, n); }
extern "C" __global__ void transpose_33(float* out, const float* x, int n) { transpose<33>(out, x, n); }

// A group of threads of a warp that is no whole warp, and a count over a block at a barrier.
extern "C" __global__ void tiles_of_eight(int* out, const int* x) {
  namespace cg = cooperative_groups;
  auto tile = cg::tiled_partition<8>(cg::this_thread_block());
  int sum = x[threadIdx.x];
  for (int step = 4; step; step /= 2) sum += tile.shfl_xor(sum, step);
  out[threadIdx.x] = sum + 1000 * __syncthreads_count(x[threadIdx.x] > 0);
}

// out[i * out_stride] = x[offset + i * x_stride], one T for each thread.
template <class T> __device__ void copy_strided(T* out, const T* x, int n, int offset, int x_stride, int out_stride) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) out[i * out_stride] = x[offset + i * x_stride];
}
extern "C" __global__ void copy_strided_2(uint16_t* out, const uint16_t* x, int n, int offset, int x_stride,
                                          int out_stride) {
  copy_strided(out, x, n, offset, x_stride, out_stride);
}
extern "C" __global__ void copy_strided_4(float* out, const float* x, int n, int offset, int x_stride, int out_stride) {
  copy_strided(out, x, n, offset, x_stride, out_stride);
}
extern "C" __global__ void copy_strided_16(float4* out, const float4* x, int n, int offset, int x_stride,
                                           int out_stride) {
  copy_strided(out, x, n, offset, x_stride, out_stride);
}

// One warp reverses its elements through shared memory, lanes STRIDE elements apart.
template <class T> __device__ void shared_strided(T* out, const T* x, int stride) {
  extern __shared__ __align__(16) unsigned char memory[];
  T* s = reinterpret_cast<T*>(memory);
  s[threadIdx.x * stride] = x[threadIdx.x];
  __syncwarp();
  out[threadIdx.x] = s[(31 - threadIdx.x) * stride];
}
extern "C" __global__ void shared_strided_4(float* out, const float* x, int stride) { shared_strided(out, x, stride); }
extern "C" __global__ void shared_strided_8(float2* out, const float2* x, int stride) {
  shared_strided(out, x, stride);
}
extern "C" __global__ void shared_strided_16(float4* out, const float4* x, int stride) {
  shared_strided(out, x, stride);
}

// Pointers whose memory is known at run time alone; atomics on halves, floats and 64 bits; votes at a barrier.
extern "C" __global__ void generic_pointers(float* out, const float* x, __half2* halves, unsigned long long* wide,
                                            int* votes) {
  __shared__ float s[64];
  float mine[2] = {x[threadIdx.x], -x[threadIdx.x]};
  s[threadIdx.x] = 100 + x[threadIdx.x];
  __syncthreads();
  const float* p = threadIdx.x % 3 == 0   ? &s[63 - threadIdx.x]
                   : threadIdx.x % 3 == 1 ? &x[threadIdx.x ^ 1]
                                          : &mine[threadIdx.x & 1];
  out[threadIdx.x] = *p;
  float* q = threadIdx.x % 2 ? &s[0] : &out[64];
  __syncthreads();
  atomicAdd(q, 1.0f);
  __syncthreads();
  if (threadIdx.x == 0) out[65] = s[0];
  atomicAdd(halves, __floats2half2_rn(1.0f, 0.5f));
  atomicCAS(wide, threadIdx.x, threadIdx.x + 1ull);
  int both = __syncthreads_and(x[threadIdx.x] >= 0), either = __syncthreads_or(x[threadIdx.x] > 62);
  if (threadIdx.x == 0) votes[0] = both, votes[1] = either, votes[2] = __isShared(p), votes[3] = __isGlobal(out);
}

extern "C" __global__ void reversed_without_the_rest(float* out, const float* x, int n) {
  __shared__ float s[64];
  if (threadIdx.x >= n) return;
  s[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = s[n - 1 - threadIdx.x];
}
