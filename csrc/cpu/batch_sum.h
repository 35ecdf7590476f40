// The sum over the batch, in a fixed order: y[j] = sum_b x[b, j].
//
// A gradient of an operand that all images share is such a sum. Its order must not depend on the number of threads, so
// that two runs agree to the bit: threads split the columns, and each column is summed from first image to last.

#pragma once

#include <cstdint>

#include "../scalar.h"

namespace bda_fused {

// x: (batch, columns) with a row stride in elements and unit column stride; y: (columns,), float32, or float64 for
// float64. portable leaves AVX2 unused; the result is the same to the bit.
void batch_sum(const void* x, void* y, Scalar scalar, std::int64_t batch, std::int64_t columns,
               std::int64_t row_stride, int num_threads, bool portable);

// The instruction set that batch_sum uses on this machine unless told otherwise: "avx2" or "portable".
const char* instruction_set();

}  // namespace bda_fused
