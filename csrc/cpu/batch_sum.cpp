#include "batch_sum.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

// GCC and Clang compile a loop a second time for AVX2 and FMA and choose at run time; MSVC compiles the portable one.
#if (defined(__GNUC__) || defined(__clang__)) && defined(__x86_64__)
#define BDA_FUSED_HAS_AVX2 1
#define BDA_FUSED_AVX2 __attribute__((target("avx2,fma")))
#else
#define BDA_FUSED_HAS_AVX2 0
#endif

#if defined(_MSC_VER)
#define BDA_FUSED_INLINE __forceinline
#else
#define BDA_FUSED_INLINE inline __attribute__((always_inline))
#endif

namespace bda_fused {
namespace {

// Columns that one thread sums at a time: accumulators stay in the first-level cache.
constexpr std::int64_t kBlock = 512;

struct bfloat16 {
  std::uint16_t bits;
};

struct float16 {
  std::uint16_t bits;
};

BDA_FUSED_INLINE float from_bits(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

BDA_FUSED_INLINE float widen(float x) { return x; }
BDA_FUSED_INLINE double widen(double x) { return x; }
BDA_FUSED_INLINE float widen(bfloat16 x) { return from_bits(std::uint32_t{x.bits} << 16); }

// Exponent and mantissa move to their float32 places, and scaling by 2^112 corrects the exponent's bias, exactly and
// for subnormal numbers too; infinity and NaN get float32's exponent.
BDA_FUSED_INLINE float widen(float16 x) {
  const std::uint32_t magnitude = (x.bits & 0x7fffu) << 13;
  const std::uint32_t sign = (x.bits & 0x8000u) << 16;
  const bool special = (x.bits & 0x7c00u) == 0x7c00u;
  const float value = special ? from_bits(magnitude | 0x7f800000u) : from_bits(magnitude) * 0x1p112f;
  return sign ? -value : value;
}

template <typename T>
using accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T>
BDA_FUSED_INLINE void sum_columns(const T* x, accumulator<T>* y, std::int64_t batch, std::int64_t columns,
                                  std::int64_t row_stride) {
  std::fill(y, y + columns, accumulator<T>{0});
  for (std::int64_t b = 0; b < batch; ++b) {
    const T* row = x + b * row_stride;
    for (std::int64_t j = 0; j < columns; ++j) y[j] += widen(row[j]);
  }
}

template <typename T>
void sum_portable(const T* x, accumulator<T>* y, std::int64_t batch, std::int64_t columns, std::int64_t row_stride) {
  sum_columns(x, y, batch, columns, row_stride);
}

#if BDA_FUSED_HAS_AVX2
template <typename T>
BDA_FUSED_AVX2 void sum_avx2(const T* x, accumulator<T>* y, std::int64_t batch, std::int64_t columns,
                             std::int64_t row_stride) {
  sum_columns(x, y, batch, columns, row_stride);
}
#endif

bool has_avx2() {
#if BDA_FUSED_HAS_AVX2
  static const bool has = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return has;
#else
  return false;
#endif
}

template <typename T>
void launch(const void* x, void* y, std::int64_t batch, std::int64_t columns, std::int64_t row_stride,
            int num_threads, bool portable) {
  auto sum = sum_portable<T>;
#if BDA_FUSED_HAS_AVX2
  if (has_avx2() && !portable) sum = sum_avx2<T>;
#endif
  const T* source = static_cast<const T*>(x);
  auto* target = static_cast<accumulator<T>*>(y);
  const std::int64_t blocks = (columns + kBlock - 1) / kBlock;
#pragma omp parallel for num_threads(num_threads) schedule(static)
  for (std::int64_t block = 0; block < blocks; ++block) {
    const std::int64_t begin = block * kBlock;
    sum(source + begin, target + begin, batch, std::min(kBlock, columns - begin), row_stride);
  }
  (void)num_threads, (void)portable;  // unused where the compiler has neither OpenMP nor AVX2
}

}  // namespace

const char* instruction_set() { return has_avx2() ? "avx2" : "portable"; }

void batch_sum(const void* x, void* y, Scalar scalar, std::int64_t batch, std::int64_t columns,
               std::int64_t row_stride, int num_threads, bool portable) {
  switch (scalar) {
    case Scalar::float32: return launch<float>(x, y, batch, columns, row_stride, num_threads, portable);
    case Scalar::float64: return launch<double>(x, y, batch, columns, row_stride, num_threads, portable);
    case Scalar::bfloat16: return launch<bfloat16>(x, y, batch, columns, row_stride, num_threads, portable);
    case Scalar::float16: return launch<float16>(x, y, batch, columns, row_stride, num_threads, portable);
  }
}

}  // namespace bda_fused
