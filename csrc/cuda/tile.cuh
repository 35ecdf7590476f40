// How a block of eight warps divides a tile: who holds which rows and columns, and where things lie in shared memory.

#pragma once

#include "arguments.h"

namespace bda_fused {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kChunk = 128;  // bytes of a row that are on chip at a time

__host__ __device__ constexpr int round_up(int x, int multiple) { return (x + multiple - 1) / multiple * multiple; }

__device__ inline int warp() { return threadIdx.x / 32; }

// A number that is the same for all lanes of a warp, in a form from which the compiler sees it: branches on it cost
// nothing.
__device__ inline int uniform(int x) { return __shfl_sync(0xffffffff, x, 0); }

// WARP_ROWS x WARP_COLUMNS warps. A warp has ROW_TILES tiles of 16 neighbouring rows, KEY_BLOCKS blocks of 8 columns of
// the scores and OUT_BLOCKS of the result. Column blocks are dealt to the warps in turn, so that the tail is spread.
template <int ROW_TILES, int WARP_ROWS, int WARP_COLUMNS, int KEY_BLOCKS, int OUT_BLOCKS>
struct Tile {
  static_assert(WARP_ROWS * WARP_COLUMNS == kWarps, "a block has eight warps");
  static constexpr int kRowTiles = ROW_TILES, kWarpRows = WARP_ROWS, kWarpColumns = WARP_COLUMNS;
  static constexpr int kKeyBlocks = KEY_BLOCKS, kOutBlocks = OUT_BLOCKS;
  static constexpr int kRows = 16 * ROW_TILES * WARP_ROWS;
  static constexpr int kKeys = 8 * KEY_BLOCKS * WARP_COLUMNS;
  static constexpr int kOut = 8 * OUT_BLOCKS * WARP_COLUMNS;

  __device__ static int lane() { return threadIdx.x % 32; }
  __device__ static int warp_row() { return warp() / WARP_COLUMNS; }
  __device__ static int warp_column() { return warp() % WARP_COLUMNS; }

  // The first row of a warp's tile.
  __device__ static int tile_row(int row_tile) { return 16 * (warp_row() * ROW_TILES + row_tile); }
  // The row of this lane's entries 0 and 1 (half 0) or 2 and 3 (half 1) of a fragment.
  __device__ static int row(int row_tile, int half) { return tile_row(row_tile) + 8 * half + lane() / 4; }
  // How many of ``blocks`` column blocks this warp has.
  __device__ static int share(int blocks) { return (blocks + WARP_COLUMNS - 1 - warp_column()) / WARP_COLUMNS; }
  __device__ static int block(int index) { return index * WARP_COLUMNS + warp_column(); }
  // The column of this lane's even entries of a fragment.
  __device__ static int column(int index) { return 8 * block(index) + 2 * (lane() % 4); }
};

// Rows of 128 bytes, whose 16-byte units are permuted so that eight rows of one unit meet eight different banks.
__device__ inline unsigned swizzled(int row, int unit) { return row * kChunk + ((unit ^ (row % 8)) << 4); }

// What depends on the element's size.
template <class Element>
struct Size {
  static constexpr int kBytes = sizeof(typename Element::Storage);
  static constexpr int kStep = 32 / kBytes;        // keys of one tensor-core step of the value product
  static constexpr int kStageKeys = 2 * kStep;     // keys of one stage of the value product
  static constexpr int kBlockUnits = kBytes / 2;   // 16-byte units of a block of 8 columns
};

// Where a row of a tile stands in the batch.
struct Position {
  int batch, head, query;
};

__device__ inline std::int64_t offset(const Rows& rows, const Position& at) {
  return at.batch * rows.batch + at.head * rows.head + at.query * rows.row;
}

// What is asked for most often of a row. flat: its index in contiguous results, and in the dropout mask. The
// others: where its operands' rows begin.
struct RowOffsets {
  std::int64_t flat, left, added, bias;
};

// An operand that a batch axis shares belongs to the first image along it: it is written, or added, once.
__device__ inline bool is_owner(const Rows& rows, const Position& at) {
  return (at.batch == 0 || rows.batch != 0) && (at.head == 0 || rows.head != 0);
}

// Shared memory of a block. The first part serves three purposes in turn: two stages of the score product; the map and
// two stages of the value product; the map and a slice of the result. Behind it lies what stays.
template <class Tile>
struct SharedMemory {
  unsigned base;            // stages, map
  unsigned values;          // stages of the value product, slice of the result
  float* slice;
  float* key_bias;          // forward, (kKeys): 0, or the bias that all rows share, or -inf behind the last key
  float* column_sums;       // backward, (kWarpRows, kKeys): in the same place
  float* scratch[2];        // (kRows, kWarpColumns), for sums over a row
  RowOffsets* offsets;      // (kRows)
  Position* positions;      // (kRows)
  char* map;

  __device__ SharedMemory(char* memory, const RowArguments& args) {
    map = memory;
    slice = reinterpret_cast<float*>(memory + Tile::kRows * args.map_pitch);
    key_bias = reinterpret_cast<float*>(memory + args.overlaid);
    column_sums = key_bias;
    scratch[0] = key_bias + Tile::kWarpRows * Tile::kKeys;
    scratch[1] = scratch[0] + Tile::kRows * Tile::kWarpColumns;
    offsets = reinterpret_cast<RowOffsets*>(scratch[1] + Tile::kRows * Tile::kWarpColumns);
    positions = reinterpret_cast<Position*>(offsets + Tile::kRows);
    base = static_cast<unsigned>(__cvta_generic_to_shared(memory));
    values = base + Tile::kRows * args.map_pitch;
  }
};

}  // namespace bda_fused
