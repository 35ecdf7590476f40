// The CUDA versions that decide whether kernels can run, as 1000 * major + 10 * minor. Both need no GPU.

#pragma once

namespace bda_fused {

// Of the runtime that is linked in.
int runtime_version();

// The newest that the driver runs; 0 where there is no driver.
int driver_version();

}  // namespace bda_fused
