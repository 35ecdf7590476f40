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

// x[i][half]: this lane's share of row Tile::row(i, half). All threads get the whole row's. ``scratch``: (kRows,
// kWarpColumns), which no thread may read for another purpose until the next barrier.
template <class Tile, class Combine>
__device__ void reduce_rows(float (&x)[Tile::kRowTiles][2], float* scratch, Combine combine) {
  constexpr int kColumns = Tile::kWarpColumns;
#pragma unroll
  for (int i = 0; i < Tile::kRowTiles; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      x[i][half] = combine(x[i][half], __shfl_xor_sync(0xffffffff, x[i][half], 1));
      x[i][half] = combine(x[i][half], __shfl_xor_sync(0xffffffff, x[i][half], 2));
      if (Tile::lane() % 4 == 0) scratch[Tile::row(i, half) * kColumns + Tile::warp_column()] = x[i][half];
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < Tile::kRowTiles; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const auto* row = reinterpret_cast<const float4*>(scratch + Tile::row(i, half) * kColumns);
      float4 part = row[0];
      x[i][half] = combine(combine(part.x, part.y), combine(part.z, part.w));
      if constexpr (kColumns == 8) {
        part = row[1];
        x[i][half] = combine(x[i][half], combine(combine(part.x, part.y), combine(part.z, part.w)));
      }
    }
  }
}

// One number for each row of the tile, for this launch's group of keys, to (groups, B, H, L) behind ``first`` of them.
template <class Tile>
__device__ void store_statistics(const float (&x)[Tile::kRowTiles][2], const RowArguments& args,
                                 const SharedMemory<Tile>& shared, const Place& place, int first) {
  if (Tile::warp_column() != 0 || Tile::lane() % 4 != 0) return;
  const std::int64_t all_rows = std::int64_t{args.batches} * args.heads * args.queries;
#pragma unroll
  for (int i = 0; i < Tile::kRowTiles; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = Tile::row(i, half);
      if (row < place.rows) args.statistics[(first + args.group) * all_rows + shared.offsets[row].flat] = x[i][half];
    }
  }
}

// The columns of x, summed over the rows of the tile, to row blockIdx.x of (blocks, S).
template <class Tile>
__device__ void store_column_sums(const float (&x)[Tile::kRowTiles][Tile::kKeyBlocks][4], const RowArguments& args,
                                  const SharedMemory<Tile>& shared) {
  float* sums = args.bias_grad_sums + std::int64_t{blockIdx.x} * args.total_keys + args.first_key;
#pragma unroll
  for (int j = 0; j < Tile::kKeyBlocks; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float sum = 0.f;
#pragma unroll
      for (int i = 0; i < Tile::kRowTiles; ++i) sum += x[i][j][e] + x[i][j][2 + e];
#pragma unroll
      for (int distance = 4; distance < 32; distance *= 2) sum += __shfl_xor_sync(0xffffffff, sum, distance);
      if (Tile::lane() < 4) shared.column_sums[Tile::warp_row() * Tile::kKeys + Tile::column(j) + e] = sum;
    }
  }
  __syncthreads();
  for (int key = threadIdx.x; key < args.keys; key += kThreads) {
    float sum = 0.f;
#pragma unroll
    for (int warp_row = 0; warp_row < Tile::kWarpRows; ++warp_row) {
      sum += shared.column_sums[warp_row * Tile::kKeys + key];
    }
    sums[key] = sum;
  }
}

}  // namespace bda_fused
