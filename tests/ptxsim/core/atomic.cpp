// atom and red, in global and shared memory. Lanes of one instruction act in their order.
#include <algorithm>
#include <type_traits>

#include "machine.h"
#include "number.h"

namespace ptxsim {
namespace {

template <class T> T sum(T old, T b) {
  if constexpr (std::is_arithmetic_v<T>) return T(old + b);
  else return narrow<T>(double(widen(old)) + double(widen(b)));
}

template <class T> uint32_t pair_sum(uint32_t old, uint32_t b) {
  auto half = [](uint32_t x, uint32_t y) { return uint32_t(sum(T{uint16_t(x)}, T{uint16_t(y)}).bits); };
  return half(old >> 16, b >> 16) << 16 | half(old, b);
}

// F(old, b), or F(old, b, c) for cas. a: result (-1: none), base, its bytes, offset, space, b, c (-1: none)
template <class T, auto F> void update(Warp& w, const Instr& i, Mask m) {
  Request request(w, Use::ATOMIC);
  Wavefronts wavefronts(w, sizeof(T));
  for (Mask rest = m; rest; rest &= rest - 1) {
    int lane = __builtin_ctz(rest);
    uint64_t address = w.address(i.a[1], i.a[2], i.a[3], lane);
    uint8_t* where;
    if (resolve(Space(i.a[4]), address) == Space::SHARED) {
      where = w.machine->shared.atomic(w, lane, address, sizeof(T));
      wavefronts.add(lane, uint32_t(address));
    } else {
      where = w.machine->memory.access(w, lane, address, sizeof(T), Use::ATOMIC, true);
      if (where) request.add(address, sizeof(T));
    }
    if (!where) continue;
    T old, b = w.reg<T>(i.a[5])[lane], c = i.a[6] < 0 ? b : w.reg<T>(i.a[6])[lane];
    memcpy(&old, where, sizeof old);
    T value;
    if constexpr (std::is_invocable_v<decltype(F), T, T, T>) value = F(old, b, c);
    else value = F(old, b);
    memcpy(where, &value, sizeof value);
    if (i.a[0] >= 0) w.reg<T>(i.a[0])[lane] = old;
  }
}

template <class T> void add_integers(Table& t, const std::string& type) {
  t["atom.add." + type] = {update<T, sum<T>>};
  t["atom.min." + type] = {update<T, [](T old, T b) { return std::min(old, b); }>};
  t["atom.max." + type] = {update<T, [](T old, T b) { return std::max(old, b); }>};
}

template <class T> void add_bits(Table& t, const std::string& type) {
  t["atom.and." + type] = {update<T, [](T old, T b) { return T(old & b); }>};
  t["atom.or." + type] = {update<T, [](T old, T b) { return T(old | b); }>};
  t["atom.xor." + type] = {update<T, [](T old, T b) { return T(old ^ b); }>};
  t["atom.exch." + type] = {update<T, [](T, T b) { return b; }>};
  t["atom.cas." + type] = {update<T, [](T old, T b, T c) { return old == b ? c : old; }>};
}

}  // namespace

void add_atomic(Table& t) {
  add_integers<uint32_t>(t, "u32");
  add_integers<int32_t>(t, "s32");
  add_integers<uint64_t>(t, "u64");
  add_integers<int64_t>(t, "s64");
  add_bits<uint32_t>(t, "b32");
  add_bits<uint64_t>(t, "b64");
  t["atom.inc.u32"] = {update<uint32_t, [](uint32_t old, uint32_t b) { return old >= b ? 0 : old + 1; }>};
  t["atom.add.f32"] = {update<float, sum<float>>};
  t["atom.add.f64"] = {update<double, sum<double>>};
  t["atom.add.f16"] = {update<Half, sum<Half>>};
  t["atom.add.bf16"] = {update<Bf16, sum<Bf16>>};
  t["atom.add.f16x2"] = {update<uint32_t, pair_sum<Half>>};
  t["atom.add.bf16x2"] = {update<uint32_t, pair_sum<Bf16>>};
}

}  // namespace ptxsim
