// From scores to the map, in registers: softmax(scale * scores + bias), exact, with dropout.

#pragma once

#include "map.cuh"
#include "philox.cuh"
#include "reduce.cuh"

namespace bda_fused {

constexpr float kLog2e = 1.4426950408889634f;

// exp2f without the code for denormal results, which round to zero here.
__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// A bias in units of log 2. Towards zero: the largest finite numbers, with which some mask keys, stay finite.
__device__ inline float in_log2(float bias) { return __fmul_rz(bias, kLog2e); }

// Whether the bias of a key is the same for all rows of a group.
__device__ inline bool rows_share_bias(const RowArguments& args) {
  return args.bias.row == 0 && (args.inner_batches == 1 || args.bias.batch == 0) &&
         (args.inner_heads == 1 || args.bias.head == 0);
}

// What is added to every row's scores, in units of log 2: -inf behind the last key.
template <class Element, class Tile>
__device__ void load_key_bias(const RowArguments& args, const SharedMemory<Element, Tile>& shared, const Position& at) {
  const bool given = args.bias.data != nullptr && rows_share_bias(args);
  const float* bias = static_cast<const float*>(args.bias.data) + (given ? offset(args.bias, at) : 0);
  for (int key = threadIdx.x; key < Tile::kKeys; key += kThreads) {
    shared.key_bias[key] = key >= args.keys ? -INFINITY : given ? in_log2(bias[key * args.bias_key]) : 0.f;
  }
}

// M * (1 - p): which entries of fragment (row_tile, block) dropout keeps.
template <class Tile>
struct Keep {
  bool x[4];

  __device__ Keep(const RowArguments& args, std::uint64_t seed, std::int64_t row, std::int64_t row_below, int column) {
    const FragmentWords words = philox_fragment(seed, row, row_below, args.first_key + column);
#pragma unroll
    for (int e = 0; e < 4; ++e) x[e] = words.x[e] >= args.threshold;
  }
};

// scores -> P * M (1 - p), rounded to the map in shared memory; P itself, its sums under dropout, or the statistics of
// a group of keys, to where they are wanted. Returns whether the value product follows.
template <class Element, class Tile>
__device__ bool softmax(float (&scores)[Tile::kRowTiles][Tile::kKeyBlocks][4], const RowArguments& args,
                        const SharedMemory<Element, Tile>& shared, const Place& place) {
  constexpr int kRowTiles = Tile::kRowTiles, kKeyBlocks = Tile::kKeyBlocks;
  const float scale = args.scale * kLog2e;
#pragma unroll
  for (int j = 0; j < kKeyBlocks; ++j) {
    const auto bias = *reinterpret_cast<const float2*>(shared.key_bias + Tile::column(j));
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) scores[i][j][e] = fmaf(scores[i][j][e], scale, e % 2 ? bias.y : bias.x);
    }
  }
  if (args.bias.data != nullptr && !rows_share_bias(args)) {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float* bias = static_cast<const float*>(args.bias.data) + shared.offsets[Tile::row(i, half)].bias;
        if (args.bias_key == 0) {
#pragma unroll
          for (int j = 0; j < kKeyBlocks; ++j) {
            scores[i][j][2 * half] += in_log2(*bias);
            scores[i][j][2 * half + 1] += in_log2(*bias);
          }
        } else {
#pragma unroll
          for (int j = 0; j < kKeyBlocks; ++j) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const int key = Tile::column(j) + e;
              if (key < args.keys) scores[i][j][2 * half + e] += in_log2(bias[key]);
            }
          }
        }
        forget_loads();
      }
    }
  }

  const std::int64_t all_rows = std::int64_t{args.batches} * args.heads * args.queries;
  float shift[kRowTiles][2], sum[kRowTiles][2];
  if (args.step == kResults) {  // every group's maximum and sum are known
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float* statistics = args.statistics + shared.offsets[Tile::row(i, half)].flat;
        float largest = -INFINITY, total = 0.f;
        for (int group = 0; group < args.groups; ++group) largest = fmaxf(largest, statistics[group * all_rows]);
        if (largest == -INFINITY) largest = 0.f;
        for (int group = 0; group < args.groups; ++group) {
          total += statistics[(args.groups + group) * all_rows] * exp2f(statistics[group * all_rows] - largest);
        }
        shift[i][half] = largest;
        sum[i][half] = total;
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        shift[i][half] = -INFINITY;
#pragma unroll
        for (int j = 0; j < kKeyBlocks; ++j) {
          shift[i][half] = fmaxf(shift[i][half], fmaxf(scores[i][j][2 * half], scores[i][j][2 * half + 1]));
        }
      }
    }
    reduce_rows<Tile>(shift, shared.scratch[0], Maximum());
  }
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (shift[i][half] == -INFINITY) shift[i][half] = 0.f;  // all keys are masked: every exp2 below is 0
      float row_sum = 0.f;
#pragma unroll
      for (int j = 0; j < kKeyBlocks; ++j) {
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; ++e) {
          scores[i][j][e] = exp2_fast(scores[i][j][e] - shift[i][half]);
          row_sum += scores[i][j][e];
        }
      }
      if (args.step != kResults) sum[i][half] = row_sum;
    }
  }
  if (args.step != kResults) reduce_rows<Tile>(sum, shared.scratch[1], Sum());
  if (args.step == kStatistics) {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (sum[i][half] == 0.f) shift[i][half] = -INFINITY;
      }
    }
    store_statistics<Tile>(shift, args, shared.offsets, place, 0);
    store_statistics<Tile>(sum, args, shared.offsets, place, args.groups);
    return false;
  }
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float inverse = sum[i][half] == 0.f ? 0.f : 1.f / sum[i][half];
#pragma unroll
      for (int j = 0; j < kKeyBlocks; ++j) {
        scores[i][j][2 * half] *= inverse;
        scores[i][j][2 * half + 1] *= inverse;
      }
    }
  }
  if (args.weights.data != nullptr) {
    write_map<Element>(scores, args, shared, 1.f);
    store_map<Element>(args.weights, args, shared, place);
  }
  if (args.seed != nullptr) {
    const std::uint64_t seed = *args.seed;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      const std::int64_t row = shared.offsets[Tile::row(i, 0)].flat;
      const std::int64_t row_below = shared.offsets[Tile::row(i, 1)].flat;
#pragma unroll
      for (int j = 0; j < kKeyBlocks; ++j) {
        const Keep<Tile> keep(args, seed, row, row_below, Tile::column(j));
#pragma unroll
        for (int e = 0; e < 4; ++e) scores[i][j][e] = keep.x[e] ? scores[i][j][e] : 0.f;
      }
    }
  }
  if (args.row_sum != nullptr) {
    const float factor = args.seed == nullptr ? 1.f : args.keep_scale;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        sum[i][half] = 0.f;
#pragma unroll
        for (int j = 0; j < kKeyBlocks; ++j) sum[i][half] += scores[i][j][2 * half] + scores[i][j][2 * half + 1];
      }
    }
    reduce_rows<Tile>(sum, shared.scratch[0], Sum());
    if (warp() == 0 && Tile::lane() % 4 == 0) {
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = Tile::row(i, half);
          if (row < place.rows) {
            float* target = args.row_sum + shared.offsets[row].flat;
            *target = (args.group == 0 ? 0.f : *target) + factor * sum[i][half];
          }
        }
      }
    }
  }
  write_map<Element>(scores, args, shared, 1.f);
  return true;
}

}  // namespace bda_fused
