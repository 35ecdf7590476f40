// The two matrix products of a row tile: scores = left first^T, and result = map second. The left operand of either is
// read by all warps, from shared memory; the right one by a single warp, which loads it straight into fragments, a step
// ahead of the tensor cores.

#pragma once

#include "copy.cuh"
#include "loops.cuh"
#include "mma.cuh"
#include "tile.cuh"

namespace bda_fused {

template <int N>
__device__ void clear(float (&sums)[N][4]) {
#pragma unroll
  for (auto& fragment : sums) {
#pragma unroll
    for (float& x : fragment) x = 0.f;
  }
}

// The tile's rows of the left operand on their way into shared memory, chunk by chunk, zeros behind the last row and
// column. Of rows that lie a constant distance apart, aligned to 4 bytes, every word is copied to its place. Of others
// aligned units of 16 bytes are copied, eight lanes a row, and shifted to their place a chunk later.
template <class Element, class Tile>
struct LeftRows {
  using Shared = SharedMemory<Element, Tile>;

  const RowArguments& args;
  const Shared& shared;
  int rows, bytes;

  __device__ LeftRows(const RowArguments& args, const Shared& shared, int rows)
      : args(args), shared(shared), rows(rows), bytes(args.width * Size<Element>::kBytes) {}

  __device__ unsigned stage(unsigned chunk) const {
    return shared.map_address + args.left_offset + (chunk & args.left_mask) * Shared::kStage;
  }

  // Begins to copy a chunk, a group of asynchronous copies. Chunks behind the last are nothing.
  __device__ void copy(int chunk) const {
    if (chunk * kChunk < bytes) {
      if (args.left_unit == 0) {
        copy_words(chunk);
      } else {
        copy_rows(chunk);
      }
    }
    commit_copies();
  }

  // Puts a chunk in place, the last but one that is copied, for all threads behind the next barrier.
  __device__ void complete(int chunk) const {
    if (args.left_unit == 0 && chunk * kChunk < bytes) shift_words(chunk);
  }

 private:
  __device__ void copy_rows(int chunk) const {
    const unsigned thread = opaque(threadIdx.x), row = thread / 32, word = thread % 32;
    const int position = chunk * kChunk + 4 * word;
    const int valid = min(max(bytes - position, 0), 4);
    const std::int64_t pitch = args.left.row * Size<Element>::kBytes;
    const char* from = static_cast<const char*>(args.left.data) + shared.offsets[0].left * Size<Element>::kBytes +
                       position + row * pitch;
    const unsigned to = stage(chunk) + Shared::left_word(row, word);
    const auto copy = [&](auto is_whole) {
      unrolled<Tile::kRows / kWarps>([&](auto i) {
        const bool exists = is_whole || static_cast<int>(row) + kWarps * i < rows;
        copy_async<4, Shared::kLeftPitch * kWarps * i>(to, from, exists ? valid : 0);
        from += kWarps * pitch;
      });
    };
    rows == Tile::kRows ? copy(Number<true>()) : copy(Number<false>());
  }

  __device__ const char* begin(int row) const {
    return static_cast<const char*>(args.left.data) + shared.offsets[row].left * Size<Element>::kBytes;
  }
  __device__ unsigned word(unsigned chunk, unsigned row, unsigned unit) const {
    return shared.map_address + chunk % 2 * Shared::kWords + 16 * (9 * row + unit);
  }

  // A word is copied if it has a byte of the row.
  __device__ void copy_words(int chunk) const {
    const unsigned thread = opaque(threadIdx.x), unit = thread % 8;
#pragma unroll 1
    for (unsigned row = thread / 8; row < Tile::kRows; row += kThreads / 8) {
      const char* data = begin(row);
      const int shift = static_cast<int>(reinterpret_cast<std::uintptr_t>(data) & 15);
      const int position = chunk * kChunk + 16 * static_cast<int>(unit) - shift;
      copy_async<16>(word(chunk, row, unit), data + position, position < bytes ? 16 : 0);
      if (unit == 7) copy_async<16>(word(chunk, row, 8), data + position + 16, position + 16 < bytes ? 16 : 0);
    }
  }

  __device__ void shift_words(int chunk) const {
    const unsigned thread = opaque(threadIdx.x), unit = thread % 8;
    const int valid = bytes - chunk * kChunk - 16 * static_cast<int>(unit);
    const unsigned to = stage(chunk);
    wait_for_copies<1>();
    __syncwarp();  // a row's lanes read each other's words
#pragma unroll 1
    for (unsigned row = thread / 8; row < Tile::kRows; row += kThreads / 8) {
      const auto shift = static_cast<unsigned>(reinterpret_cast<std::uintptr_t>(begin(row)) & 15);
      uint4 x = shifted(load_shared(word(chunk, row, unit)), load_shared(word(chunk, row, unit + 1)), shift);
      if (valid < 16) x = cut(x, valid);
      const unsigned words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) store_shared(to + Shared::left_word(row, 4 * unit + i), words[i]);
    }
    __syncwarp();
  }
};

// The warp's keys. A step is 64 bytes of their rows, of which lane 4 g + t has bytes 16 t to 16 t + 15 of key g of each
// block: words 0 and 1 are the fragment of one tensor-core instruction, 2 and 3 that of a second. Which columns meet
// in an instruction does not matter, as long as they are the same on the left.
template <class Element, class Tile>
struct KeyRows {
  const char* first;  // of the first block
  const char* last;   // of the last
  std::int64_t step;  // from one block to the next
  int bytes;

  __device__ KeyRows(const char* keys, const RowArguments& args, int blocks)
      : bytes(args.width * Size<Element>::kBytes) {
    const std::int64_t pitch = args.first.row * Size<Element>::kBytes;
    const int key = 8 * warp() + Tile::lane() / 4;
    first = keys + key * pitch + 16 * (Tile::lane() % 4);
    last = first + (min(key + 8 * kWarps * (blocks - 1), args.keys - 1) - key) * pitch;  // the map masks what is behind
    step = 8 * kWarps * pitch;
  }

  __device__ bool is_whole(int position) const { return position + 64 <= bytes; }
  __device__ int valid(int position) const { return bytes - position - 16 * (Tile::lane() % 4); }

  // The step at a position in the rows, in bytes. What is loaded has a byte of the row.
  template <int BLOCKS>
  __device__ void load(uint4 (&words)[Tile::kKeyBlocks], int position) const {
    const char* from = first + position;
#pragma unroll
    for (int j = 0; j < BLOCKS; ++j, from += step) {
      const char* row = j + 1 < BLOCKS ? from : last + position;
      words[j] = is_whole(position) ? load_global<0>(row) : load_global_if(valid(position) > 0, row);
    }
  }

  // Zeros behind the last column.
  template <int BLOCKS>
  __device__ void cut_last(uint4 (&words)[Tile::kKeyBlocks], int position) const {
    if (is_whole(position)) return;
#pragma unroll
    for (int j = 0; j < BLOCKS; ++j) words[j] = cut(words[j], valid(position));
  }
};

// One step of the first BLOCKS column blocks. ``address``: what ldmatrix takes, row lane % 8 of matrix lane / 8 of 16
// rows by two units.
template <class Element, class Tile, int BLOCKS>
__device__ void multiply_step(float (&scores)[Tile::kRowTiles][Tile::kKeyBlocks][4],
                              const uint4 (&words)[Tile::kKeyBlocks], unsigned address) {
  using Right = typename Element::template Fragment<2>;
  // Fragments of one instruction, or of both where they are the words themselves.
  constexpr int kHalves = sizeof(Right) == 8 ? 2 : 1;
#pragma unroll
  for (int first = 0; first < 2; first += kHalves) {
    Right right[kHalves][Tile::kKeyBlocks];
    if (kHalves == 1) __syncwarp();  // nothing is moved across: fragments of all steps would not fit the registers
#pragma unroll
    for (int j = 0; j < BLOCKS; ++j) {
      const unsigned x[4] = {words[j].x, words[j].y, words[j].z, words[j].w};
#pragma unroll
      for (int half = 0; half < kHalves; ++half) right[half][j] = Element::template prepare<2>(x + 2 * (first + half));
    }
    unrolled<Tile::kRowTiles>([&](auto i) {
      unrolled<kHalves>([&](auto half) {
        unsigned x[4];
        load_matrices<16 * SharedMemory<Element, Tile>::kLeftPitch * i + 32 * half>(x, address + 32 * first);
        const auto left = Element::template prepare<4>(x);
#pragma unroll
        for (int j = 0; j < BLOCKS; ++j) Element::multiply(scores[i][j], left, right[half][j]);
      });
      if (kHalves == 1) __syncwarp();
    });
  }
}

// Of all threads of the block: a __syncthreads() in which warps may meet from different places in the code.
__device__ inline void meet() { asm volatile("bar.sync 0;" ::: "memory"); }

// The scores of a warp that has BLOCKS column blocks. The first chunks of the left rows are on their way.
template <class Element, class Tile, int BLOCKS>
__device__ void multiply_blocks(float (&scores)[Tile::kRowTiles][Tile::kKeyBlocks][4], const RowArguments& args,
                                const LeftRows<Element, Tile>& left, const char* keys) {
  const KeyRows<Element, Tile> right(keys, args, BLOCKS);
  // A step ahead, unless fragments take more registers than words.
  constexpr bool kAhead = sizeof(typename Element::template Fragment<2>) == 8;
  uint4 words[kAhead ? 2 : 1][Tile::kKeyBlocks];
  if (kAhead) right.template load<BLOCKS>(words[0], 0);
#pragma unroll 1
  for (int chunk = 0; chunk * kChunk < right.bytes; ++chunk) {
    wait_for_copies<2>();
    meet();
    left.complete(chunk + 1);
    left.copy(chunk + 3);
    const unsigned lane = opaque(threadIdx.x) % 32;
    const unsigned address = left.stage(chunk) + lane % 16 * left.shared.kLeftPitch + lane / 16 * 16;
#pragma unroll(kAhead ? 2 : 1)
    for (int half = 0; half < 2; ++half) {
      const int position = chunk * kChunk + 64 * half;
      if (position >= right.bytes) break;
      right.template load<BLOCKS>(words[kAhead ? 1 - half : 0], kAhead ? position + 64 : position);
      auto& now = words[kAhead ? half : 0];
      right.template cut_last<BLOCKS>(now, position);
      if constexpr (BLOCKS > 0) {
        multiply_step<Element, Tile, BLOCKS>(scores, now, address + half * left.shared.kPlane);
      }
    }
  }
}

// scores[i][j] = the fragment of row tile i and column block j, zero where the block lies behind the keys.
template <class Element, class Tile>
__device__ void multiply_scores(float (&scores)[Tile::kRowTiles][Tile::kKeyBlocks][4], const RowArguments& args,
                                const SharedMemory<Element, Tile>& shared, int rows, const char* keys) {
  const LeftRows<Element, Tile> left(args, shared, rows);
#pragma unroll 1
  for (int chunk = 0; chunk < 3; ++chunk) {
    left.copy(chunk);
    if (chunk == 1) left.complete(0);
  }
#pragma unroll
  for (auto& row_tile : scores) clear(row_tile);
  with_count<Tile::kKeyBlocks>(uniform(Tile::share((args.keys + 7) / 8)), [&](auto n) {
    multiply_blocks<Element, Tile, n>(scores, args, left, keys);
  });
  __syncthreads();
}

// The warp's columns of the values. A step is the keys of one tensor-core instruction. A lane has one word of a unit of
// each of its keys: with elements of two bytes those are two columns, and fragments of two blocks, of which one takes
// the even columns and one the odd.
template <class Element, class Tile>
struct ValueRows {
  static constexpr int kKeys = Size<Element>::kBytes == 2 ? 4 : 2;  // of a step, for each lane

  const char* from;    // the lane's first key of the next step
  std::int64_t pitch;
  int rest;            // keys of the next step and behind it

  // position: of the pass in a row, in bytes.
  __device__ ValueRows(const char* values, const RowArguments& args, int position)
      : from(values + first_key() * args.second.row * Size<Element>::kBytes + position +
             opaque(threadIdx.x) / 4 * 4),  // 32 bytes a warp, 4 a key of the fragment
        pitch(args.second.row * Size<Element>::kBytes),
        rest(args.keys) {}

  // The lane's keys of a step, as in a fragment of the map: the first, and how far behind it the others are.
  __device__ static int first_key() { return Tile::lane() % 4 * (kKeys / 2); }
  __device__ static constexpr int distance(int i) { return kKeys == 4 ? i / 2 * 8 + i % 2 : 4 * i; }

  // The next step; where it is not WHOLE, zeros behind the last key.
  template <int UNITS, bool WHOLE>
  __device__ void load(unsigned (&words)[Tile::kUnits][kKeys]) {
    const int own_rest = rest - first_key();
#pragma unroll
    for (int i = 0; i < kKeys; ++i) {
      const char* row = from + distance(i) * pitch;
      const bool exists = WHOLE || distance(i) < own_rest;
      unrolled<UNITS>([&](auto j) { words[j][i] = exists ? load_global_word<32 * kWarps * j>(row) : 0; });
    }
    from += Size<Element>::kStep * pitch;
    skip();
  }
  __device__ void skip() { rest -= Size<Element>::kStep; }

  // The fragment of a block of a unit.
  template <int BLOCK>
  __device__ static typename Element::template Fragment<2> fragment(const unsigned (&words)[kKeys]) {
    if constexpr (kKeys == 2) {
      return Element::template prepare<2>(words);
    } else {
      constexpr int kHalves = BLOCK == 0 ? 0x5410 : 0x7632;
      const unsigned x[2] = {permuted<kHalves>(words[0], words[1]), permuted<kHalves>(words[2], words[3])};
      return Element::template prepare<2>(x);
    }
  }
};

// The values' fragments of a step: of UNITS units.
template <class Element, class Tile, int UNITS>
struct ValueFragments {
  static constexpr int kBlocks = Size<Element>::kUnitBlocks;
  typename Element::template Fragment<2> x[UNITS][kBlocks];

  template <int KEYS>
  __device__ explicit ValueFragments(const unsigned (&words)[Tile::kUnits][KEYS]) {
#pragma unroll
    for (int j = 0; j < UNITS; ++j) {
      unrolled<kBlocks>([&](auto b) { x[j][b] = ValueRows<Element, Tile>::template fragment<b>(words[j]); });
    }
  }

  // result += the map's columns from ``address`` on times these; HALF: of the first half of the keys.
  template <bool HALF>
  __device__ void multiply(Result<Element, Tile>& result, unsigned address) const {
    unrolled<Tile::kRowTiles>([&](auto i) {
      unsigned words[4];
      load_matrices<16 * i * SharedMemory<Element, Tile>::kMapPitch>(words, address);
      const auto left = Element::template prepare<4>(words);
#pragma unroll
      for (int j = 0; j < UNITS; ++j) {
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) {
          if constexpr (HALF) {
            Element::multiply_half(result[i][j][b], left, x[j][b]);
          } else {
            Element::multiply(result[i][j][b], left, x[j][b]);
          }
        }
      }
    });
  }
};

// result = the map times the values' columns of a pass, of which the warp has UNITS units.
template <class Element, class Tile, int UNITS>
__device__ void multiply_units(Result<Element, Tile>& result, const RowArguments& args,
                               const SharedMemory<Element, Tile>& shared, const char* values, int position) {
  constexpr int kStep = Size<Element>::kStep;
  constexpr int kAhead = Tile::kRowTiles > 4 ? 1 : 2;  // steps on their way: long ones hide a load by themselves
  constexpr int kOnTheirWay = kAhead * kStep;  // keys, which are to be multiplied beside the rest
  using Fragments = ValueFragments<Element, Tile, UNITS>;
  ValueRows<Element, Tile> rows(values, args, position);
  unsigned words[kAhead][Tile::kUnits][ValueRows<Element, Tile>::kKeys];
#pragma unroll
  for (auto& step : words) rows.template load<UNITS, false>(step);
#pragma unroll
  for (auto& row_tile : result) {
#pragma unroll
    for (auto& unit : row_tile) clear(unit);
  }
  // ldmatrix takes the address of row lane % 8 of matrix lane / 8: 16 rows by 2 units of 16 bytes.
  const unsigned lane = opaque(threadIdx.x) % 32;
  unsigned address = shared.map_address + lane % 16 * shared.kMapPitch + 16 * (lane / 16);
#pragma unroll 1
  while (rows.rest >= kOnTheirWay) {
#pragma unroll
    for (auto& step : words) {
      const Fragments right(step);
      rows.template load<UNITS, true>(step);
      right.template multiply<false>(result, address);
      address += 32;
    }
  }
#pragma unroll 1
  while (rows.rest > -kOnTheirWay) {
#pragma unroll
    for (auto& step : words) {
      if (rows.rest <= -kOnTheirWay) break;
      const bool half = Size<Element>::kBytes == 2 && rows.rest <= kStep / 2 - kOnTheirWay;
      const Fragments right(step);
      rows.rest > 0 ? rows.template load<UNITS, false>(step) : rows.skip();
      if (half) {
        right.template multiply<Size<Element>::kBytes == 2>(result, address);
      } else {
        right.template multiply<false>(result, address);
      }
      address += 32;
    }
  }
}

// result[i][j] = the fragments of row tile i and unit j of a pass over ``units`` units.
template <class Element, class Tile>
__device__ void multiply_values(Result<Element, Tile>& result, const RowArguments& args,
                                const SharedMemory<Element, Tile>& shared, const char* values, int position,
                                int units) {
  with_count<Tile::kUnits>(uniform(Tile::share(units)), [&](auto n) {
    if constexpr (n > 0) multiply_units<Element, Tile, n>(result, args, shared, values, position);
  });
}

}  // namespace bda_fused
