// How a block of eight warps divides a tile: who holds which rows and columns, and where things lie in shared memory.

#pragma once

#include "arguments.h"

namespace bda_fused {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kChunk = 128;  // bytes of a row that are on chip at a time

__host__ __device__ constexpr int round_up(int x, int multiple) { return (x + multiple - 1) / multiple * multiple; }

__device__ inline int warp() { return threadIdx.x / 32; }

// The same number, unknown to the compiler: what follows from it is computed where it is used, not kept in registers
// throughout a loop.
__device__ inline unsigned opaque(unsigned x) {
  asm volatile("" : "+r"(x));
  return x;
}

// What was loaded is loaded again where it is needed, not kept in registers that others need more.
__device__ inline void forget_loads() { asm volatile("" ::: "memory"); }

// A number that is the same for all lanes of a warp, in a form from which the compiler sees it: branches on it cost
// nothing.
__device__ inline int uniform(int x) { return __shfl_sync(0xffffffff, x, 0); }

// A warp has all rows of the tile, in ROW_TILES tiles of 16, and its share of the columns: up to KEY_BLOCKS blocks of 8
// keys, and of the result up to UNITS units of 32 bytes of a row. Both are dealt to the warps in turn, so that the tail
// is spread. No two warps share a key or a value, so these go from global memory to registers; what all warps read, the
// left rows and the map, lies in shared memory.
template <int ROW_TILES, int KEY_BLOCKS, int UNITS>
struct Tile {
  static constexpr int kRowTiles = ROW_TILES, kKeyBlocks = KEY_BLOCKS, kUnits = UNITS;
  static constexpr int kRows = 16 * ROW_TILES;
  static constexpr int kKeys = 8 * KEY_BLOCKS * kWarps;

  __device__ static int lane() { return threadIdx.x % 32; }
  // The row of this lane's entries 0 and 1 (half 0) or 2 and 3 (half 1) of a fragment.
  __device__ static int row(int row_tile, int half) { return 16 * row_tile + 8 * half + lane() / 4; }
  // How many of ``all`` blocks or units this warp has, and which.
  __device__ static int share(int all) {
    const int warp = opaque(threadIdx.x) / 32;
    return (all + kWarps - 1 - warp) / kWarps;
  }
  __device__ static int dealt(int index) { return index * kWarps + warp(); }
  // The key of this lane's even entries of a fragment.
  __device__ static int column(int index) { return 8 * dealt(index) + 2 * (lane() % 4); }
};

// What depends on the element's size.
template <class Element>
struct Size {
  static constexpr int kBytes = sizeof(typename Element::Storage);
  static constexpr int kStep = 32 / kBytes;        // keys of one tensor-core step of the value product
  static constexpr int kUnitColumns = 32 / kBytes;
  static constexpr int kUnitBlocks = 4 / kBytes;   // blocks of 8 columns of a unit
};

// The fragments of a warp's results: entry 2 half + k of block b of a unit is, of its row, column kUnitBlocks k + b of
// the lane's 2 kUnitBlocks neighbouring ones.
template <class Element, class Tile>
using Result = float[Tile::kRowTiles][Tile::kUnits][Size<Element>::kUnitBlocks][4];

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

// Shared memory of a block. What stays comes first, of a fixed size; behind it the stages of the left rows, and then in
// their place the map and slices of the result. Left rows that are added to the result stay too, all of them, behind
// the slices.
template <class Element, class Tile>
struct SharedMemory {
  // A chunk of the left rows is two planes of 64 bytes a row, half a bank cycle apart. Rows lie five units of 16 bytes
  // apart, so that eight of them meet all banks.
  static constexpr int kLeftPitch = 80;
  static constexpr int kPlane = kLeftPitch * Tile::kRows + 64;
  static constexpr int kStage = 2 * kPlane;
  static constexpr int kWords = 9 * 16 * Tile::kRows;  // a chunk as it lies in memory, of which there are two
  // Rows of the map and of a slice: neighbours 16 bytes, or 16 floats, apart in the banks.
  static constexpr int kMapPitch = Tile::kKeys * Size<Element>::kBytes + 16;
  static constexpr int kSlicePitch = Tile::kUnits * kWarps * Size<Element>::kUnitColumns + 16;
  static constexpr int kSlice = 16 * kSlicePitch;  // floats; there are two
  static constexpr int kMap = Tile::kRows * kMapPitch;
  static constexpr int kStaying = kMap + 8 * kSlice;  // where left rows that stay begin, behind the map's address
  static_assert(2 * kWords <= kStaying, "words that are shifted reach into left rows that stay");

  float* key_bias;      // forward, (kKeys): 0, or the bias that all rows share, or -inf behind the last key
  float* scratch[2];    // (kRows, kWarps), for sums over a row
  RowOffsets* offsets;  // (kRows)
  Position* positions;  // (kRows)
  char* map;
  unsigned map_address;  // the same, and the words that are shifted
  float* slices;

  __device__ explicit SharedMemory(char* memory)
      : key_bias(reinterpret_cast<float*>(memory)),
        scratch{key_bias + Tile::kKeys, key_bias + Tile::kKeys + Tile::kRows * kWarps},
        offsets(reinterpret_cast<RowOffsets*>(scratch[1] + Tile::kRows * kWarps)),
        positions(reinterpret_cast<Position*>(offsets + Tile::kRows)),
        map(reinterpret_cast<char*>(positions + Tile::kRows)),
        map_address(static_cast<unsigned>(__cvta_generic_to_shared(map))),
        slices(reinterpret_cast<float*>(map + kMap)) {}

  // Of a word of a row's chunk, in a stage. Word 4 t + i of 64 bytes is word t of unit i: lane t of four gets from
  // ldmatrix the words that it has of a key.
  __device__ static unsigned left_word(unsigned row, unsigned word) {
    return word / 16 * kPlane + row * kLeftPitch + word % 4 * 16 + word % 16 / 4 * 4;
  }
};

}  // namespace bda_fused
