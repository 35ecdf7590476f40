// From dP to dS, in registers: dS = P * (dP - rowsum(P * dP)) with dP = (dY V^T + drow_sum) * M + dmap.
//
// A kept map is rounded, and its rows do not sum to 1: dS would take the difference for a part of dP, which in a peaked
// row is larger than dS itself. So P is what was kept, divided by its sum.

#pragma once

#include "map.cuh"
#include "philox.cuh"
#include "reduce.cuh"
#include "softmax.cuh"

namespace bda_fused {

// This lane's two neighbouring entries of the map in shared memory.
template <class Element, class Tile>
__device__ typename Pair<typename Element::Storage>::Type* map_pair(const SharedMemory<Element, Tile>& shared,
                                                                    int row_tile, int half, int block) {
  using T = typename Element::Storage;
  auto* row = reinterpret_cast<T*>(shared.map + Tile::row(row_tile, half) * shared.kMapPitch);
  return reinterpret_cast<typename Pair<T>::Type*>(row + Tile::column(block));
}

// scores = dY V^T -> scale * dS, rounded to the map in shared memory; dS, its column sums, and P * M to where they are
// wanted. Returns whether the value product follows.
template <class Element, class Tile>
__device__ bool softmax_gradient(float (&scores)[Tile::kRowTiles][Tile::kKeyBlocks][4], const RowArguments& args,
                                 const SharedMemory<Element, Tile>& shared, const Place& place) {
  using T = typename Element::Storage;
  constexpr int kRowTiles = Tile::kRowTiles, kKeyBlocks = Tile::kKeyBlocks;
  const int columns = round_up(args.keys, Size<Element>::kStep);
  load_map<Element>(args.weights, args, shared, place);

  if (args.row_sum_grad != nullptr) {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float gradient = args.row_sum_grad[shared.offsets[Tile::row(i, half)].flat];
#pragma unroll
        for (int j = 0; j < kKeyBlocks; ++j) {
          scores[i][j][2 * half] += gradient;
          scores[i][j][2 * half + 1] += gradient;
        }
      }
    }
  }
  if (args.seed != nullptr) {
    const std::uint64_t seed = *args.seed;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      forget_loads();
      const std::int64_t row = shared.offsets[Tile::row(i, 0)].flat;
      const std::int64_t row_below = shared.offsets[Tile::row(i, 1)].flat;
#pragma unroll
      for (int j = 0; j < kKeyBlocks; ++j) {
        const Keep<Tile> keep(args, seed, row, row_below, Tile::column(j));
#pragma unroll
        for (int e = 0; e < 4; ++e) scores[i][j][e] = keep.x[e] ? scores[i][j][e] * args.keep_scale : 0.f;
      }
    }
  }
  if (args.weights_grad.data != nullptr) {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        forget_loads();
        const Position at = shared.positions[Tile::row(i, half)];
        const T* gradient = static_cast<const T*>(args.weights_grad.data) + offset(args.weights_grad, at);
#pragma unroll
        for (int j = 0; j < kKeyBlocks; ++j) {
          if (is_owner(args.weights, at) && Tile::column(j) < args.keys) {
            const float2 x = load_pair(gradient + args.first_key, Tile::column(j), args.keys);
            scores[i][j][2 * half] += x.x;
            scores[i][j][2 * half + 1] += x.y;
          }
        }
      }
    }
  }

  float total[kRowTiles][2];
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      total[i][half] = 0.f;
#pragma unroll
      for (int j = 0; j < kKeyBlocks; ++j) {
        if (Tile::column(j) < columns) {
          const float2 p = widen(*map_pair(shared, i, half, j));
          total[i][half] += p.x + p.y;
        }
      }
    }
  }
  if (args.step != kResults) reduce_rows<Tile>(total, shared.scratch[1], Sum());

  float delta[kRowTiles][2];
  const std::int64_t all_rows = std::int64_t{args.batches} * args.heads * args.queries;
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      delta[i][half] = 0.f;
#pragma unroll
      for (int j = 0; j < kKeyBlocks; ++j) {
        if (Tile::column(j) < columns) {
          const float2 p = widen(*map_pair(shared, i, half, j));
          delta[i][half] += p.x * scores[i][j][2 * half] + p.y * scores[i][j][2 * half + 1];
        }
      }
    }
  }
  if (args.step == kResults) {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float* statistics = args.statistics + shared.offsets[Tile::row(i, half)].flat;
        delta[i][half] = total[i][half] = 0.f;
        for (int group = 0; group < args.groups; ++group) {
          delta[i][half] += statistics[group * all_rows];
          total[i][half] += statistics[(args.groups + group) * all_rows];
        }
      }
    }
  } else {
    reduce_rows<Tile>(delta, shared.scratch[0], Sum());
  }
  if (args.step == kStatistics) {
    store_statistics<Tile>(delta, args, shared.offsets, place, 0);
    store_statistics<Tile>(total, args, shared.offsets, place, args.groups);
    return false;
  }
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float factor = total[i][half] == 0.f ? 0.f : 1.f / total[i][half];  // 0: all keys are masked
      const float mean = factor * delta[i][half];
#pragma unroll
      for (int j = 0; j < kKeyBlocks; ++j) {
        if (Tile::column(j) < columns) {
          const float2 p = widen(*map_pair(shared, i, half, j));
          scores[i][j][2 * half] = factor * p.x * (scores[i][j][2 * half] - mean);
          scores[i][j][2 * half + 1] = factor * p.y * (scores[i][j][2 * half + 1] - mean);
        }
      }
    }
  }

  if (args.bias_grad != nullptr) {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = Tile::row(i, half);
        float* gradient = args.bias_grad + shared.offsets[row].flat * args.total_keys + args.first_key;
#pragma unroll
        for (int j = 0; j < kKeyBlocks; ++j) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            if (row < place.rows && Tile::column(j) + e < args.keys) {
              gradient[Tile::column(j) + e] = scores[i][j][2 * half + e];
            }
          }
        }
      }
    }
  }
  if (args.bias_grad_sums != nullptr) store_column_sums<Tile>(scores, args);
  if (args.dropped != nullptr) {
    const std::uint64_t seed = *args.seed;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      forget_loads();
      const std::int64_t row = shared.offsets[Tile::row(i, 0)].flat;
      const std::int64_t row_below = shared.offsets[Tile::row(i, 1)].flat;
#pragma unroll
      for (int j = 0; j < kKeyBlocks; ++j) {
        const Keep<Tile> keep(args, seed, row, row_below, Tile::column(j));
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (Tile::column(j) < columns) {
            auto* pair = map_pair(shared, i, half, j);
            const float2 p = widen(*pair);
            *pair = Pair<T>::round(keep.x[2 * half] ? p.x * args.keep_scale : 0.f,
                                   keep.x[2 * half + 1] ? p.y * args.keep_scale : 0.f);
          }
        }
      }
    }
    store_map<Element>(padded_map(args, args.dropped), args, shared, place);
  }
  write_map<Element>(scores, args, shared, args.scale);
  if (args.scores_grad != nullptr) store_map<Element>(padded_map(args, args.scores_grad), args, shared, place);
  return true;
}

}  // namespace bda_fused
