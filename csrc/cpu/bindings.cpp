#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "batch_sum.h"

namespace py = pybind11;

namespace {

void batch_sum(std::uintptr_t x, std::uintptr_t y, const std::string& dtype, std::int64_t batch, std::int64_t columns,
               std::int64_t row_stride, int num_threads, bool portable) {
  const bda_fused::Scalar scalar = bda_fused::scalar_of(dtype);
  py::gil_scoped_release release;
  bda_fused::batch_sum(reinterpret_cast<const void*>(x), reinterpret_cast<void*>(y), scalar, batch, columns,
                       row_stride, num_threads, portable);
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
  module.doc() = "CPU kernels of bda_fused, on raw pointers.";
  module.def("batch_sum", &batch_sum, py::arg("x"), py::arg("y"), py::arg("dtype"), py::arg("batch"),
             py::arg("columns"), py::arg("row_stride"), py::arg("num_threads"), py::arg("portable") = false);
  module.def("instruction_set", &bda_fused::instruction_set);
}
