// Moving data: asynchronous copies into shared memory, rows of any alignment, and vector stores.

#pragma once

#include <cstdint>

namespace bda_fused {

// UNIT bytes, 16 or 4, from global to shared memory, past the registers; bytes from ``valid`` on are zeros and are not
// read.
template <int UNIT, int OFFSET = 0>
__device__ inline void copy_async(unsigned to, const void* from, int valid) {
  if constexpr (UNIT == 16) {
    asm volatile("cp.async.cg.shared.global [%0 + %3], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid), "n"(OFFSET)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0 + %3], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(valid), "n"(OFFSET)
                 : "memory");
  }
}

__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most PENDING groups of this thread are on their way.
template <int PENDING = 0>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

__device__ inline uint4 load_shared(unsigned from) {
  uint4 x;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(from)
               : "memory");
  return x;
}

__device__ inline void store_shared(unsigned to, uint4 x) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
               : "memory");
}

__device__ inline void store_shared(unsigned to, unsigned x) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(x) : "memory");
}

// A vector store that the compiler cannot split into four of a quarter the width, as it does under a predicate.
__device__ inline void store_global(void* to, uint4 x) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
               : "memory");
}

// Loads of what the kernel does not write. They stay where they are written: ahead of the arithmetic that hides them.
template <int OFFSET>
__device__ inline uint4 load_global(const void* from) {
  uint4 x;
  asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4 + %5];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(from), "n"(OFFSET));
  return x;
}

template <int OFFSET>
__device__ inline unsigned load_global_word(const void* from) {
  unsigned x;
  asm volatile("ld.global.nc.u32 %0, [%1 + %2];" : "=r"(x) : "l"(from), "n"(OFFSET));
  return x;
}

// 16 bytes, or whatever the registers hold where ``wanted`` is false: a predicate, not a branch.
__device__ inline uint4 load_global_if(bool wanted, const void* from) {
  uint4 x;
  asm volatile(
      "{\n"
      ".reg .pred wanted;\n"
      "setp.ne.u32 wanted, %5, 0;\n"
      "@wanted ld.global.v4.u32 {%0, %1, %2, %3}, [%4];\n"
      "}"
      : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
      : "l"(from), "r"(static_cast<unsigned>(wanted)));
  return x;
}

// 16 bytes of a row that starts at any address. Global memory gives whole aligned words, so of the eight lanes that
// cover 128 bytes of a row each loads the aligned word under its own bytes, the last also the word behind, and joins it
// with its neighbour's. Loading and joining are apart, so that arithmetic can hide the load.
struct ShiftedWord {
  uint4 word, behind;
};

// ``from``: this lane's 16 bytes, of which the row has the first ``valid``: any number, negative ones too. No word is
// loaded that has no byte of the row.
__device__ inline ShiftedWord load_shifted(const char* from, int valid) {
  const int shift = static_cast<int>(reinterpret_cast<std::uintptr_t>(from) & 15);
  const char* aligned = from - shift;
  return {load_global_if(valid > -shift, aligned),
          load_global_if(threadIdx.x % 8 == 7 && shift != 0 && valid > 16 - shift, aligned + 16)};
}

// __byte_perm, which stays where it is written: ahead of the loads that take its operands' registers.
template <int SELECTOR>
__device__ inline unsigned permuted(unsigned a, unsigned b) {
  unsigned x;
  asm volatile("prmt.b32 %0, %1, %2, %3;" : "=r"(x) : "r"(a), "r"(b), "n"(SELECTOR));
  return x;
}

// The 16 bytes from byte ``shift`` < 16 of ``word`` and ``behind`` on.
__device__ inline uint4 shifted(uint4 word, uint4 behind, unsigned shift) {
  unsigned words[8] = {word.x, word.y, word.z, word.w, behind.x, behind.y, behind.z, behind.w};
#pragma unroll
  for (int i = 0; i < 7; ++i) words[i] = shift & 4 ? words[i + 1] : words[i];
#pragma unroll
  for (int i = 0; i < 5; ++i) words[i] = shift & 8 ? words[i + 2] : words[i];
#pragma unroll
  for (int i = 0; i < 4; ++i) words[i] = __funnelshift_r(words[i], words[i + 1], 8 * (shift & 3));
  return {words[0], words[1], words[2], words[3]};
}

// The lane's 16 bytes. ``shift``: the address of its row, mod 16. All lanes of a warp call it.
__device__ inline uint4 join(const ShiftedWord& loaded, unsigned shift) {
  const bool last = threadIdx.x % 8 == 7;
  const auto next = [&](unsigned own, unsigned behind) {
    const unsigned x = __shfl_down_sync(0xffffffff, own, 1, 8);
    return last ? behind : x;
  };
  const uint4 own = loaded.word, behind = loaded.behind;
  return shifted(own, {next(own.x, behind.x), next(own.y, behind.y), next(own.z, behind.z), next(own.w, behind.w)},
                 shift);
}

// Ones in the first ``bytes`` bytes of a word: any number, negative ones too.
__device__ inline unsigned first_bytes(int bytes) { return bytes >= 4 ? ~0u : (1u << 8 * max(bytes, 0)) - 1; }

// The first ``valid`` bytes, and zeros.
__device__ inline uint4 cut(uint4 x, int valid) {
  return {x.x & first_bytes(valid), x.y & first_bytes(valid - 4), x.z & first_bytes(valid - 8),
          x.w & first_bytes(valid - 12)};
}

}  // namespace bda_fused
