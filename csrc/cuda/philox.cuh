// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). bda_fused/dropout.py says
// which counter an entry of the attention map has.

#pragma once

#include <cstdint>

namespace bda_fused {

__device__ inline uint4 philox(std::uint64_t seed, uint4 counter) {
  std::uint32_t key0 = static_cast<std::uint32_t>(seed), key1 = static_cast<std::uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t product0 = std::uint64_t{0xD2511F53} * counter.x;
    const std::uint64_t product1 = std::uint64_t{0xCD9E8D57} * counter.z;
    counter = {static_cast<std::uint32_t>(product1 >> 32) ^ counter.y ^ key0, static_cast<std::uint32_t>(product1),
               static_cast<std::uint32_t>(product0 >> 32) ^ counter.w ^ key1, static_cast<std::uint32_t>(product0)};
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
  return counter;
}

// The words of a fragment's four entries: columns ``column`` and column + 1 of rows ``row`` and row + 8, for the lane
// that holds them. Two neighbouring lanes hold the four columns of one counter: each draws one row, and they swap.
struct FragmentWords {
  std::uint32_t x[4];
};

__device__ inline FragmentWords philox_fragment(std::uint64_t seed, std::int64_t row, std::int64_t row_below,
                                                unsigned column) {
  const bool odd = threadIdx.x & 1;
  const std::int64_t drawn = odd ? row_below : row;
  const uint4 words = philox(seed, {column / 4, static_cast<std::uint32_t>(drawn),
                                    static_cast<std::uint32_t>(drawn >> 32), 0});
  const std::uint32_t got0 = __shfl_xor_sync(0xffffffff, odd ? words.x : words.z, 1);
  const std::uint32_t got1 = __shfl_xor_sync(0xffffffff, odd ? words.y : words.w, 1);
  if (odd) return {{got0, got1, words.z, words.w}};
  return {{words.x, words.y, got0, got1}};
}

}  // namespace bda_fused
