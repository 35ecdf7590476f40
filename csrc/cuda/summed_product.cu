// Gradients of keys, values and shared queries: one kernel for each element type and form of the left operand.

#include "summed_product.cuh"

#include "kernels.h"

namespace bda_fused {

#define BDA_FUSED_NAME(FORM, NAME) summed_product_##FORM##_##NAME

#define BDA_FUSED_DEFINE(FORM, NAME, ELEMENT)                                                                   \
  extern "C" __global__ void __launch_bounds__(kThreads, 1)                                                     \
      BDA_FUSED_NAME(FORM, NAME)(const __grid_constant__ ProductArguments args) {                               \
    const Product& product = args.products[static_cast<int>(blockIdx.x) >= args.products[1].first_block];       \
    summed_product<ProductTile<ELEMENT, Form::FORM>>(product, static_cast<int>(blockIdx.x) - product.first_block); \
  }

#define BDA_FUSED_LIST(FORM, NAME, ELEMENT)                                                                     \
  {BDA_FUSED_STRING(BDA_FUSED_NAME(FORM, NAME)), reinterpret_cast<const void*>(&BDA_FUSED_NAME(FORM, NAME)),    \
   sizeof(ProductArguments)},

#define BDA_FUSED_ALL(DO)      \
  DO(keys, bf16, Bfloat16)     \
  DO(keys, fp16, Float16)      \
  DO(keys, tf32, Tf32)         \
  DO(keys, tf32x3, Tf32x3)     \
  DO(queries, bf16, Bfloat16)  \
  DO(queries, fp16, Float16)   \
  DO(queries, tf32, Tf32)      \
  DO(queries, tf32x3, Tf32x3)

BDA_FUSED_ALL(BDA_FUSED_DEFINE)

std::vector<Kernel> product_kernels() { return {BDA_FUSED_ALL(BDA_FUSED_LIST)}; }

}  // namespace bda_fused
