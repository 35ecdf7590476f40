// The two matrix products of a row tile: scores = left first^T, and result = map second. Both are pipelines of two
// stages: while the tensor cores work on one, the other is filled.

#pragma once

#include "copy.cuh"
#include "mma.cuh"
#include "tile.cuh"

namespace bda_fused {

// One chunk of the tile's rows of the left operand, where they lie a constant distance apart and are aligned to UNIT
// bytes; zeros behind the last row and column.
template <int UNIT, class Element, class Tile>
__device__ void copy_left(const char* left, const RowArguments& args, int rows, int chunk, unsigned stage) {
  constexpr int kLanes = kChunk / UNIT, kStep = kThreads / kLanes;  // lanes of a row, rows at a time
  const int row = threadIdx.x / kLanes, byte = UNIT * (threadIdx.x % kLanes);
  const int position = chunk * kChunk + byte;
  const int valid = min(max(args.width * Size<Element>::kBytes - position, 0), UNIT);
  const std::int64_t pitch = args.left.row * Size<Element>::kBytes;
  const char* from = left + position + row * pitch;
  const unsigned to = stage + swizzled(row, byte / 16) + byte % 16;
#pragma unroll
  for (int i = 0; i < Tile::kRows; i += kStep) {  // steps of whole eights: the permutation of units stays
    if (Tile::kRows % kStep == 0 || row + i < Tile::kRows) {
      copy_async<UNIT>(to + i * kChunk, from, row + i < rows ? valid : 0);
    }
    from += kStep * pitch;
  }
}

// The tile's rows of the left operand, of any alignment, on their way into shared memory: eight lanes a row.
template <class Element, class Tile>
struct LeftRows {
  static constexpr int kPerThread = (Tile::kRows + 31) / 32;

  const char* data;
  const RowOffsets* offsets;
  int bytes;
  ShiftedWord loaded[kPerThread];

  __device__ LeftRows(const RowArguments& args, const SharedMemory<Tile>& shared)
      : data(static_cast<const char*>(args.left.data)),
        offsets(shared.offsets),
        bytes(args.width * Size<Element>::kBytes) {}

  __device__ static int row(int i) { return threadIdx.x / 8 + 32 * i; }
  __device__ static bool has(int i) { return row(i) < Tile::kRows; }
  __device__ int valid(int chunk) const { return bytes - chunk * kChunk - 16 * static_cast<int>(threadIdx.x % 8); }
  __device__ const char* begin(int i) const {
    return data + offsets[has(i) ? row(i) : 0].left * Size<Element>::kBytes;
  }

  __device__ void load(int chunk) {
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      loaded[i] = load_shifted(begin(i) + chunk * kChunk + 16 * (threadIdx.x % 8), has(i) ? valid(chunk) : -16);
    }
  }

  __device__ void store(int chunk, unsigned stage) const {
    const bool last = (chunk + 1) * kChunk > bytes;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const auto shift = static_cast<unsigned>(reinterpret_cast<std::uintptr_t>(begin(i)) & 15);
      uint4 x = join(loaded[i], shift);
      if (last) x = cut(x, valid(chunk));
      if (has(i)) store_shared(stage + swizzled(row(i), threadIdx.x % 8), x);
    }
  }
};

// One chunk of the keys' rows, aligned, behind the left rows of the stage; zeros behind the last key and column.
template <class Element, class Tile>
__device__ void copy_keys(const char* keys, const RowArguments& args, int chunk, unsigned stage) {
  const int unit = threadIdx.x % 8;
  const int key = threadIdx.x / 8;
  const int position = chunk * kChunk + 16 * unit;
  const int valid = min(max(args.width * Size<Element>::kBytes - position, 0), 16);
  const std::int64_t pitch = args.first.row * Size<Element>::kBytes;
  const char* from = keys + position + key * pitch;
  const unsigned to = stage + swizzled(Tile::kRows + key, unit);
#pragma unroll
  for (int i = 0; i < (Tile::kKeys + 31) / 32; ++i) {
    if (32 * i + 32 <= args.keys) {
      copy_async<16>(to + 32 * i * kChunk, from, valid);
    } else if (32 * i + key < round_up(args.keys, 8)) {
      copy_async<16>(to + 32 * i * kChunk, from, 32 * i + key < args.keys ? valid : 0);
    }
    from += 32 * pitch;
  }
}

// Adds STEPS steps of depth, one or two, to the fragments of the first ``blocks`` column blocks. load_left(x, step, i)
// gets the left fragment of a step and row tile, load_right(x, j) the right fragments of both steps of a block.
template <class Element, int STEPS, int ROW_TILES, int BLOCKS, class LoadLeft, class LoadRight>
__device__ void multiply(float (&sums)[ROW_TILES][BLOCKS][4], int blocks, LoadLeft load_left, LoadRight load_right) {
  typename Element::template Fragment<4> left[STEPS][ROW_TILES];
#pragma unroll
  for (int step = 0; step < STEPS; ++step) {
#pragma unroll
    for (int i = 0; i < ROW_TILES; ++i) {
      unsigned x[4];
      load_left(x, step, i);
      left[step][i] = Element::template prepare<4>(x);
    }
  }
  const auto multiply_block = [&](int j) {
    unsigned x[4];
    load_right(x, j);
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      const auto right = Element::template prepare<2>(x + 2 * step);
#pragma unroll
      for (int i = 0; i < ROW_TILES; ++i) Element::multiply(sums[i][j], left[step][i], right);
    }
  };
  if (blocks >= BLOCKS - 1) {  // the sizes that the tile was made for: one question instead of one a block
#pragma unroll
    for (int j = 0; j < BLOCKS - 1; ++j) multiply_block(j);
    if (blocks == BLOCKS) multiply_block(BLOCKS - 1);
  } else {
#pragma unroll
    for (int j = 0; j < BLOCKS - 1; ++j) {
      if (j >= blocks) break;
      multiply_block(j);
    }
  }
}

template <int ROW_TILES, int BLOCKS>
__device__ void clear(float (&sums)[ROW_TILES][BLOCKS][4]) {
#pragma unroll
  for (int i = 0; i < ROW_TILES; ++i) {
#pragma unroll
    for (int j = 0; j < BLOCKS; ++j) {
#pragma unroll
      for (float& x : sums[i][j]) x = 0.f;
    }
  }
}

// scores[i][j] = the fragment of row tile i and column block j, zero where the block lies behind the keys.
template <class Element, class Tile>
__device__ void multiply_scores(float (&scores)[Tile::kRowTiles][Tile::kKeyBlocks][4], const RowArguments& args,
                                const SharedMemory<Tile>& shared, int rows, const char* keys) {
  const int bytes = args.width * Size<Element>::kBytes;
  const int chunks = (bytes + kChunk - 1) / kChunk;
  const int blocks = uniform(Tile::share((args.keys + 7) / 8));
  const unsigned stage_bytes = (Tile::kRows + round_up(args.keys, 8)) * kChunk;
  const int lane = Tile::lane();
  // ldmatrix takes the address of row lane % 8 of matrix lane / 8: of the left rows, 16 rows by 2 units; of the keys,
  // one block of 8 by 4 units. Units are permuted by the row, so steps along it are exclusive or.
  const unsigned left_address =
      shared.base + (Tile::tile_row(0) + lane % 16) * kChunk + (((lane / 16) ^ (lane % 8)) << 4);
  const unsigned key_address =
      shared.base + (Tile::kRows + 8 * Tile::warp_column() + lane % 8) * kChunk + (((lane / 8) ^ (lane % 8)) << 4);

  LeftRows<Element, Tile> left(args, shared);
  const char* first_left =
      static_cast<const char*>(args.left.data) + shared.offsets[0].left * Size<Element>::kBytes;
  const auto load_stage = [&](int chunk, unsigned stage) {
    if (args.left_unit == 16) {
      copy_left<16, Element, Tile>(first_left, args, rows, chunk, stage);
    } else if (args.left_unit == 4) {
      copy_left<4, Element, Tile>(first_left, args, rows, chunk, stage);
    } else {
      left.load(chunk);
    }
    copy_keys<Element, Tile>(keys, args, chunk, stage);
    commit_copies();
  };
  load_stage(0, shared.base);
  if (args.left_unit == 0) left.store(0, shared.base);
  clear(scores);
#pragma unroll 1
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const unsigned stage = chunk % 2 * stage_bytes;
    const unsigned next_stage = stage_bytes - stage;
    wait_for_copies();
    __syncthreads();
    if (chunk + 1 < chunks) load_stage(chunk + 1, shared.base + next_stage);
#pragma unroll 1
    for (int at = 0; at < min(kChunk, bytes - chunk * kChunk); at += 64) {
      const unsigned left_half = (stage + left_address) ^ at, key_half = (stage + key_address) ^ at;
      const auto load_left = [&](unsigned(&x)[4], int step, int i) {
        load_matrices(x, (left_half ^ (32 * step)) + 16 * i * kChunk);
      };
      const auto load_right = [&](unsigned(&x)[4], int j) {
        load_matrices(x, key_half + 8 * j * Tile::kWarpColumns * kChunk);
      };
      if (bytes - chunk * kChunk - at > 32) {
        multiply<Element, 2>(scores, blocks, load_left, load_right);
      } else {
        multiply<Element, 1>(scores, blocks, load_left, load_right);
      }
    }
    if (chunk + 1 < chunks && args.left_unit == 0) left.store(chunk + 1, shared.base + next_stage);
  }
  __syncthreads();
}

// The values' rows on their way into shared memory, for one pass over columns: a warp a row.
template <class Element, class Tile>
struct ValueRows {
  static constexpr int kUnits = (Tile::kOut * Size<Element>::kBytes / 16 + 31) / 32;  // of a row, for each lane
  static constexpr int kPerWarp = Size<Element>::kStageKeys / kWarps;

  const char* from;
  std::int64_t step;   // from one row of this warp to its next
  int first_key, keys, pitch, units, valid[kUnits];

  // position: of the pass in a row, in bytes. first_key: of the next stage.
  __device__ ValueRows(const char* values, const RowArguments& args, int position, int first_key)
      : from(values + (first_key + warp()) * args.second.row * Size<Element>::kBytes + position + 16 * Tile::lane()),
        step(kWarps * args.second.row * Size<Element>::kBytes),
        first_key(first_key),
        keys(args.keys),
        pitch(args.value_pitch),
        units(args.pass_blocks * Size<Element>::kBlockUnits) {
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      const int rest = args.out_width * Size<Element>::kBytes - position - 16 * (Tile::lane() + 32 * i);
      valid[i] = min(max(rest, 0), 16);
    }
  }

  // The next stage; zeros behind the last key and column.
  __device__ void copy(unsigned stage) {
    if (first_key + Size<Element>::kStageKeys <= keys) {
      copy<false>(stage);
    } else {
      copy<true>(stage);
    }
    first_key += Size<Element>::kStageKeys;
    commit_copies();
  }

 private:
  template <bool LAST>
  __device__ void copy(unsigned stage) {
    unsigned to = stage + warp() * pitch + 16 * Tile::lane();
#pragma unroll
    for (int row = 0; row < kPerWarp; ++row) {
      const bool exists = !LAST || first_key + warp() + row * kWarps < keys;
#pragma unroll
      for (int i = 0; i < kUnits; ++i) {
        if (Tile::lane() + 32 * i < units) copy_async<16>(to + 512 * i, from + 512 * i, exists ? valid[i] : 0);
      }
      from += step;
      to += kWarps * pitch;
    }
  }
};

// result[i][j] = the fragment of row tile i and column block j of a pass, whose first stage is on its way.
template <class Element, class Tile>
__device__ void multiply_values(float (&result)[Tile::kRowTiles][Tile::kOutBlocks][4], const RowArguments& args,
                                const SharedMemory<Tile>& shared, const char* second, int position) {
  ValueRows<Element, Tile> values(second, args, position, Size<Element>::kStageKeys);
  const int steps = (args.keys + Size<Element>::kStep - 1) / Size<Element>::kStep;
  const int blocks = uniform(Tile::share(args.pass_blocks));
  const unsigned stage_bytes = Size<Element>::kStageKeys * args.value_pitch;
  const int lane = Tile::lane();
  const unsigned map_address = shared.base + (Tile::tile_row(0) + lane % 16) * args.map_pitch + 16 * (lane / 16);
  const unsigned value_address =
      shared.values + (Size<Element>::kBytes == 2 ? lane : lane % 4) * args.value_pitch +
      Size<Element>::kBlockUnits * 16 * Tile::warp_column() + (Size<Element>::kBytes == 2 ? 0 : lane / 4 * 4);
  clear(result);
#pragma unroll 1
  for (int step = 0; step < steps; step += 2) {
    const unsigned stage = step / 2 % 2 * stage_bytes;
    wait_for_copies();
    __syncthreads();
    if (step + 2 < steps) values.copy(shared.values + stage_bytes - stage);
    const auto load_left = [&](unsigned(&x)[4], int second, int i) {
      load_matrices(x, map_address + 32 * step + 16 * i * args.map_pitch + 32 * second);
    };
    const auto load_right = [&](unsigned(&x)[4], int j) {
      const unsigned address = stage + value_address + Size<Element>::kBlockUnits * 16 * j * Tile::kWarpColumns;
      if constexpr (Size<Element>::kBytes == 2) {
        load_transposed_matrices(x, address);
      } else {  // ldmatrix transposes 2-byte elements only
#pragma unroll
        for (int i = 0; i < 4; ++i) x[i] = load_word(address + 4 * i * args.value_pitch);
      }
    };
    if (step + 1 < steps) {
      multiply<Element, 2>(result, blocks, load_left, load_right);
    } else {
      multiply<Element, 1>(result, blocks, load_left, load_right);
    }
  }
  __syncthreads();
}

}  // namespace bda_fused
