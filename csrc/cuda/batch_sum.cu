#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <stdexcept>
#include <string>
#include <type_traits>

#include "batch_sum.h"

namespace bda_fused {
namespace {

constexpr int kThreads = 256;

__device__ float widen(float x) { return x; }
__device__ double widen(double x) { return x; }
__device__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ float widen(__half x) { return __half2float(x); }

template <typename T>
using accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

// One thread a column, from the first image to the last: neighbours read neighbours, and no order depends on the grid.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    batch_sum_kernel(const T* __restrict__ x, accumulator<T>* __restrict__ y, std::int64_t batch, std::int64_t columns,
                     std::int64_t row_stride) {
  const std::int64_t column = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (column >= columns) return;
  accumulator<T> sum = 0;
#pragma unroll 4
  for (std::int64_t b = 0; b < batch; ++b) sum += widen(x[b * row_stride + column]);
  y[column] = sum;
}

template <typename T>
void launch(const void* x, void* y, std::int64_t batch, std::int64_t columns, std::int64_t row_stride,
            cudaStream_t stream) {
  if (columns == 0) return;
  const auto blocks = static_cast<unsigned>((columns + kThreads - 1) / kThreads);
  batch_sum_kernel<T><<<blocks, kThreads, 0, stream>>>(static_cast<const T*>(x), static_cast<accumulator<T>*>(y),
                                                       batch, columns, row_stride);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) {
    throw std::runtime_error("batch_sum of " + std::to_string(batch) + " x " + std::to_string(columns) +
                             " did not launch: " + cudaGetErrorString(error));
  }
}

}  // namespace

void batch_sum(const void* x, void* y, Scalar scalar, std::int64_t batch, std::int64_t columns,
               std::int64_t row_stride, void* stream) {
  auto* cuda_stream = static_cast<cudaStream_t>(stream);
  switch (scalar) {
    case Scalar::float32: return launch<float>(x, y, batch, columns, row_stride, cuda_stream);
    case Scalar::float64: return launch<double>(x, y, batch, columns, row_stride, cuda_stream);
    case Scalar::bfloat16: return launch<__nv_bfloat16>(x, y, batch, columns, row_stride, cuda_stream);
    case Scalar::float16: return launch<__half>(x, y, batch, columns, row_stride, cuda_stream);
  }
}

}  // namespace bda_fused
