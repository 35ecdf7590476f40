// The sum over the batch, in a fixed order: y[j] = sum_b x[b, j]. See csrc/cpu/batch_sum.h.

#pragma once

#include <cstdint>

#include "../scalar.h"

namespace bda_fused {

// x: (batch, columns) on the current device, with a row stride in elements and unit column stride; y: (columns,),
// float32, or float64 for float64. Enqueued on ``stream``, a cudaStream_t. Throws std::runtime_error where the launch
// fails.
void batch_sum(const void* x, void* y, Scalar scalar, std::int64_t batch, std::int64_t columns,
               std::int64_t row_stride, void* stream);

}  // namespace bda_fused
