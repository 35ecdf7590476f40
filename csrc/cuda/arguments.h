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

// Rows of maps that nobody but this backend reads are padded to a multiple of so many elements, 16 bytes at least.
constexpr int kKeptMapPitch = 8;

// What is added may also be the left rows, of a tile that keeps them on chip: kLeft.
enum Kind : std::int32_t { kNone, kFloat32, kBfloat16, kFloat16, kLeft };

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
  void* scores_grad;       // backward: scale * dS, (B, H, L, S) in padded rows; null: not wanted
  void* dropped;           // backward: P * M, (B, H, L, S) in padded rows; null: not wanted
  float* bias_grad;        // backward: dS, (B, H, L, S); null: not wanted
  float* bias_grad_sums;   // backward: the columns of dS summed over a block's rows, (blocks, S); null: not wanted
  float* statistics;       // of groups of keys, (2, groups, B, H, L): maxima and sums of exp2; rowsum(P * dP) and rowsum(P)
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
  std::int32_t left_offset, left_mask;         // stages of the left rows: where the first begins, in bytes from
                                               // the map's address, and which bits of a chunk's number say which stage
                                               // it has; behind the slices where left rows stay, else under the map
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

// A gradient that is a sum over rows, and over the images that share its operand: the terms' sum of
//
//              left                  right             out
//   keys       dS or P * M, ^T       query or dY       gradients of keys and values
//   queries    dS                    key               the gradient of queries that images share
//
// Groups are the batches and heads that are not summed. A block has one tile of one group, and one split of its steps.
struct Product {
  Rows left[2];   // (B, H, depth, rows), or for queries (B, H, rows, depth); of any alignment
  Rows right[2];  // (B, H, depth, columns), of any alignment
  void* out;      // (splits, groups, rows, columns), contiguous

  std::int32_t terms, rows, columns, depth;
  std::int32_t groups, group_heads;       // groups are (batches, group_heads)
  std::int32_t sum_batches, sum_heads;    // the images that are summed beside depth
  std::int32_t row_tiles, column_tiles;   // tiles of a group
  std::int32_t tile_rows, tile_blocks;    // of a tile: rows, a multiple of 16, and blocks of 8 columns
  std::int32_t splits;
  std::int32_t first_block;
  std::int32_t left_unit, right_unit;     // in what all terms' rows are copied: 16 or 4 bytes; 0: through registers
  Kind out_kind;
};

// One product or two, side by side in one grid.
struct ProductArguments {
  Product products[2];
};

// out[i] = the sum of partial[part][i], from the first part to the last, and then of the added rows, image by image.
struct SumArguments {
  const float* partial;  // (parts, size)
  void* out;             // (groups, rows, columns), of ``size`` elements
  Rows added;            // (B, H, rows, columns), of the kind of out; null data: none
  std::int64_t size;
  std::int32_t parts, rows, columns;
  std::int32_t group_heads, sum_batches, sum_heads;  // as in Product
  Kind out_kind;
};

}  // namespace bda_fused
