// Which kernels there are, by name, and how they are launched.

#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace bda_fused {

struct Kernel {
  const char* name;
  const void* function;
  std::size_t argument_bytes;  // of the struct that it takes
};

// One function in each file of kernels.
std::vector<Kernel> forward_kernels();
std::vector<Kernel> backward_kernels();
std::vector<Kernel> pack_kernels();
std::vector<Kernel> product_kernels();
std::vector<Kernel> sum_kernels();

// All of them.
const std::vector<Kernel>& kernels();

// Enqueues a kernel on the current device and ``stream``, a cudaStream_t, with ``shared`` bytes of dynamic shared
// memory. Neither waits nor allocates.
// Throws std::invalid_argument for an unknown kernel or arguments of another size, std::runtime_error where the launch
// fails.
void launch(const std::string& name, unsigned grid, unsigned block, unsigned shared, const std::string& arguments,
            void* stream);

}  // namespace bda_fused

// Calls DO(element name, element type, tile name, the arguments of Tile) for every instantiation. A tile is named by
// its rows and the keys that fit; cuda_plan.py chooses among them.
#define BDA_FUSED_FORWARD_TILES(DO, NAME, ELEMENT) \
  DO(NAME, ELEMENT, 96x128, 6, 2, 3)               \
  DO(NAME, ELEMENT, 96x320, 6, 5, 3)               \
  DO(NAME, ELEMENT, 80x320, 5, 5, 3)               \
  DO(NAME, ELEMENT, 64x320, 4, 5, 3)               \
  DO(NAME, ELEMENT, 48x320, 3, 5, 3)               \
  DO(NAME, ELEMENT, 32x512, 2, 8, 3)

#define BDA_FUSED_BACKWARD_TILES(DO, NAME, ELEMENT) \
  DO(NAME, ELEMENT, 96x320, 6, 5, 3)                \
  DO(NAME, ELEMENT, 80x320, 5, 5, 3)                \
  DO(NAME, ELEMENT, 48x320, 3, 5, 3)                \
  DO(NAME, ELEMENT, 32x512, 2, 8, 3)

#define BDA_FUSED_FLOAT32_TILES(DO, NAME, ELEMENT) \
  DO(NAME, ELEMENT, 48x320, 3, 5, 3)               \
  DO(NAME, ELEMENT, 16x512, 1, 8, 4)

#define BDA_FUSED_QUOTE(X) #X
#define BDA_FUSED_STRING(X) BDA_FUSED_QUOTE(X)
