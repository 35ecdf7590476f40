// Sums in a fixed order: float32 partials from the first to the last, rounded once to the result's dtype.

#include "kernels.h"
#include "pairs.cuh"
#include "tile.cuh"

namespace bda_fused {
namespace {

__device__ void store_element(void* to, Kind kind, std::int64_t index, float x) {
  switch (kind) {
    case kBfloat16: static_cast<__nv_bfloat16*>(to)[index] = Pair<__nv_bfloat16>::round(x); break;
    case kFloat16: static_cast<__half*>(to)[index] = Pair<__half>::round(x); break;
    default: static_cast<float*>(to)[index] = x;
  }
}

}  // namespace

// One thread an element: neighbours read neighbours, and no order depends on the grid.
extern "C" __global__ void __launch_bounds__(kThreads) ordered_sum(const __grid_constant__ SumArguments args) {
  const std::int64_t at = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (at >= args.size) return;
  float sum = 0.f;
#pragma unroll 4
  for (int part = 0; part < args.parts; ++part) sum += args.partial[part * args.size + at];
  if (args.added.data != nullptr) {
    const std::int64_t row = at / args.columns, group = row / args.rows;
    const std::int64_t place = group / args.group_heads * args.added.batch +
                               group % args.group_heads * args.added.head + row % args.rows * args.added.row +
                               at % args.columns;
    for (int batch = 0; batch < args.sum_batches; ++batch) {
      for (int head = 0; head < args.sum_heads; ++head) {
        sum += load_element(args.added.data, args.out_kind, place + batch * args.added.batch + head * args.added.head);
      }
    }
  }
  store_element(args.out, args.out_kind, at, sum);
}

std::vector<Kernel> sum_kernels() {
  return {{"ordered_sum", reinterpret_cast<const void*>(&ordered_sum), sizeof(SumArguments)}};
}

}  // namespace bda_fused
