// From fragments of the result to its rows in global memory: out = added + factor * result.

#pragma once

#include "copy.cuh"
#include "loops.cuh"
#include "pairs.cuh"
#include "tile.cuh"

namespace bda_fused {

// How many elements ``pointer`` lies behind a 16-byte boundary.
template <class T>
__device__ int phase(const T* pointer) {
  return static_cast<int>(reinterpret_cast<std::uintptr_t>(pointer) % 16 / sizeof(T));
}

// 16 bytes as float32, and back.
template <class T>
struct Vector {
  static constexpr int kSize = 16 / sizeof(T);
  float x[kSize];

  __device__ static Vector widened(uint4 raw) {
    typename Pair<T>::Type pairs[kSize / 2];
    memcpy(pairs, &raw, 16);
    Vector vector;
#pragma unroll
    for (int i = 0; i < kSize / 2; ++i) {
      const float2 pair = widen(pairs[i]);
      vector.x[2 * i] = pair.x;
      vector.x[2 * i + 1] = pair.y;
    }
    return vector;
  }
  __device__ uint4 rounded() const {
    typename Pair<T>::Type pairs[kSize / 2];
#pragma unroll
    for (int i = 0; i < kSize / 2; ++i) pairs[i] = Pair<T>::round(x[2 * i], x[2 * i + 1]);
    uint4 raw;
    memcpy(&raw, pairs, 16);
    return raw;
  }
};

// added + factor * the vector at ``slice``, rounded.
template <class T>
__device__ uint4 sum(uint4 added, const float* slice, float factor) {
  Vector<T> y = Vector<T>::widened(added);
#pragma unroll
  for (int k = 0; k < Vector<T>::kSize; k += 4) {
    const float4 x = *reinterpret_cast<const float4*>(slice + k);
    y.x[k] = fmaf(x.x, factor, y.x[k]);
    y.x[k + 1] = fmaf(x.y, factor, y.x[k + 1]);
    y.x[k + 2] = fmaf(x.z, factor, y.x[k + 2]);
    y.x[k + 3] = fmaf(x.w, factor, y.x[k + 3]);
  }
  return y.rounded();
}

// out[i] = added[i] + factor * slice[i] for i < size, by ``threads`` >= 2 kSize threads, of which this is ``index``.
// slice lies as far behind a multiple of the vector's size as out does. added: of any kind and alignment.
template <class T>
__device__ void store_run(T* out, const void* added, Kind kind, const float* slice, int size, float factor, int index,
                          int threads) {
  constexpr int kSize = Vector<T>::kSize;
  const auto store_element = [&](int i, float with) { out[i] = Pair<T>::round(fmaf(slice[i], factor, with)); };
  // Whole vectors are [begin, end). Before and behind them are fewer than kSize elements: one a thread.
  const int begin = min(-phase(out) & (kSize - 1), size), end = size - ((size - begin) & (kSize - 1));
  const auto store = [&](auto load_one, auto load_vector) {
    if (index < 2 * kSize) {
      const int edge = index >= kSize ? end + index - kSize : index < begin ? index : size;
      if (edge < size) store_element(edge, load_one(edge));
    }
#pragma unroll 1
    for (int i = begin + index * kSize; i < end; i += threads * kSize) {
      store_global(out + i, sum<T>(load_vector(i), slice + i, factor));
    }
  };
  const T* typed = static_cast<const T*>(added);
  const unsigned shift = reinterpret_cast<std::uintptr_t>(typed + begin) % 16;
  const auto one = [=](int i) { return widen(typed[i]); };
  if (kind == Pair<T>::kKind && shift == 0) {
    store(one, [=](int i) { return *reinterpret_cast<const uint4*>(typed + i); });
  } else if (kind == Pair<T>::kKind) {
    store(one, [=](int i) {
      const auto* words = reinterpret_cast<const uint4*>(reinterpret_cast<const char*>(typed + i) - shift);
      return shifted(words[0], words[1], shift);
    });
  } else if (kind == kNone || kind == kLeft) {
    store([](int) { return 0.f; }, [](int) { return uint4(); });
  } else {
    for (int i = index; i < size; i += threads) store_element(i, load_element(added, kind, i));
  }
}

// result = left + factor * result, of left rows that have stayed on chip. position: of the pass in a row, in bytes.
template <class Element, class Tile>
__device__ void add_left_rows(Result<Element, Tile>& result, const SharedMemory<Element, Tile>& shared, int position,
                              int units, float factor) {
  using Shared = SharedMemory<Element, Tile>;
  constexpr int kBlocks = Size<Element>::kUnitBlocks, kColumns = 2 * kBlocks;
  const unsigned lane = opaque(threadIdx.x) % 32;
  const int first = position + 32 * warp();  // of the warp's units
  const char* from = shared.map + Shared::kStaying + first / kChunk * Shared::kStage +
                     Shared::left_word(lane / 4, first % kChunk / 4 + 2 * (lane % 4));
  const int count = Tile::share(units);
#pragma unroll
  for (int j = 0; j < Tile::kUnits; ++j) {
    if (j >= count) break;
#pragma unroll
    for (int row = 0; row < Tile::kRows; row += 8) {
      // Two neighbouring words, of which the first is even, lie a unit of 16 bytes apart.
      const char* at = from + 32 * kWarps / kChunk * Shared::kStage * j + Shared::kLeftPitch * row;
      const unsigned words[2] = {*reinterpret_cast<const unsigned*>(at), *reinterpret_cast<const unsigned*>(at + 16)};
      typename Element::Storage left[kColumns];
      memcpy(left, words, 8);
#pragma unroll
      for (int k = 0; k < kColumns; ++k) {
        float& x = result[row / 16][j][k % kBlocks][row % 16 / 8 * 2 + k / kBlocks];
        x = fmaf(x, factor, widen(left[k]));
      }
    }
  }
}

// A lane's neighbouring columns of a row to a slice, in the widest stores that ``step``, of which the address is a
// multiple, allows.
template <int N>
__device__ void store_slice(float* to, const float (&x)[N], int step) {
  if (N == 4 && step % 4 == 0) {
    *reinterpret_cast<float4*>(to) = {x[0], x[1], x[N - 2], x[N - 1]};
  } else if (step % 2 == 0) {
#pragma unroll
    for (int i = 0; i < N; i += 2) *reinterpret_cast<float2*>(to + i) = {x[i], x[i + 1]};
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = x[i];
  }
}

// The fragments of a pass over ``units`` units from first_column on, 16 rows at a time through shared memory. Rows that
// follow one another without a gap leave as one run, whatever their length.
template <class T, class Element, class Tile>
__device__ void store_rows(const Result<Element, Tile>& result, const RowArguments& args,
                           const SharedMemory<Element, Tile>& shared, int rows, int first_column, int units,
                           float factor) {
  constexpr int kBlocks = Size<Element>::kUnitBlocks, kColumns = 2 * kBlocks;  // of a lane in a unit
  constexpr int kRowThreads = kThreads / 16;  // that store one of the 16 rows
  const int size = min(units * Size<Element>::kUnitColumns, args.out_width - first_column);
  const bool one_run = args.consecutive && size == args.out_width;
  const int pitch = one_run ? size : shared.kSlicePitch;
  const int added_bytes = args.added_kind == kFloat32 ? 4 : 2;
  const auto out = [&](int row) {
    return static_cast<T*>(args.out) + shared.offsets[row].flat * args.out_width + first_column;
  };
  const auto added = [&](int row) {
    return static_cast<const char*>(args.added.data) + (shared.offsets[row].added + first_column) * added_bytes;
  };
  const int run_before = phase(out(0));  // 16 rows further it is the same
  const int thread = opaque(threadIdx.x);
#pragma unroll 1
  for (int row_tile = 0; 16 * row_tile < rows; ++row_tile) {
    // The row's place is computed anew: kept, it would take registers that the compiler does not have everywhere.
    const int row_in_half = static_cast<int>(opaque(thread) % 32 / 4), column_in_unit = kColumns * (thread % 4);
    const int first_row = 16 * row_tile;
    float* slice = shared.slices + row_tile % 2 * shared.kSlice;  // while others still read the other one
    unrolled<Tile::kRowTiles>([&](auto i) {
      if (i != row_tile) return;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = 8 * half + row_in_half;
        const int before = one_run ? run_before : phase(out(first_row + row));
        float* to = slice + row * pitch + before + column_in_unit;
#pragma unroll
        for (int j = 0; j < Tile::kUnits; ++j) {
          const int column = Size<Element>::kUnitColumns * (thread / 32 + kWarps * j);
          float x[kColumns];
#pragma unroll
          for (int k = 0; k < kColumns; ++k) x[k] = result[i][j][k % kBlocks][2 * half + k / kBlocks];
          if (column + Size<Element>::kUnitColumns <= size) {
            store_slice(to + column, x, pitch | before);
          } else {
#pragma unroll
            for (int k = 0; k < kColumns; ++k) {
              if (column + column_in_unit + k < size) to[column + k] = x[k];
            }
          }
        }
      }
    });
    __syncthreads();
    const int count = min(16, rows - first_row);
    if (one_run) {
      store_run(out(first_row), added(first_row), args.added_kind, slice + run_before, count * size, factor, thread,
                kThreads);
    } else {
      const int row = thread / kRowThreads;
      if (row < count) {
        T* to = out(first_row + row);
        store_run(to, added(first_row + row), args.added_kind, slice + row * pitch + phase(to), size, factor,
                  thread % kRowThreads, kRowThreads);
      }
    }
  }
  __syncthreads();
}

// The same for results of either kind.
template <class Element, class Tile>
__device__ void store_pass(const Result<Element, Tile>& result, const RowArguments& args,
                           const SharedMemory<Element, Tile>& shared, int rows, int first_column, int units,
                           float factor) {
  using T = typename Element::Storage;
  if (args.out_kind == Pair<T>::kKind) {
    store_rows<T>(result, args, shared, rows, first_column, units, factor);
  } else {
    store_rows<float>(result, args, shared, rows, first_column, units, factor);
  }
}

}  // namespace bda_fused
