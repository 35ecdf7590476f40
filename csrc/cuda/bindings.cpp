#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "batch_sum.h"
#include "kernels.h"
#include "versions.h"

namespace py = pybind11;

namespace {

void batch_sum(std::uintptr_t x, std::uintptr_t y, const std::string& dtype, std::int64_t batch, std::int64_t columns,
               std::int64_t row_stride, std::uintptr_t stream) {
  bda_fused::batch_sum(reinterpret_cast<const void*>(x), reinterpret_cast<void*>(y),
                       bda_fused::scalar_of(dtype), batch, columns, row_stride, reinterpret_cast<void*>(stream));
}

void launch(const std::string& kernel, unsigned grid, unsigned block, unsigned shared, const py::bytes& arguments,
            std::uintptr_t stream) {
  bda_fused::launch(kernel, grid, block, shared, arguments, reinterpret_cast<void*>(stream));
}

py::dict kernels() {
  py::dict sizes;
  for (const bda_fused::Kernel& kernel : bda_fused::kernels()) sizes[kernel.name] = kernel.argument_bytes;
  return sizes;
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "CUDA kernels of bda_fused, on raw device pointers and a stream.";
  module.def("batch_sum", &batch_sum, py::arg("x"), py::arg("y"), py::arg("dtype"), py::arg("batch"),
             py::arg("columns"), py::arg("row_stride"), py::arg("stream"));
  module.def("launch", &launch, py::arg("kernel"), py::arg("grid"), py::arg("block"), py::arg("shared"),
             py::arg("arguments"), py::arg("stream"));
  module.def("kernels", &kernels, "Every kernel's name and the bytes of its arguments.");
  module.def("runtime_version", &bda_fused::runtime_version);
  module.def("driver_version", &bda_fused::driver_version);
}
