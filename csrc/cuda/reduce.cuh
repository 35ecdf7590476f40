// Sums and maxima over the rows and columns of score fragments, in a fixed order.

#pragma once

#include "map.cuh"

namespace bda_fused {

struct Sum {
  __device__ float operator()(float a, float b) const { return a + b; }
};

struct Maximum {
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

// The number of the lane whose index differs in the bits of ``mask``.
__device__ inline float exchanged(float x, int mask) {
  float y;
  asm volatile("shfl.sync.bfly.b32 %0, %1, %2, 31, 0xffffffff;" : "=f"(y) : "f"(x), "r"(mask));
  return y;
}

// x[i][half]: this lane's share of row Tile::row(i, half). All threads get the whole row's, which one thread combines.
// ``scratch``: (kRows, kWarps), which no thread may touch for another purpose until the next barrier, and no thread has
// since the last.
template <class Tile, class Combine>
__device__ void reduce_rows(float (&x)[Tile::kRowTiles][2], float* scratch, Combine combine) {
#pragma unroll
  for (int i = 0; i < Tile::kRowTiles; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      x[i][half] = combine(x[i][half], exchanged(x[i][half], 1));
      x[i][half] = combine(x[i][half], exchanged(x[i][half], 2));
    }
  }
  if (Tile::lane() % 4 == 0) {
#pragma unroll
    for (int i = 0; i < Tile::kRowTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) scratch[Tile::row(i, half) * kWarps + warp()] = x[i][half];
    }
  }
  __syncthreads();
  if (threadIdx.x < Tile::kRows) {
    auto* row = reinterpret_cast<float4*>(scratch + threadIdx.x * kWarps);
    const float4 a = row[0], b = row[1];
    row[0].x = combine(combine(combine(a.x, a.y), combine(a.z, a.w)), combine(combine(b.x, b.y), combine(b.z, b.w)));
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < Tile::kRowTiles; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) x[i][half] = scratch[Tile::row(i, half) * kWarps];
  }
}

// One number for each row of the tile, for this launch's group of keys, to (groups, B, H, L) behind ``first`` of them.
template <class Tile>
__device__ void store_statistics(const float (&x)[Tile::kRowTiles][2], const RowArguments& args,
                                 const RowOffsets* offsets, const Place& place, int first) {
  if (warp() != 0 || Tile::lane() % 4 != 0) return;
  const std::int64_t all_rows = std::int64_t{args.batches} * args.heads * args.queries;
#pragma unroll
  for (int i = 0; i < Tile::kRowTiles; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = Tile::row(i, half);
      if (row < place.rows) args.statistics[(first + args.group) * all_rows + offsets[row].flat] = x[i][half];
    }
  }
}

// The columns of x, summed over the rows of the tile, to row blockIdx.x of (blocks, S).
template <class Tile>
__device__ void store_column_sums(const float (&x)[Tile::kRowTiles][Tile::kKeyBlocks][4], const RowArguments& args) {
  float* sums = args.bias_grad_sums + std::int64_t{blockIdx.x} * args.total_keys + args.first_key;
#pragma unroll
  for (int j = 0; j < Tile::kKeyBlocks; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float sum = 0.f;
#pragma unroll
      for (int i = 0; i < Tile::kRowTiles; ++i) sum += x[i][j][e] + x[i][j][2 + e];
#pragma unroll
      for (int distance = 4; distance < 32; distance *= 2) sum += exchanged(sum, distance);
      if (Tile::lane() < 4 && Tile::column(j) + e < args.keys) sums[Tile::column(j) + e] = sum;
    }
  }
}

}  // namespace bda_fused
