// dS = P * (dP - rowsum(P * dP)) and dQ = scale * dS K + dR, one kernel for each element type and tile.

#include "gradient.cuh"
#include "kernels.h"
#include "row_kernel.cuh"

namespace bda_fused {
namespace {

template <class Element, class Tile>
struct SoftmaxGradient {
  __device__ static void prepare(const RowArguments&, const SharedMemory<Element, Tile>&, const Position&) {}
  __device__ static bool apply(float (&scores)[Tile::kRowTiles][Tile::kKeyBlocks][4], const RowArguments& args,
                               const SharedMemory<Element, Tile>& shared, const Place& place) {
    return softmax_gradient<Element>(scores, args, shared, place);
  }
  __device__ static float factor(const RowArguments&) { return 1.f; }
};

}  // namespace

#define BDA_FUSED_NAME(NAME, TILE) residual_attention_backward_##NAME##_##TILE

#define BDA_FUSED_DEFINE(NAME, ELEMENT, TILE, ...)                                         \
  extern "C" __global__ void __launch_bounds__(kThreads, 1)                                \
      BDA_FUSED_NAME(NAME, TILE)(const __grid_constant__ RowArguments args) {              \
    row_kernel<ELEMENT, Tile<__VA_ARGS__>, SoftmaxGradient<ELEMENT, Tile<__VA_ARGS__>>>(args);    \
  }

#define BDA_FUSED_LIST(NAME, ELEMENT, TILE, ...)                                           \
  {BDA_FUSED_STRING(BDA_FUSED_NAME(NAME, TILE)),                                           \
   reinterpret_cast<const void*>(&BDA_FUSED_NAME(NAME, TILE)), sizeof(RowArguments)},

#define BDA_FUSED_ALL(DO)                                      \
  BDA_FUSED_BACKWARD_TILES(DO, bf16, Bfloat16)                  \
  BDA_FUSED_BACKWARD_TILES(DO, fp16, Float16)                   \
  BDA_FUSED_FLOAT32_TILES(DO, tf32, Tf32)                      \
  BDA_FUSED_FLOAT32_TILES(DO, tf32x3, Tf32x3)

BDA_FUSED_ALL(BDA_FUSED_DEFINE)

std::vector<Kernel> backward_kernels() { return {BDA_FUSED_ALL(BDA_FUSED_LIST)}; }

}  // namespace bda_fused
