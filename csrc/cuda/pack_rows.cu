// Copies rows of any alignment to rows that are 16-byte aligned: keys and values, which the row kernel loads 16 bytes at
// a time. One thread a 16-byte unit, eight lanes 128 bytes of a row.

#include "copy.cuh"
#include "kernels.h"
#include "tile.cuh"

namespace bda_fused {

extern "C" __global__ void __launch_bounds__(kThreads) pack_rows(const __grid_constant__ PackArguments args) {
  const std::int64_t thread = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int chunks = (args.row_units + 7) / 8;
  const std::int64_t row = thread / (8 * chunks);
  const int unit = static_cast<int>(thread % (8 * chunks));
  const std::int64_t last = args.total_rows - 1;
  const std::int64_t at = min(row, last);  // all lanes take part in joining
  const std::int64_t image = at / args.rows;
  const char* data = static_cast<const char*>(args.source.data) + image / args.heads * args.source.batch +
                     image % args.heads * args.source.head + (at - image * args.rows) * args.source.row;
  const auto shift = static_cast<unsigned>(reinterpret_cast<std::uintptr_t>(data) & 15);
  const int valid = row <= last ? args.row_bytes - 16 * unit : -16;
  const uint4 x = cut(join(load_shifted(data + 16 * unit, valid), shift), valid);
  if (row <= last && unit < args.row_units) {
    store_global(static_cast<char*>(args.packed) + 16 * (row * args.row_units + unit), x);
  }
}

std::vector<Kernel> pack_kernels() {
  return {{"pack_rows", reinterpret_cast<const void*>(&pack_rows), sizeof(PackArguments)}};
}

}  // namespace bda_fused
