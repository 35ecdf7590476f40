#include <algorithm>
#include <array>
#include <mutex>
#include <stdexcept>

#include "kernels.h"

namespace bda_fused {
namespace {

void check(cudaError_t error, const std::string& name) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // forgets it: the next launch would be blamed
  throw std::runtime_error(name + " did not launch: " + cudaGetErrorString(error));
}

// A kernel may use more than 48 KiB of shared memory only after it was told so, once on every device.
void allow_shared_memory(std::size_t kernel, unsigned bytes) {
  static std::mutex mutex;
  static std::vector<std::vector<unsigned>> allowed(kernels().size());
  int device = 0;
  check(cudaGetDevice(&device), kernels()[kernel].name);
  const std::lock_guard<std::mutex> lock(mutex);
  std::vector<unsigned>& by_device = allowed[kernel];
  if (by_device.size() <= static_cast<std::size_t>(device)) by_device.resize(device + 1, 48 * 1024);
  if (bytes <= by_device[device]) return;
  check(cudaFuncSetAttribute(kernels()[kernel].function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(bytes)),
        kernels()[kernel].name);
  by_device[device] = bytes;
}

}  // namespace

const std::vector<Kernel>& kernels() {
  static const std::vector<Kernel> all = [] {
    std::vector<Kernel> joined;
    for (const auto& part : {forward_kernels(), backward_kernels(), pack_kernels(), product_kernels(), sum_kernels()}) {
      joined.insert(joined.end(), part.begin(), part.end());
    }
    return joined;
  }();
  return all;
}

void launch(const std::string& name, unsigned grid, unsigned block, unsigned shared, const std::string& arguments,
            void* stream) {
  const auto found =
      std::find_if(kernels().begin(), kernels().end(), [&](const Kernel& kernel) { return name == kernel.name; });
  if (found == kernels().end()) throw std::invalid_argument("there is no kernel named " + name);
  if (arguments.size() != found->argument_bytes) {
    throw std::invalid_argument(name + " takes " + std::to_string(found->argument_bytes) + " bytes of arguments, got " +
                                std::to_string(arguments.size()));
  }
  allow_shared_memory(found - kernels().begin(), shared);
  std::array<void*, 1> pointers{const_cast<char*>(arguments.data())};
  check(cudaLaunchKernel(found->function, dim3(grid), dim3(block), pointers.data(), shared,
                         static_cast<cudaStream_t>(stream)),
        name);
}

}  // namespace bda_fused
