// A tile of left^T right, or of left right, summed over rows and images: a pipeline of two stages of 128 bytes of depth.

#pragma once

#include "copy.cuh"
#include "mma.cuh"
#include "pairs.cuh"
#include "tile.cuh"

namespace bda_fused {

enum class Form { keys, queries };  // left (depth, rows), or (rows, depth)

// Eight warps in two rows and four columns. A warp has up to kRowTiles tiles of 16 rows by kBlocks blocks of 8 columns,
// as many as its neighbours or one fewer.
template <class ELEMENT, Form FORM>
struct ProductTile {
  using Element = ELEMENT;
  using Storage = typename Element::Storage;
  static constexpr bool kTransposed = FORM == Form::keys;
  static constexpr int kBytes = sizeof(Storage);
  static constexpr int kRowTiles = kBytes == 2 ? 5 : 4, kBlocks = kBytes == 2 ? 6 : 4;
  static constexpr int kRows = 2 * 16 * kRowTiles, kColumns = 4 * 8 * kBlocks;
  static constexpr int kDepth = kChunk / kBytes;  // of a stage
  static constexpr int kStep = 32 / kBytes;       // of a tensor-core instruction

  // Rows of a stage, in 16-byte units: ldmatrix reads eight of them, an odd number of units apart; words of four bytes
  // are read from four of them, which must lie eight banks apart.
  static constexpr int pitch(int bytes) { return bytes + (kBytes == 2 ? 16 : 32); }
  static constexpr int kRightPitch = pitch(kColumns * kBytes);
  static constexpr int kLeftPitch = kTransposed ? pitch(kRows * kBytes) : kChunk + 16;
  static constexpr int kRightBytes = kDepth * kRightPitch;
  static constexpr int kLeftBytes = (kTransposed ? kDepth : kRows) * kLeftPitch;
  static constexpr int kStageBytes = kLeftBytes + kRightBytes;
  static constexpr int kSlicePitch = kColumns + 8;  // of float32 results: neighbouring rows eight banks apart
};

// Rows of an operand on their way into a stage: ROWS of them, in chunks of 128 bytes, each by eight lanes.
template <int ROWS, int CHUNKS, int PITCH>
struct Slab {
  static_assert(ROWS % 32 == 0, "256 threads are 32 rows of eight lanes");
  static constexpr int kPieces = ROWS / 32 * CHUNKS;  // of 128 bytes, of each thread
  static constexpr int kHalf = (kPieces + 1) / 2;

  const char* data;
  std::int64_t step;       // from row to row, in bytes
  int rows, bytes;         // that exist
  int all_rows, all_units; // that are filled: with zeros behind those that exist
  ShiftedWord loaded[kHalf];

  __device__ static int row(int piece) { return threadIdx.x / 8 + piece % (ROWS / 32) * 32; }
  __device__ static int unit(int piece) { return threadIdx.x % 8 + piece / (ROWS / 32) * 8; }
  __device__ bool has(int piece) const { return row(piece) < all_rows && unit(piece) < all_units; }
  __device__ int valid(int row, int byte) const { return row < rows ? bytes - byte : -16; }

  // Past the registers, where all rows are aligned to UNIT bytes.
  template <int UNIT>
  __device__ void copy(unsigned stage) const {
    rows >= ROWS ? copy<UNIT, true>(stage) : copy<UNIT, false>(stage);
  }

  template <int UNIT, bool FULL>
  __device__ void copy(unsigned stage) const {
    constexpr int kLanes = UNIT == 16 ? 8 : 32, kStep = kThreads / kLanes;  // lanes of a row, rows at a time
    const int first = threadIdx.x / kLanes, byte = UNIT * (threadIdx.x % kLanes);
    int valid[CHUNKS];
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) valid[i] = min(max(bytes - byte - i * kChunk, 0), UNIT);
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) {
      if (byte + i * kChunk >= 16 * all_units) break;
      const char* from = data + first * step + byte + i * kChunk;
      const unsigned to = stage + first * PITCH + byte + i * kChunk;
#pragma unroll
      for (int row = 0; row < ROWS; row += kStep) {
        if (FULL || first + row < all_rows) copy_async<UNIT>(to + row * PITCH, from, FULL || first + row < rows ? valid[i] : 0);
        from += kStep * step;
      }
    }
  }

  // Through the registers, of any alignment, in two halves.
  __device__ void load(int half) {
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const int piece = half * kHalf + i;
      if (piece < kPieces) {
        const int byte = 16 * unit(piece);
        const bool wanted = row(piece) < all_rows && unit(piece) <= all_units;  // the last unit's end lies in the next
        loaded[i] = load_shifted(data + row(piece) * step + byte, wanted ? valid(row(piece), byte) : -16);
      }
    }
  }

  // All of a thread's pieces are shifted alike: 32 rows, and a stage of them, are a multiple of 16 bytes.
  __device__ void store(int half, unsigned stage) const {
    const auto shift = static_cast<unsigned>(reinterpret_cast<std::uintptr_t>(data + row(0) * step) & 15);
    const bool whole = rows >= all_rows && bytes >= 16 * all_units;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const int piece = half * kHalf + i;
      if (piece < kPieces) {
        const int byte = 16 * unit(piece);
        uint4 x = join(loaded[i], shift);
        if (!whole) x = cut(x, valid(row(piece), byte));
        if (has(piece)) store_shared(stage + row(piece) * PITCH + byte, x);
      }
    }
  }
};

// A block's place in a product, and its way through the steps of its split: terms, images, and chunks of depth.
template <class Tile>
struct Walk {
  using Left = Slab<Tile::kTransposed ? Tile::kDepth : Tile::kRows,
                    Tile::kTransposed ? (Tile::kRows * Tile::kBytes + kChunk - 1) / kChunk : 1, Tile::kLeftPitch>;
  using Right = Slab<Tile::kDepth, (Tile::kColumns * Tile::kBytes + kChunk - 1) / kChunk, Tile::kRightPitch>;

  const Product& product;
  int first_row, first_column, rows, blocks;  // of the tile; rows: a multiple of 16
  int split, group;
  int steps;                                  // from here to the end of the split
  int term, batch, head, chunk;

  __device__ Walk(const Product& product, int block) : product(product) {
    const int tiles = product.row_tiles * product.column_tiles;
    const int tile = block % tiles;
    first_column = tile % product.column_tiles * product.tile_blocks * 8;
    first_row = tile / product.column_tiles * product.tile_rows;
    rows = min(product.tile_rows, round_up(product.rows - first_row, 16));
    blocks = min(product.tile_blocks, (product.columns - first_column + 7) / 8);
    split = block / tiles % product.splits;
    group = block / tiles / product.splits;
    const int chunks = (product.depth + Tile::kDepth - 1) / Tile::kDepth;
    const std::int64_t all = std::int64_t{product.terms} * product.sum_batches * product.sum_heads * chunks;
    const auto begin = static_cast<int>(all * split / product.splits);
    steps = static_cast<int>(all * (split + 1) / product.splits) - begin;
    chunk = begin % chunks;
    head = begin / chunks % product.sum_heads;
    batch = begin / chunks / product.sum_heads % product.sum_batches;
    term = begin / chunks / product.sum_heads / product.sum_batches;
  }

  // To the next step. Most are the next chunk of the same rows.
  __device__ void advance(Left& left, Right& right) {
    --steps;
    if (++chunk * Tile::kDepth < product.depth) {
      left.data += Tile::kTransposed ? Tile::kDepth * left.step : kChunk;
      (Tile::kTransposed ? left.rows : left.bytes) -= Tile::kTransposed ? Tile::kDepth : kChunk;
      right.data += Tile::kDepth * right.step;
      right.rows -= Tile::kDepth;
      return;
    }
    next_image();
    if (steps > 0) {
      left = this->left();
      right = this->right();
    }
  }

  __device__ void next_image() {
    chunk = 0;
    if (++head < product.sum_heads) return;
    head = 0;
    if (++batch < product.sum_batches) return;
    batch = 0;
    ++term;
  }

  // What is left of the summed rows.
  __device__ int depth() const { return product.depth - chunk * Tile::kDepth; }

  __device__ const char* image(const Rows& operand) const {
    const int b = group / product.group_heads + batch, h = group % product.group_heads + head;
    return static_cast<const char*>(operand.data) + (b * operand.batch + h * operand.head) * Tile::kBytes;
  }

  __device__ Left left() const {
    const Rows& operand = product.left[term];
    const std::int64_t step = operand.row * Tile::kBytes;
    if constexpr (Tile::kTransposed) {
      return {image(operand) + chunk * Tile::kDepth * step + first_row * Tile::kBytes, step, depth(),
              (product.rows - first_row) * Tile::kBytes, Tile::kDepth, rows * Tile::kBytes / 16};
    } else {
      return {image(operand) + first_row * step + chunk * kChunk, step, product.rows - first_row,
              depth() * Tile::kBytes, rows, kChunk / 16};
    }
  }

  __device__ Right right() const {
    const Rows& operand = product.right[term];
    const std::int64_t step = operand.row * Tile::kBytes;
    return {image(operand) + chunk * Tile::kDepth * step + first_column * Tile::kBytes, step, depth(),
            (product.columns - first_column) * Tile::kBytes, Tile::kDepth, blocks * Tile::kBytes / 2};
  }
};

// The row tiles of a row of warps, of ``all``.
struct RowShare {
  int first, count;
  __device__ RowShare(int all, int warp_row)
      : first(warp_row == 0 ? 0 : (all + 1) / 2), count(warp_row == 0 ? (all + 1) / 2 : all / 2) {}
};

// What a warp has of a tile: row tiles and column blocks, the first of each and how many.
struct WarpShare {
  int row_tile, row_tiles, block, blocks;

  __device__ WarpShare(int tile_rows, int tile_blocks) {
    const RowShare rows(tile_rows / 16, warp() / 4);
    const int column = warp() % 4;
    row_tile = rows.first;
    row_tiles = uniform(rows.count);
    block = column * tile_blocks / 4;
    blocks = uniform((column + 1) * tile_blocks / 4 - block);
  }
};

// Fragments of one step of depth from a stage: the addresses of this lane.
template <class Tile>
struct Fragments {
  static constexpr int kPairs = (Tile::kBlocks + 1) / 2;
  unsigned left, right[kPairs];

  // right: one address for each pair of blocks. Of a pair whose second block the warp has not, the first is read twice.
  __device__ Fragments(unsigned stage, const WarpShare& share) {
    const int lane = threadIdx.x % 32, row = 16 * share.row_tile;
    if constexpr (!Tile::kTransposed) {
      left = stage + (row + lane % 16) * Tile::kLeftPitch + 16 * (lane / 16);
    } else if constexpr (Tile::kBytes == 2) {
      left = stage + (lane % 8 + lane / 16 * 8) * Tile::kLeftPitch + 2 * row + lane / 8 % 2 * 16;
    } else {
      left = stage + lane % 4 * Tile::kLeftPitch + 4 * (row + lane / 4);
    }
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      const unsigned block = share.block + min(2 * pair + (Tile::kBytes == 2 ? lane / 16 : 0), share.blocks - 1);
      right[pair] = stage + Tile::kLeftBytes +
                    (Tile::kBytes == 2 ? lane % 16 * Tile::kRightPitch + 16 * block
                                       : lane % 4 * Tile::kRightPitch + 4 * (8 * block + lane / 4));
    }
  }

  // ``offset``: of the stage.
  __device__ void load_left(unsigned (&x)[4], unsigned offset, int step, int i) const {
    if constexpr (!Tile::kTransposed) {
      load_matrices(x, left + offset + 16 * i * Tile::kLeftPitch + 32 * step);
      return;
    }
    const unsigned address = left + offset + step * Tile::kStep * Tile::kLeftPitch + 16 * i * Tile::kBytes;
    if constexpr (Tile::kBytes == 2) {
      load_transposed_matrices(x, address);
    } else {  // ldmatrix transposes 2-byte elements only
#pragma unroll
      for (int e = 0; e < 4; ++e) x[e] = load_word(address + e / 2 * 4 * Tile::kLeftPitch + e % 2 * 32);
    }
  }

  // The right fragments of both blocks of a pair.
  __device__ void load_right(unsigned (&x)[4], unsigned offset, int step, int pair, bool second) const {
    const unsigned address = right[pair] + offset + step * Tile::kStep * Tile::kRightPitch;
    if constexpr (Tile::kBytes == 2) {
      load_transposed_matrices(x, address);
    } else {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        x[e] = load_word(address + e % 2 * 4 * Tile::kRightPitch + (e < 2 || !second ? 0 : 32));
      }
    }
  }
};

// Adds one step of depth. FULL: the warp has all column blocks, or all but the last: one question a row tile.
template <bool FULL, class Tile>
__device__ void multiply_step(float (&sums)[Tile::kRowTiles][Tile::kBlocks][4], const Fragments<Tile>& fragments,
                              const WarpShare& share, unsigned offset, int step) {
  using Element = typename Tile::Element;
  const auto has = [&](int block) {
    return FULL ? block < Tile::kBlocks - 1 || share.blocks == Tile::kBlocks : block < share.blocks;
  };
  typename Element::template Fragment<2> right[2 * Fragments<Tile>::kPairs];
#pragma unroll
  for (int pair = 0; pair < Fragments<Tile>::kPairs; ++pair) {
    if (!has(2 * pair)) continue;
    unsigned x[4];
    fragments.load_right(x, offset, step, pair, has(2 * pair + 1));
    right[2 * pair] = Element::template prepare<2>(x);
    right[2 * pair + 1] = Element::template prepare<2>(x + 2);
  }
#pragma unroll
  for (int i = 0; i < Tile::kRowTiles; ++i) {
    if (i >= share.row_tiles) break;
    unsigned x[4];
    fragments.load_left(x, offset, step, i);
    const auto left = Element::template prepare<4>(x);
#pragma unroll
    for (int j = 0; j < Tile::kBlocks; ++j) {
      if (has(j)) Element::multiply(sums[i][j], left, right[j]);
    }
  }
}

// A warp rounds ``size`` floats of shared memory, at most LONGEST, to a row of any alignment.
template <int LONGEST, class T>
__device__ void store_rounded(T* to, const float* from, int size) {
  const int odd = is_pair_aligned(to) ? 0 : 1, lane = threadIdx.x % 32;
  const int first = 2 * lane + odd;
#pragma unroll
  for (int i = 0; i < LONGEST; i += 64) {
    if (first + i + 1 < size) {
      *reinterpret_cast<typename Pair<T>::Type*>(to + first + i) = Pair<T>::round(from[first + i], from[first + i + 1]);
    }
  }
  if (odd && lane == 0) to[0] = Pair<T>::round(from[0]);
  if ((size - odd) % 2 && lane == 31) to[size - 1] = Pair<T>::round(from[size - 1]);
}

// The tile, a row tile of every warp at a time, through shared memory to rows of the result.
template <class Tile>
__device__ void store_tile(const float (&sums)[Tile::kRowTiles][Tile::kBlocks][4], const Walk<Tile>& walk,
                           const WarpShare& share, char* memory) {
  using T = typename Tile::Storage;
  const Product& product = walk.product;
  auto* slice = reinterpret_cast<float*>(memory);
  const int lane = threadIdx.x % 32;
  const int columns = min(8 * walk.blocks, product.columns - walk.first_column);
  const std::int64_t first = (std::int64_t{walk.split} * product.groups + walk.group) * product.rows;
#pragma unroll 1
  for (int row_tile = 0; row_tile < Tile::kRowTiles; ++row_tile) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < Tile::kRowTiles; ++i) {
      if (i != row_tile || i >= share.row_tiles) continue;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = warp() / 4 * 16 + 8 * half + lane / 4;
        float* to = slice + row * Tile::kSlicePitch + 8 * share.block + lane % 4 * 2;
#pragma unroll
        for (int j = 0; j < Tile::kBlocks; ++j) {
          if (j < share.blocks) {
            *reinterpret_cast<float2*>(to + 8 * j) = {sums[i][j][2 * half], sums[i][j][2 * half + 1]};
          }
        }
      }
    }
    __syncthreads();
    for (int index = warp(); index < 32; index += kWarps) {
      const RowShare tiles(walk.rows / 16, index / 16);
      const int row = walk.first_row + 16 * (tiles.first + row_tile) + index % 16;
      if (row_tile >= tiles.count || row >= product.rows) continue;
      const std::int64_t at = (first + row) * product.columns + walk.first_column;
      const float* from = slice + index * Tile::kSlicePitch;
      if (product.out_kind == kFloat32) {
        store_rounded<Tile::kColumns>(static_cast<float*>(product.out) + at, from, columns);
      } else {
        store_rounded<Tile::kColumns>(static_cast<T*>(product.out) + at, from, columns);
      }
    }
  }
}

// One block's tile of a product. While the tensor cores work on a stage, the other is filled: by asynchronous copies,
// or through registers in two halves, loaded before a half of the stage's steps and stored behind it.
template <class Tile>
__device__ void summed_product(const Product& product, int block) {
  extern __shared__ __align__(128) char memory[];
  const auto base = static_cast<unsigned>(__cvta_generic_to_shared(memory));
  Walk<Tile> walk(product, block);
  const WarpShare share(walk.rows, walk.blocks);
  const Fragments<Tile> fragments(base, share);
  typename Walk<Tile>::Left left = walk.left();
  typename Walk<Tile>::Right right = walk.right();
  const auto copy = [&](unsigned offset) {
    const unsigned to = base + offset;
    if (product.left_unit == 16) left.template copy<16>(to);
    if (product.left_unit == 4) left.template copy<4>(to);
    if (product.right_unit == 16) right.template copy<16>(to + Tile::kLeftBytes);
    if (product.right_unit == 4) right.template copy<4>(to + Tile::kLeftBytes);
    commit_copies();
  };
  const auto load = [&](int half) {
    if (product.left_unit == 0) left.load(half);
    if (product.right_unit == 0) right.load(half);
  };
  const auto store = [&](int half, unsigned offset) {
    if (product.left_unit == 0) left.store(half, base + offset);
    if (product.right_unit == 0) right.store(half, base + offset + Tile::kLeftBytes);
  };

  float sums[Tile::kRowTiles][Tile::kBlocks][4];
#pragma unroll
  for (auto& row : sums) {
#pragma unroll
    for (auto& fragment : row) {
#pragma unroll
      for (float& x : fragment) x = 0.f;
    }
  }
  copy(0);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    load(half);
    store(half, 0);
  }
  unsigned offset = 0;
#pragma unroll 1
  while (true) {
    const int steps = min((walk.depth() + Tile::kStep - 1) / Tile::kStep, kChunk / 32);
    const unsigned next = Tile::kStageBytes - offset;
    wait_for_copies();
    __syncthreads();
    walk.advance(left, right);
    const bool more = walk.steps > 0;
    if (more) copy(next);
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      if (more) load(half);
      for (int step = 2 * half; step < min(steps, 2 * half + 2); ++step) {
        if (share.blocks >= Tile::kBlocks - 1) {
          multiply_step<true, Tile>(sums, fragments, share, offset, step);
        } else {
          multiply_step<false, Tile>(sums, fragments, share, offset, step);
        }
      }
      if (more) store(half, next);
    }
    if (!more) break;
    offset = next;
  }
  store_tile<Tile>(sums, walk, share, memory);
}

}  // namespace bda_fused
