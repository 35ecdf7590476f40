// Kernels with one fault each, for one block of 64 threads unless said otherwise.
#include <cassert>
#include <cstdint>

__device__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

__device__ void copy16(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}

extern "C" __global__ void off_by_one(float* out, const float* x) { out[threadIdx.x] = x[threadIdx.x + 1]; }

extern "C" __global__ void before_the_start(float* out, const float* x) { out[threadIdx.x] = x[int(threadIdx.x) - 1]; }

extern "C" __global__ void store_past_the_end(float* out, const float* x) { out[2 * threadIdx.x] = x[threadIdx.x]; }

extern "C" __global__ void misaligned(float* out, const float* x) {
  float4 v = *reinterpret_cast<const float4*>(x + 1);
  out[threadIdx.x] = v.x + v.w;
}

extern "C" __global__ void shared_overrun(float* out, const float* x) {
  extern __shared__ float s[];
  s[threadIdx.x + 1] = x[threadIdx.x];
  out[threadIdx.x] = s[threadIdx.x + 1];
}

extern "C" __global__ void local_overrun(float* out, const float* x, int n) {
  float last[4] = {};
  for (int k = 0; k < n; ++k) last[k] = x[k];
  out[threadIdx.x] = last[threadIdx.x % 4];
}

extern "C" __global__ void missing_syncthreads(float* out, const float* x) {
  __shared__ float s[64];
  s[threadIdx.x] = 0;
  __syncthreads();
  s[threadIdx.x] = x[threadIdx.x];
  out[threadIdx.x] = s[63 - threadIdx.x];
}

extern "C" __global__ void missing_syncthreads_before_reuse(float* out, const float* x) {
  __shared__ float s[64];
  s[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = s[63 - threadIdx.x];
  s[threadIdx.x] = 2 * x[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] += s[63 - threadIdx.x];
}

extern "C" __global__ void writes_after_arriving(float* out, const float* x) {
  __shared__ float s[32];
  if (threadIdx.x < 32) {
    asm volatile("bar.arrive 1, 64;" ::: "memory");
    s[threadIdx.x] = x[threadIdx.x];
  } else {
    asm volatile("bar.sync 1, 64;" ::: "memory");
    out[threadIdx.x] = s[threadIdx.x - 32];
  }
}

extern "C" __global__ void barrier_with_and_without_a_count(float* out, const float* x) {
  __shared__ float s[64];
  s[threadIdx.x] = x[threadIdx.x];
  if (threadIdx.x < 32) asm volatile("bar.sync 0;" ::: "memory");
  else asm volatile("bar.sync 0, 64;" ::: "memory");
  out[threadIdx.x] = s[63 - threadIdx.x];
}

extern "C" __global__ void two_writers(float* out, const float* x) {
  __shared__ float s[1];
  s[0] = x[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = s[0];
}

extern "C" __global__ void reads_a_counter(float* out, const float* x, int last) {
  __shared__ int n;
  if (threadIdx.x == 0) n = 0;
  __syncthreads();
  if (threadIdx.x % 32 == 0) atomicAdd(&n, 1);
  if (last) asm volatile("bar.sync 1, 64;" ::: "memory");
  if (threadIdx.x == 32) out[0] = n;
}

// Warps 0 and 1 count; warp 2 meets warp 1 alone, and reads.
extern "C" __global__ void reads_after_one_of_two(float* out, const float* x) {
  __shared__ int n;
  if (threadIdx.x == 0) n = 0;
  __syncthreads();
  if (threadIdx.x % 32 == 0 && threadIdx.x < 64) atomicAdd(&n, 1);
  if (threadIdx.x >= 32) asm volatile("bar.sync 1, 64;" ::: "memory");
  if (threadIdx.x == 64) out[0] = n;
}

extern "C" __global__ void handshake(float* out, const float* x) {
  __shared__ volatile int ready, taken;
  if (threadIdx.x == 0) ready = 0;
  if (threadIdx.x == 32) taken = 0;
  __syncthreads();
  if (threadIdx.x == 32) ready = 1;
  if (threadIdx.x == 0) {
    while (ready == 0) {
    }
    taken = 1;
  }
}

extern "C" __global__ void weak_handshake(float* out, const float* x) {
  __shared__ int ready;
  if (threadIdx.x == 0) ready = 0;
  __syncthreads();
  if (threadIdx.x == 32) ready = 1;
  if (threadIdx.x == 0) out[0] = *(volatile int*)&ready;
}

extern "C" __global__ void missing_syncwarp(float* out, const float* x) {
  __shared__ float s[64];
  s[threadIdx.x] = x[threadIdx.x];
  out[threadIdx.x] = s[threadIdx.x ^ 1];
}

extern "C" __global__ void missing_wait(float* out, const float* x) {
  __shared__ float4 s[16];
  if (threadIdx.x < 16) copy16(&s[threadIdx.x], x + 4 * threadIdx.x);
  asm volatile("cp.async.commit_group;" ::: "memory");
  __syncthreads();
  out[threadIdx.x] = reinterpret_cast<float*>(s)[threadIdx.x];
}

extern "C" __global__ void wait_for_one_group_too_few(float* out, const float* x) {
  __shared__ float4 s[16];
  if (threadIdx.x < 16) copy16(&s[threadIdx.x], x + 4 * threadIdx.x);
  asm volatile("cp.async.commit_group;" ::: "memory");
  asm volatile("cp.async.wait_group 1;" ::: "memory");
  __syncthreads();
  out[threadIdx.x] = reinterpret_cast<float*>(s)[threadIdx.x];
}

extern "C" __global__ void wait_without_barrier(float* out, const float* x) {
  __shared__ float4 s[16];
  if (threadIdx.x < 16) copy16(&s[threadIdx.x], x + 4 * threadIdx.x);
  asm volatile("cp.async.wait_all;" ::: "memory");
  out[threadIdx.x] = reinterpret_cast<float*>(s)[threadIdx.x];
}

extern "C" __global__ void unwritten_shared(float* out, const float* x) {
  __shared__ float s[64];
  if (threadIdx.x != 7) s[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = s[threadIdx.x];
}

extern "C" __global__ void divergent_barrier(float* out, const float* x) {
  __shared__ float s[64];
  s[threadIdx.x] = x[threadIdx.x];
  if (threadIdx.x % 32 != 3) __syncthreads();
  out[threadIdx.x] = s[threadIdx.x];
}

extern "C" __global__ void divergent_shuffle(float* out, const float* x) {
  float v = x[threadIdx.x];
  if (threadIdx.x % 2) v = __shfl_xor_sync(~0u, v, 2);
  out[threadIdx.x] = v;
}

extern "C" __global__ void ldmatrix(uint32_t* out, const uint32_t* x, int shift) {
  __shared__ uint32_t s[36];
  if (threadIdx.x < 36) s[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  uint32_t f;
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
               : "=r"(f)
               : "r"(shared_address(s) + threadIdx.x % 8 * 16 + shift));
  out[threadIdx.x] = f;
}

extern "C" __global__ void two_blocks_one_address(float* out, const float* x) {
  out[threadIdx.x] = x[threadIdx.x + 64 * blockIdx.x];
}

extern "C" __global__ void reads_another_block(float* out, float* x) {
  if (blockIdx.x == 0) x[threadIdx.x] = 1;
  else out[threadIdx.x] = x[threadIdx.x];
}

extern "C" __global__ void reads_what_others_add(float* out, const float* x) {
  if (blockIdx.x == 0) atomicAdd(out, x[0]);
  else out[1] = out[0];
}

extern "C" __global__ void stores_what_others_add(float* out, const float* x) {
  if (blockIdx.x == 0) atomicAdd(out, x[0]);
  else out[0] = x[1];
}

extern "C" __global__ void all_add(float* out, const float* x) {
  atomicAdd(out, x[0]);
  if (*(volatile float*)out < 0) *(volatile float*)out = 0;
}

extern "C" __global__ void reads_its_output(float* out, const float* x) { out[threadIdx.x] += x[threadIdx.x]; }

extern "C" __global__ void barrier_for_too_many(float* out, const float* x) {
  asm volatile("bar.sync 1, 96;" ::: "memory");
  out[threadIdx.x] = x[threadIdx.x];
}

extern "C" __global__ void endless(float* out, const volatile float* x) {
  while (x[0] == x[0]) {
  }
  out[0] = 1;
}

extern "C" __global__ void failing_assert(float* out, const float* x) {
  assert(x[threadIdx.x] != x[threadIdx.x]);
  out[threadIdx.x] = x[threadIdx.x];
}

extern "C" __global__ void trapping(float* out, const float* x) {
  if (threadIdx.x == 9) __trap();
  out[threadIdx.x] = x[threadIdx.x];
}
