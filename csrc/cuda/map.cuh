// The map between the two products, held as fragments in registers and then, rounded, as rows in shared memory.

#pragma once

#include "copy.cuh"
#include "pairs.cuh"
#include "tile.cuh"

namespace bda_fused {

// The block's place: its group of rows, its first row in it, and how many rows it has.
struct Place {
  int group, first_row, rows;

  __device__ Place(const RowArguments& args, int tile_rows, unsigned block = blockIdx.x)
      : group(block / args.tiles),
        first_row(block % args.tiles * tile_rows),
        rows(min(tile_rows, args.inner_batches * args.inner_heads * args.queries - first_row)) {}

  // Of a row of the tile; rows behind the last stand where the last does.
  __device__ Position position(const RowArguments& args, int row) const {
    const int index = first_row + min(row, rows - 1);
    const int image = index / args.queries;
    const int outer_heads = args.heads / args.inner_heads;
    return {group / outer_heads + image / args.inner_heads, group % outer_heads + image % args.inner_heads,
            index - image * args.queries};
  }
};

// fragments * factor, rounded, into the map's rows. All columns up to the next whole step of the value product.
template <class Element, class Tile>
__device__ void write_map(const float (&x)[Tile::kRowTiles][Tile::kKeyBlocks][4], const RowArguments& args,
                          const SharedMemory<Element, Tile>& shared, float factor) {
  using T = typename Element::Storage;
  const int columns = round_up(args.keys, Size<Element>::kStep);
  char* rows = shared.map + Tile::row(0, 0) * shared.kMapPitch;
#pragma unroll
  for (int j = 0; j < Tile::kKeyBlocks; ++j) {
    const int column = Tile::column(j);
    if (column < columns) {
#pragma unroll
      for (int i = 0; i < Tile::kRowTiles; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          auto* row = reinterpret_cast<T*>(rows + (16 * i + 8 * half) * shared.kMapPitch);
          *reinterpret_cast<typename Pair<T>::Type*>(row + column) =
              Pair<T>::round(x[i][j][2 * half] * factor, x[i][j][2 * half + 1] * factor);
        }
      }
    }
  }
}

// (B, H, L, S) in rows of a multiple of kKeptMapPitch elements.
__device__ inline Rows padded_map(const RowArguments& args, void* data) {
  const std::int64_t row = round_up(args.total_keys, kKeptMapPitch), head = row * args.queries;
  return {data, head * args.heads, head, row};
}

// The map's rows to contiguous or shared rows of ``to``; all threads call it. Complete before, free after.
template <class Element, class Tile>
__device__ void store_map(const Rows& to, const RowArguments& args, const SharedMemory<Element, Tile>& shared,
                          const Place& place) {
  using T = typename Element::Storage;
  __syncthreads();
  for (int row = threadIdx.x / 32; row < place.rows; row += kWarps) {
    const Position at = shared.positions[row];
    if (is_owner(to, at)) {
      auto* target = static_cast<T*>(const_cast<void*>(to.data)) + offset(to, at) + args.first_key;
      store_row(target, shared.map + row * shared.kMapPitch, args.keys);
    }
  }
  __syncthreads();
}

// The map's rows from global memory, of any alignment; zeros in rows that the tile does not have.
template <class Element, class Tile>
__device__ void load_map(const Rows& from, const RowArguments& args, const SharedMemory<Element, Tile>& shared,
                         const Place& place) {
  const int bytes = args.keys * Size<Element>::kBytes;
  const int units = round_up(args.keys, Size<Element>::kStep) * Size<Element>::kBytes / 16;
#pragma unroll 1
  for (int first = 0; first < Tile::kRows; first += 32) {
    const int row = first + threadIdx.x / 8;
    if (row >= Tile::kRows) break;  // the same for a whole warp
    const char* data = static_cast<const char*>(from.data) +
                       (offset(from, shared.positions[row]) + args.first_key) * Size<Element>::kBytes;
    const auto shift = static_cast<unsigned>(reinterpret_cast<std::uintptr_t>(data) & 15);
#pragma unroll 4
    for (int first_unit = 0; first_unit < units; first_unit += 8) {
      const int unit = first_unit + threadIdx.x % 8;
      const int valid = row < place.rows ? bytes - 16 * unit : -16;
      const uint4 x = cut(join(load_shifted(data + 16 * unit, valid), shift), valid);
      if (unit < units) store_shared(shared.map_address + row * shared.kMapPitch + 16 * unit, x);
    }
  }
  __syncthreads();
}

}  // namespace bda_fused
