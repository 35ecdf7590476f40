// The element types that kernels take, and their names in Python.

#pragma once

#include <stdexcept>
#include <string>

namespace bda_fused {

enum class Scalar { float32, float64, bfloat16, float16 };

inline Scalar scalar_of(const std::string& name) {
  if (name == "float32") return Scalar::float32;
  if (name == "float64") return Scalar::float64;
  if (name == "bfloat16") return Scalar::bfloat16;
  if (name == "float16") return Scalar::float16;
  throw std::invalid_argument("dtype must be float32, float64, bfloat16 or float16, got " + name);
}

}  // namespace bda_fused
