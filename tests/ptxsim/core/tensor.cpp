// ldmatrix and mma.sync, with the fragment layouts of the PTX ISA.
#include <algorithm>

#include "machine.h"
#include "number.h"

namespace ptxsim {
namespace {

void check_warp(Warp& w, Mask m) {
  if (m != ALL_LANES && w.machine->checks_for(Check::BARRIERS))
    w.machine->fault(w, __builtin_ctz(m), Fault::DIVERGENT_BARRIER,
                     "meets in a tensor-core instruction without all 32 lanes");
}

// N matrices of 8 x 8 halves; lanes 8 j .. 8 j + 7 point at the rows of matrix j. Lane l receives from each matrix the
// elements (l / 4, 2 (l % 4)) and its right neighbour; transposed: (2 (l % 4), l / 4) and its lower neighbour.
// a: base, its bytes, offset, results
template <int N, bool TRANSPOSED> void load_matrix(Warp& w, const Instr& i, Mask m) {
  check_warp(w, m);
  uint16_t rows[N * 8][8];
  Wavefronts wavefronts(w, 16);
  for (int row = 0; row < N * 8; ++row) {
    uint64_t address = w.address(i.a[0], i.a[1], i.a[2], row) & ((uint64_t{1} << WINDOW_BITS) - 1);
    const uint8_t* from = w.machine->shared.read(w, row, address, 16, false, true);
    if (from) memcpy(rows[row], from, 16);
    else std::fill_n(rows[row], 8, 0);
    wavefronts.add(row, uint32_t(address));
  }
  for (int j = 0; j < N; ++j) {
    uint32_t* d = w.reg<uint32_t>(i.a[3 + j]);
    for (int l = 0; l < LANES; ++l) {
      int r = l / 4, c = 2 * (l % 4);
      uint32_t first = TRANSPOSED ? rows[8 * j + c][r] : rows[8 * j + r][c];
      uint32_t second = TRANSPOSED ? rows[8 * j + c + 1][r] : rows[8 * j + r][c + 1];
      d[l] = first | second << 16;
    }
  }
}

struct Tf32 {
  uint32_t bits;
};
inline float widen(Tf32 x) { return bits_as<float>(x.bits & ~0x1FFFu); }  // the hardware reads 10 bits of mantissa
using ptxsim::widen;

// D = A B + C for a 16 x K by K x 8 product. Element e of register r of lane 4 g + t is, with P = 2 elements a register
// for 16-bit types and 1 for tf32:
//   A:    row g + 8 (r % 2), column P t + 4 P (r / 2) + e
//   B:    row P t + 4 P r + e, column g
//   C, D: row g + 8 (r / 2), column 2 t + r % 2
// Products are exact in float; they are added to C one by one in the order of k, each sum rounded to float.
// a: D, A, B, C registers
template <class T, int K> void multiply(Warp& w, const Instr& i, Mask m) {
  check_warp(w, m);
  constexpr int P = 4 / sizeof(T), A_REGS = 16 * K / LANES / P, B_REGS = 8 * K / LANES / P;
  constexpr int C_REGS = 4;
  const int32_t *d = i.a, *a = d + C_REGS, *b = a + A_REGS, *c = b + B_REGS;
  float A[16][K], B[K][8], C[16][8];
  auto each = [](int registers, int elements, auto f) {
    for (int r = 0; r < registers; ++r)
      for (int g = 0; g < 8; ++g)
        for (int t = 0; t < 4; ++t)
          for (int e = 0; e < elements; ++e) f(r, g, t, e, (4 * g + t) * elements + e);
  };
  auto sum = [&](int r, int g, int t) -> float& { return C[g + 8 * (r / 2)][2 * t + r % 2]; };
  each(A_REGS, P, [&](int r, int g, int t, int e, int n) {
    A[g + 8 * (r % 2)][P * t + 4 * P * (r / 2) + e] = widen(w.reg<T>(a[r])[n]);
  });
  each(B_REGS, P, [&](int r, int g, int t, int e, int n) { B[P * t + 4 * P * r + e][g] = widen(w.reg<T>(b[r])[n]); });
  each(C_REGS, 1, [&](int r, int g, int t, int, int n) { sum(r, g, t) = w.reg<float>(c[r])[n]; });
  for (int k = 0; k < K; ++k)
    for (int x = 0; x < 16; ++x)
      for (int y = 0; y < 8; ++y) C[x][y] = std::fma(A[x][k], B[k][y], C[x][y]);
  each(C_REGS, 1, [&](int r, int g, int t, int, int n) {
    float value = sum(r, g, t);
    w.reg<float>(d[r])[n] = std::isnan(value) ? canonical_nan<float>() : value;
  });
  w.machine->counters.macs += 16 * 8 * K;
}

}  // namespace

void add_tensor(Table& t) {
  const std::string load = "ldmatrix.m8n8.";
  t[load + "x1.b16"] = {load_matrix<1, false>};
  t[load + "x2.b16"] = {load_matrix<2, false>};
  t[load + "x4.b16"] = {load_matrix<4, false>};
  t[load + "x1.trans.b16"] = {load_matrix<1, true>};
  t[load + "x2.trans.b16"] = {load_matrix<2, true>};
  t[load + "x4.trans.b16"] = {load_matrix<4, true>};
  t["mma.m16n8k8.f32.f16.f16.f32"] = {multiply<Half, 8>};
  t["mma.m16n8k16.f32.f16.f16.f32"] = {multiply<Half, 16>};
  t["mma.m16n8k8.f32.bf16.bf16.f32"] = {multiply<Bf16, 8>};
  t["mma.m16n8k16.f32.bf16.bf16.f32"] = {multiply<Bf16, 16>};
  t["mma.m16n8k4.f32.tf32.tf32.f32"] = {multiply<Tf32, 4>};
  t["mma.m16n8k8.f32.tf32.tf32.f32"] = {multiply<Tf32, 8>};
}

}  // namespace ptxsim
