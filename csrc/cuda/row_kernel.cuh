// The kernel of both directions: one tile of rows from operands to result. See arguments.h for who is who.

#pragma once

#include "map.cuh"
#include "products.cuh"
#include "store.cuh"

namespace bda_fused {

extern __shared__ __align__(128) char shared_memory[];

// The first key's row of keys or values, which are the same for all rows of a group.
template <class Element>
__device__ const char* keys_of(const Rows& rows, const Position& at) {
  return static_cast<const char*>(rows.data) + (at.batch * rows.batch + at.head * rows.head) * Size<Element>::kBytes;
}

// ``Map``: turns the scores into the map, and says whether the value product follows.
template <class Element, class Tile, class Map>
__device__ __forceinline__ void row_kernel(const RowArguments& args) {
  const SharedMemory<Element, Tile> shared(shared_memory);
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
  multiply_scores(scores, args, shared, place.rows, keys_of<Element>(args.first, first));
  if (!Map::apply(scores, args, shared, place) || args.second.data == nullptr) return;

  __syncthreads();  // the map is complete
  constexpr int kColumns = Size<Element>::kUnitColumns;
#pragma unroll 1
  for (int column = 0; column < args.out_width; column += args.pass_units * kColumns) {
    // What product and store both need is computed for each: registers are full in between.
    const auto units = [&] {
      const int rest = args.out_width - static_cast<int>(opaque(column));
      return min(args.pass_units, (rest + kColumns - 1) / kColumns);
    };
    const auto position = [&] { return static_cast<int>(opaque(column)) * Size<Element>::kBytes; };
    Result<Element, Tile> result;
    forget_loads();
    multiply_values(result, args, shared, keys_of<Element>(args.second, shared.positions[0]), position(), units());
    const bool adds_left = args.added_kind == kLeft;
    if (adds_left) add_left_rows(result, shared, position(), units(), Map::factor(args));
    const int rows = Place(args, Tile::kRows, opaque(blockIdx.x)).rows;
    store_pass(result, args, shared, rows, column, units(), adds_left ? 1.f : Map::factor(args));
  }
}

}  // namespace bda_fused
