// Two neighbouring elements as float32, and rows of them between shared memory and global memory of any alignment.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "arguments.h"

namespace bda_fused {

__device__ inline float2 widen(float2 x) { return x; }
// A bfloat16 is the upper half of a float32.
__device__ inline float2 widen(__nv_bfloat162 x) {
  const unsigned word = *reinterpret_cast<const unsigned*>(&x);
  float2 wide;
  asm("shl.b32 %0, %1, 16;" : "=f"(wide.x) : "r"(word));
  asm("and.b32 %0, %1, 0xffff0000;" : "=f"(wide.y) : "r"(word));
  return wide;
}
__device__ inline float2 widen(__half2 x) { return __half22float2(x); }
__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }

// Two elements as one word, rounded from float32.
template <class T>
struct Pair;
template <>
struct Pair<float> {
  using Type = float2;
  static constexpr Kind kKind = kFloat32;
  __device__ static Type round(float a, float b) { return {a, b}; }
  __device__ static float round(float a) { return a; }
};
template <>
struct Pair<__nv_bfloat16> {
  using Type = __nv_bfloat162;
  static constexpr Kind kKind = kBfloat16;
  __device__ static Type round(float a, float b) { return __floats2bfloat162_rn(a, b); }
  __device__ static __nv_bfloat16 round(float a) { return __float2bfloat16_rn(a); }
};
template <>
struct Pair<__half> {
  using Type = __half2;
  static constexpr Kind kKind = kFloat16;
  __device__ static Type round(float a, float b) { return __floats2half2_rn(a, b); }
  __device__ static __half round(float a) { return __float2half_rn(a); }
};

template <class T>
__device__ bool is_pair_aligned(const T* pointer) {
  return reinterpret_cast<std::uintptr_t>(pointer) % (2 * sizeof(T)) == 0;
}

// from[index] and from[index + 1], of which those below ``size`` exist; 0 for the others.
template <class T>
__device__ float2 load_pair(const T* from, int index, int size) {
  if (index + 1 < size && is_pair_aligned(from + index)) {
    return widen(*reinterpret_cast<const typename Pair<T>::Type*>(from + index));
  }
  return {index < size ? widen(from[index]) : 0.f, index + 1 < size ? widen(from[index + 1]) : 0.f};
}

// An element of a kind that is known at run time; nothing is 0.
__device__ inline float load_element(const void* from, Kind kind, std::int64_t index) {
  switch (kind) {
    case kFloat32: return static_cast<const float*>(from)[index];
    case kBfloat16: return widen(static_cast<const __nv_bfloat16*>(from)[index]);
    case kFloat16: return widen(static_cast<const __half*>(from)[index]);
    default: return 0.f;
  }
}

// A warp copies ``size`` elements from shared memory, where they are aligned, to global memory, where they may not be.
__device__ inline void store_row(float* to, const char* from, int size) {
  for (int i = threadIdx.x % 32; i < size; i += 32) to[i] = reinterpret_cast<const float*>(from)[i];
}

template <class T>
__device__ void store_row(T* to, const char* from, int size) {
  static_assert(sizeof(T) == 2, "words hold two elements");
  const auto* words = reinterpret_cast<const unsigned*>(from);
  auto* halves = reinterpret_cast<unsigned short*>(to);
  const int odd = is_pair_aligned(to) ? 0 : 1;
  for (int word = threadIdx.x % 32; 2 * word - odd < size; word += 32) {
    const int index = 2 * word - odd;
    const unsigned own = 2 * word < size ? words[word] : 0;
    const unsigned before = odd && word > 0 ? words[word - 1] : 0;
    const unsigned x = odd ? __funnelshift_r(before, own, 16) : own;
    if (index >= 0 && index + 1 < size) {
      *reinterpret_cast<unsigned*>(halves + index) = x;
    } else if (index < 0) {
      halves[0] = static_cast<unsigned short>(x >> 16);
    } else {
      halves[index] = static_cast<unsigned short>(x);
    }
  }
}

}  // namespace bda_fused
