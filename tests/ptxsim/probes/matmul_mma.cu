// C = A B in bf16 with float accumulation: cp.async into two stages, ldmatrix, mma.sync. 64 x 64 tiles, 4 warps of
// 32 x 32. M, N and K are multiples of 64, 64 and 32.
#include <cuda_bf16.h>
#include <cstdint>

constexpr int BM = 64, BN = 64, BK = 32, PAD = 8;

struct Stage {
  __nv_bfloat16 a[BM][BK + PAD];
  __nv_bfloat16 b[BK][BN + PAD];
};

__device__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

__device__ void copy16(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from));
}

__device__ void load_a(uint32_t (&f)[4], const void* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(f[0]), "=r"(f[1]), "=r"(f[2]), "=r"(f[3])
               : "r"(shared_address(p)));
}

__device__ void load_b(uint32_t (&f)[2], const void* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(f[0]), "=r"(f[1])
               : "r"(shared_address(p)));
}

__device__ void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

extern "C" __global__ void __launch_bounds__(128)
    matmul_mma(float* C, const __nv_bfloat16* A, const __nv_bfloat16* B, int M, int N, int K) {
  extern __shared__ __align__(16) unsigned char memory[];
  Stage* stages = reinterpret_cast<Stage*>(memory);
  int t = threadIdx.x, lane = t % 32, warp = t / 32;
  int row0 = blockIdx.y * BM, col0 = blockIdx.x * BN, wm = warp / 2 * 32, wn = warp % 2 * 32;

  auto fetch = [&](int k0, Stage& s) {
    for (int i = t; i < BM * BK / 8; i += 128) {
      int r = i / (BK / 8), c = i % (BK / 8) * 8;
      copy16(&s.a[r][c], A + size_t(row0 + r) * K + k0 + c);
    }
    for (int i = t; i < BK * BN / 8; i += 128) {
      int r = i / (BN / 8), c = i % (BN / 8) * 8;
      copy16(&s.b[r][c], B + size_t(k0 + r) * N + col0 + c);
    }
    asm volatile("cp.async.commit_group;");
  };

  float acc[2][4][4] = {};
  fetch(0, stages[0]);
  for (int k0 = 0; k0 < K; k0 += BK) {
    Stage& now = stages[k0 / BK % 2];
    if (k0 + BK < K) {
      fetch(k0 + BK, stages[(k0 / BK + 1) % 2]);
      asm volatile("cp.async.wait_group 1;");
    } else {
      asm volatile("cp.async.wait_group 0;");
    }
    __syncthreads();
    for (int k = 0; k < BK; k += 16) {
      uint32_t a[2][4], b[4][2];
      for (int i = 0; i < 2; ++i) load_a(a[i], &now.a[wm + 16 * i + lane % 16][k + lane / 16 * 8]);
      for (int j = 0; j < 4; ++j) load_b(b[j], &now.b[k + lane % 16][wn + 8 * j]);
      for (int i = 0; i < 2; ++i)
        for (int j = 0; j < 4; ++j) multiply(acc[i][j], a[i], b[j]);
    }
    __syncthreads();
  }
  for (int i = 0; i < 2; ++i)
    for (int j = 0; j < 4; ++j)
      for (int h = 0; h < 2; ++h) {
        int r = row0 + wm + 16 * i + lane / 4 + 8 * h, c = col0 + wn + 8 * j + lane % 4 * 2;
        *reinterpret_cast<float2*>(&C[size_t(r) * N + c]) = {acc[i][j][2 * h], acc[i][j][2 * h + 1]};
      }
}
