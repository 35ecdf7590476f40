// The kernel of both directions: one tile of rows from operands to result. See arguments.h for who is who.

#pragma once

#include "map.cuh"
#include "products.cuh"

namespace bda_fused {

extern __shared__ __align__(128) char shared_memory[];

// added + factor * result for one row's columns of a pass, by one warp. ``slice``: the row in shared memory.
template <class T>
__device__ void store_result(T* out, const void* added, Kind kind, std::int64_t added_row, const float* slice, int size,
                             float factor) {
  const int odd = is_pair_aligned(out) ? 0 : 1;
#pragma unroll 4
  for (int index = 2 * static_cast<int>(threadIdx.x % 32) - odd; index < size; index += 64) {
    const float2 x = load_pair(slice, index, size);
    const float2 y = load_pair<T>(added, kind, added_row, index, size);
    store_pair(out, index, size, {fmaf(x.x, factor, y.x), fmaf(x.y, factor, y.y)});
  }
}

// The fragments of a pass, a row tile of every warp at a time, through shared memory to rows of the result.
template <class Element, class Tile>
__device__ void store_pass(const float (&result)[Tile::kRowTiles][Tile::kOutBlocks][4], const RowArguments& args,
                           const SharedMemory<Tile>& shared, const Place& place, int first_column, float factor) {
  using T = typename Element::Storage;
  const int columns = 8 * args.pass_blocks;
  const int pitch = round_up(columns, 32) + 8;  // neighbouring rows eight banks apart
  const int size = min(columns, args.out_width - first_column);
#pragma unroll 1
  for (int row_tile = 0; row_tile < Tile::kRowTiles; ++row_tile) {
#pragma unroll
    for (int i = 0; i < Tile::kRowTiles; ++i) {
      if (i != row_tile) continue;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float* row = shared.slice + (16 * Tile::warp_row() + 8 * half + Tile::lane() / 4) * pitch;
#pragma unroll
        for (int j = 0; j < Tile::kOutBlocks; ++j) {
          if (Tile::column(j) < columns) {
            *reinterpret_cast<float2*>(row + Tile::column(j)) = {result[i][j][2 * half], result[i][j][2 * half + 1]};
          }
        }
      }
    }
    __syncthreads();
    for (int index = threadIdx.x / 32; index < 16 * Tile::kWarpRows; index += kWarps) {
      const int row = index / 16 * 16 * Tile::kRowTiles + 16 * row_tile + index % 16;
      if (row >= place.rows) continue;
      const Position at = shared.positions[row];
      const std::int64_t added_row = offset(args.added, at) + first_column;
      const std::int64_t out_row = flat_row(args, at) * args.out_width + first_column;
      const float* slice = shared.slice + index * pitch;
      if (args.out_kind == kFloat32) {
        store_result(static_cast<float*>(args.out) + out_row, args.added.data, args.added_kind, added_row, slice, size,
                     factor);
      } else {
        store_result(static_cast<T*>(args.out) + out_row, args.added.data, args.added_kind, added_row, slice, size,
                     factor);
      }
    }
    __syncthreads();
  }
}

// The first key's row of keys or values, which are the same for all rows of a group.
template <class Element>
__device__ const char* keys_of(const Rows& rows, const Position& at) {
  return static_cast<const char*>(rows.data) + (at.batch * rows.batch + at.head * rows.head) * Size<Element>::kBytes;
}

// ``Map``: turns the scores into the map, and says whether the value product follows.
template <class Element, class Tile, class Map>
__device__ void row_kernel(const RowArguments& args) {
  const SharedMemory<Tile> shared(shared_memory, args);
  const Place place = Place::of(args, Tile());
  if (threadIdx.x < Tile::kRows) shared.positions[threadIdx.x] = place.position(args, threadIdx.x);
  const Position first = place.position(args, 0);
  Map::prepare(args, shared, first);
  __syncthreads();

  float scores[Tile::kRowTiles][Tile::kKeyBlocks][4];
  multiply_scores<Element>(scores, args, shared, keys_of<Element>(args.first, first));
  const char* values = keys_of<Element>(args.second, first);
  if (args.passes > 0 && args.step != kStatistics) ValueRows<Element, Tile>(values, args, 0, 0).copy(shared.values);
  if (!Map::apply(scores, args, shared, place)) return;

  const float factor = Map::factor(args);
#pragma unroll 1
  for (int pass = 0; pass < args.passes; ++pass) {
    const int first_column = pass * 8 * args.pass_blocks;
    const int position = first_column * Size<Element>::kBytes;
    if (pass > 0) ValueRows<Element, Tile>(values, args, position, 0).copy(shared.values);
    float result[Tile::kRowTiles][Tile::kOutBlocks][4];
    multiply_values<Element>(result, args, shared, values, position);
    store_pass<Element>(result, args, shared, place, first_column, factor);
  }
}

}  // namespace bda_fused
