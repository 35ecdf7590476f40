// What the kernels are given, as plain structs: bda_fused/backends/cuda_plan.py fills the same ones, field by field.

#pragma once

#include <cstdint>

namespace bda_fused {

// Element (b, h, r, c) of an operand lies at data[b * batch + h * head + r * row + c]; strides in elements, 0 where
// an axis is shared.
struct Rows {
  const void* data;
  std::int64_t batch, head, row;
};

// Which part of the keys a launch sees. Up to 512 keys fit on chip: whole. More are taken in groups, and twice: first
// the statistics of every group, then the results, in which every group knows the statistics of all.
enum Step : std::int32_t { kWhole, kStatistics, kResults };

enum Kind : std::int32_t { kNone, kFloat32, kBfloat16, kFloat16 };

// One row tile of    Z = added + map(scale * left first^T + bias) second    for every block.
//
//              left    first   second  added             map
//   forward    query   key     value   residual          softmax
//   backward   dY      value   key     dY or nothing     dS = P * (dP - rowsum(P * dP))
struct RowArguments {
  Rows left;    // (B, H, L, width), of any alignment
  // Rows that are 16-byte aligned and may be read up to a multiple of 32 bytes, whatever lies there.
  Rows first;   // (B, H, S, width)
  Rows second;  // (B, H, S, out_width); null data: only the map is wanted
  Rows added;   // (B, H, L, out_width), of any alignment and kind
  void* out;    // (B, H, L, out_width), contiguous

  Rows bias;               // float32 (B, H, L, S), added to the scaled scores; null data: none
  Rows weights;            // P: (B or 1, H or 1, L, S). The forward writes it, null data: nobody wants it
  Rows weights_grad;       // backward: the gradient of P, of any alignment; null data: none
  const float* row_sum_grad;  // backward: (B, H, L); null: none
  float* row_sum;          // forward: (B, H, L); null: not wanted
  void* scores_grad;       // backward: scale * dS, (B, H, L, S); null: not wanted
  void* dropped;           // backward: P * M, (B, H, L, S); null: not wanted
  float* bias_grad;        // backward: dS, (B, H, L, S); null: not wanted
  float* bias_grad_sums;   // backward: the columns of dS summed over a block's rows, (blocks, S); null: not wanted
  float* statistics;       // of a group of keys, (groups, B, H, L): log2 sum exp2, or rowsum(P * dP)
  const std::uint64_t* seed;  // dropout; null: none

  std::int32_t batches, heads, queries, keys;  // B, H, L and the keys of this launch
  std::int32_t width, out_width;
  // Rows that meet the same keys are one group: those of all batches, or heads, over which the keys are shared.
  std::int32_t inner_batches, inner_heads;
  std::int32_t tiles;                          // row tiles of a group
  std::int32_t bias_key;                       // the bias's stride over keys, 1 or 0
  std::int32_t total_keys, first_key;          // S, and where this launch's keys begin
  std::int32_t group, groups;                  // of keys: this one, and how many there are
  Step step;
  Kind added_kind, out_kind;
  std::uint32_t threshold;                     // the smallest word that survives dropout
  float keep_scale;                            // 1 / (1 - p), 0 at p = 1
  float scale;
  std::int32_t left_unit;                      // 4: left rows of a group lie left.row apart, at addresses that are
                                               // multiples of 4; 0: they may not, and are shifted on chip
  std::int32_t pass_units;                     // units of 32 bytes of one pass over out_width's columns
  std::int32_t consecutive;                    // whether a tile's rows of ``added`` and ``out`` follow one another
};

// Copies rows of any alignment to rows that are 16-byte aligned, with zeros behind their end.
struct PackArguments {
  Rows source;  // (B, H, rows, row_bytes); strides in bytes
  void* packed;  // (B, H, rows, row_units of 16 bytes), contiguous
  std::int64_t total_rows;  // B * H * rows
  std::int32_t heads, rows, row_bytes, row_units;
};

}  // namespace bda_fused
