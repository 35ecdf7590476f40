// Matrix fragments and tensor-core instructions, for operands of 2 and of 4 bytes.
//
// An instruction multiplies 16 rows by 8 columns over 32 bytes of depth: 16 elements of 2 bytes, or 8 of 4. In bytes
// both kinds of operands lie alike, so one ldmatrix serves both. A kernel takes two such steps at a time, 64 bytes.
// Lane 4 g + t holds rows g and g + 8, and columns 2 t and 2 t + 1, of a 16 x 8 result.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace bda_fused {

template <int OFFSET = 0>
__device__ inline void load_matrices(unsigned (&x)[4], unsigned address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4 + %5];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(address), "n"(OFFSET)
               : "memory");
}

__device__ inline void load_transposed_matrices(unsigned (&x)[4], unsigned address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(address)
               : "memory");
}

__device__ inline unsigned load_word(unsigned address) {
  unsigned x;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(address) : "memory");
  return x;
}

#define BDA_FUSED_MMA(SHAPE)                                                                            \
  asm volatile("mma.sync.aligned." SHAPE " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                            \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

// The first half of the depth.
#define BDA_FUSED_HALF_MMA(SHAPE)                                                                   \
  asm volatile("mma.sync.aligned." SHAPE " {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"      \
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                     \
               : "r"(a[0]), "r"(a[1]), "r"(b[0]))

// An element type: how it is stored, how fragments of it are prepared, and their product C += A B in float32.
struct Bfloat16 {
  using Storage = __nv_bfloat16;
  template <int N>
  struct Fragment {
    unsigned x[N];
  };
  template <int N>
  __device__ static Fragment<N> prepare(const unsigned* x) {
    Fragment<N> fragment;
#pragma unroll
    for (int i = 0; i < N; ++i) fragment.x[i] = x[i];
    return fragment;
  }
  __device__ static void multiply(float (&c)[4], const Fragment<4>& left, const Fragment<2>& right) {
    const auto& a = left.x;
    const auto& b = right.x;
    BDA_FUSED_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
  }
  __device__ static void multiply_half(float (&c)[4], const Fragment<4>& left, const Fragment<2>& right) {
    const auto& a = left.x;
    const auto& b = right.x;
    BDA_FUSED_HALF_MMA("m16n8k8.row.col.f32.bf16.bf16.f32");
  }
};

struct Float16 : Bfloat16 {
  using Storage = __half;
  __device__ static void multiply(float (&c)[4], const Fragment<4>& left, const Fragment<2>& right) {
    const auto& a = left.x;
    const auto& b = right.x;
    BDA_FUSED_MMA("m16n8k16.row.col.f32.f16.f16.f32");
  }
  __device__ static void multiply_half(float (&c)[4], const Fragment<4>& left, const Fragment<2>& right) {
    const auto& a = left.x;
    const auto& b = right.x;
    BDA_FUSED_HALF_MMA("m16n8k8.row.col.f32.f16.f16.f32");
  }
};

__device__ inline unsigned round_to_tf32(float x) {
  unsigned rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(x));
  return rounded;
}

__device__ inline void multiply_tf32(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  BDA_FUSED_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
}

#undef BDA_FUSED_MMA
#undef BDA_FUSED_HALF_MMA

// float32 rounded to TensorFloat-32, 10 bits after the point: torch's precision "high".
struct Tf32 {
  using Storage = float;
  template <int N>
  struct Fragment {
    unsigned x[N];
  };
  template <int N>
  __device__ static Fragment<N> prepare(const unsigned* x) {
    Fragment<N> fragment;
#pragma unroll
    for (int i = 0; i < N; ++i) fragment.x[i] = round_to_tf32(__uint_as_float(x[i]));
    return fragment;
  }
  __device__ static void multiply(float (&c)[4], const Fragment<4>& left, const Fragment<2>& right) {
    multiply_tf32(c, left.x, right.x);
  }
};

// float32 as a sum of two TF32 numbers, of whose four products the three largest are taken: torch's "highest". Tensor
// cores truncate what they add to, so a step is summed from 0 and added outside (Ootomo and Yokota, "Recovering single
// precision accuracy from Tensor Cores while surpassing the FP32 theoretical peak performance", IJHPCA 36(4), 2022).
struct Tf32x3 {
  using Storage = float;
  template <int N>
  struct Fragment {
    unsigned high[N], low[N];
  };
  template <int N>
  __device__ static Fragment<N> prepare(const unsigned* x) {
    Fragment<N> fragment;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float whole = __uint_as_float(x[i]);
      fragment.high[i] = round_to_tf32(whole);
      fragment.low[i] = round_to_tf32(whole - __uint_as_float(fragment.high[i]));
    }
    return fragment;
  }
  __device__ static void multiply(float (&c)[4], const Fragment<4>& left, const Fragment<2>& right) {
    float step[4] = {};
    multiply_tf32(step, left.low, right.high);
    multiply_tf32(step, left.high, right.low);
    multiply_tf32(step, left.high, right.high);
#pragma unroll
    for (int i = 0; i < 4; ++i) c[i] += step[i];
  }
};

}  // namespace bda_fused
