// Loops whose bounds or indices are numbers that the compiler knows.

#pragma once

namespace bda_fused {

template <int N>
struct Number {
  __host__ __device__ constexpr operator int() const { return N; }
};

// body(0), ..., body(N - 1): offsets that follow from the number go into the instructions' addresses.
template <int N, class Body>
__device__ void unrolled(const Body& body) {
  if constexpr (N > 0) {
    unrolled<N - 1>(body);
    body(Number<N - 1>());
  }
}

// body(min(count, MOST)): code of its own for every count.
template <int MOST, class Body>
__device__ void with_count(int count, const Body& body) {
  if constexpr (MOST == 0) {
    body(Number<0>());
  } else if (count >= MOST) {
    body(Number<MOST>());
  } else {
    with_count<MOST - 1>(count, body);
  }
}

}  // namespace bda_fused
