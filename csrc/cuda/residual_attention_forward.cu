// Y = R + M * softmax(scale * Q K^T + attn_bias) V, one kernel for each element type and tile.

#include "kernels.h"
#include "row_kernel.cuh"
#include "softmax.cuh"

namespace bda_fused {
namespace {

template <class Element, class Tile>
struct Softmax {
  __device__ static void prepare(const RowArguments& args, const SharedMemory<Element, Tile>& shared,
                                 const Position& first) {
    load_key_bias(args, shared, first);
  }
  __device__ static bool apply(float (&scores)[Tile::kRowTiles][Tile::kKeyBlocks][4], const RowArguments& args,
                               const SharedMemory<Element, Tile>& shared, const Place& place) {
    return softmax<Element>(scores, args, shared, place);
  }
  __device__ static float factor(const RowArguments& args) { return args.seed == nullptr ? 1.f : args.keep_scale; }
};

}  // namespace

#define BDA_FUSED_NAME(NAME, TILE) residual_attention_forward_##NAME##_##TILE

#define BDA_FUSED_DEFINE(NAME, ELEMENT, TILE, ...)                                         \
  extern "C" __global__ void __launch_bounds__(kThreads, 1)                                \
      BDA_FUSED_NAME(NAME, TILE)(const __grid_constant__ RowArguments args) {              \
    row_kernel<ELEMENT, Tile<__VA_ARGS__>, Softmax<ELEMENT, Tile<__VA_ARGS__>>>(args);    \
  }

#define BDA_FUSED_LIST(NAME, ELEMENT, TILE, ...)                                           \
  {BDA_FUSED_STRING(BDA_FUSED_NAME(NAME, TILE)),                                           \
   reinterpret_cast<const void*>(&BDA_FUSED_NAME(NAME, TILE)), sizeof(RowArguments)},

#define BDA_FUSED_ALL(DO)                                      \
  BDA_FUSED_FORWARD_TILES(DO, bf16, Bfloat16)                  \
  BDA_FUSED_FORWARD_TILES(DO, fp16, Float16)                   \
  BDA_FUSED_FLOAT32_TILES(DO, tf32, Tf32)                      \
  BDA_FUSED_FLOAT32_TILES(DO, tf32x3, Tf32x3)

BDA_FUSED_ALL(BDA_FUSED_DEFINE)

std::vector<Kernel> forward_kernels() { return {BDA_FUSED_ALL(BDA_FUSED_LIST)}; }

}  // namespace bda_fused
