// The kernel of both directions: one tile of rows from operands to result. See arguments.h for who is who.

#pragma once

#include "map.cuh"
#include "products.cuh"

namespace bda_fused {

extern __shared__ __align__(128) char shared_memory[];

// out = added + factor * slice for one row's columns of a pass, by one warp. ``slice``: in shared memory. ODD: out and
// added are aligned for a pair behind their first element; else at it. size <= LONGEST.
template <int LONGEST, bool ODD, bool ADDED, class T>
__device__ void store_pairs(T* out, const T* added, const float* slice, int size, float factor) {
  using PairType = typename Pair<T>::Type;
  const int lane = threadIdx.x % 32;
  const float* from = slice + ODD + 2 * lane;
  const auto* with = reinterpret_cast<const PairType*>(added + ODD) + lane;
  auto* to = reinterpret_cast<PairType*>(out + ODD) + lane;
#pragma unroll
  for (int i = 0; i <= LONGEST; i += 64) {
    if (ODD + 2 * lane + i + 1 < size) {
      const float2 x = ODD ? make_float2(from[i], from[i + 1]) : *reinterpret_cast<const float2*>(from + i);
      const float2 y = ADDED ? widen(with[i / 2]) : make_float2(0.f, 0.f);
      to[i / 2] = Pair<T>::round(fmaf(x.x, factor, y.x), fmaf(x.y, factor, y.y));
    }
  }
  const bool first = ODD && lane == 0, last = (size - ODD) % 2 != 0 && lane == 31;
  if (first || last) {
    const int i = first ? 0 : size - 1;
    out[i] = Pair<T>::round(fmaf(slice[i], factor, ADDED ? widen(added[i]) : 0.f));
  }
}

// The same for added rows of any kind and alignment.
template <int LONGEST, class T>
__device__ void store_result(T* out, const Rows& added, Kind kind, std::int64_t added_row, const float* slice, int size,
                             float factor) {
  const T* typed = static_cast<const T*>(added.data) + added_row;
  const bool odd = !is_pair_aligned(out);
  if (kind == kNone) {
    odd ? store_pairs<LONGEST, true, false>(out, typed, slice, size, factor)
        : store_pairs<LONGEST, false, false>(out, typed, slice, size, factor);
  } else if (kind == Pair<T>::kKind && is_pair_aligned(typed) != odd) {
    odd ? store_pairs<LONGEST, true, true>(out, typed, slice, size, factor)
        : store_pairs<LONGEST, false, true>(out, typed, slice, size, factor);
  } else {
    for (int i = threadIdx.x % 32; i < size; i += 32) {
      out[i] = Pair<T>::round(fmaf(slice[i], factor, load_element(added.data, kind, added_row + i)));
    }
  }
}

// The fragments of a pass, a row tile of every warp at a time, through shared memory to rows of the result.
template <class Element, class Tile>
__device__ void store_pass(const float (&result)[Tile::kRowTiles][Tile::kOutBlocks][4], const RowArguments& args,
                           const SharedMemory<Tile>& shared, int rows, int first_column, float factor) {
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
      if (row >= rows) continue;
      const std::int64_t added_row = shared.offsets[row].added + first_column;
      const std::int64_t out_row = shared.offsets[row].flat * args.out_width + first_column;
      const float* slice = shared.slice + index * pitch;
      if (args.out_kind == kFloat32) {
        auto* out = static_cast<float*>(args.out) + out_row;
        store_result<Tile::kOut>(out, args.added, args.added_kind, added_row, slice, size, factor);
      } else {
        auto* out = static_cast<T*>(args.out) + out_row;
        store_result<Tile::kOut>(out, args.added, args.added_kind, added_row, slice, size, factor);
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
  const Place place(args, Tile::kRows);
  if (threadIdx.x < Tile::kRows) {
    const Position at = place.position(args, threadIdx.x);
    shared.positions[threadIdx.x] = at;
    shared.offsets[threadIdx.x] = {(std::int64_t{at.batch} * args.heads + at.head) * args.queries + at.query,
                                   offset(args.left, at), offset(args.added, at), offset(args.bias, at)};
  }
  const Position first = place.position(args, 0);
  Map::prepare(args, shared, first);
  __syncthreads();

  float scores[Tile::kRowTiles][Tile::kKeyBlocks][4];
  multiply_scores<Element>(scores, args, shared, place.rows, keys_of<Element>(args.first, first));
  // Not kept in registers while the map needs them all.
  const auto values = [&] { return keys_of<Element>(args.second, shared.positions[0]); };
  if (args.passes > 0 && args.step != kStatistics) ValueRows<Element, Tile>(values(), args, 0, 0).copy(shared.values);
  if (!Map::apply(scores, args, shared, place)) return;

#pragma unroll 1
  for (int pass = 0; pass < args.passes; ++pass) {
    const int first_column = pass * 8 * args.pass_blocks;
    const int position = first_column * Size<Element>::kBytes;
    if (pass > 0) ValueRows<Element, Tile>(values(), args, position, 0).copy(shared.values);
    float result[Tile::kRowTiles][Tile::kOutBlocks][4];
    multiply_values<Element>(result, args, shared, values(), position);
    store_pass<Element>(result, args, shared, place.rows, first_column, Map::factor(args));
  }
}

}  // namespace bda_fused
