// cvt and setp: the operations that mix types.
#include <algorithm>
#include <limits>
#include <type_traits>

#include "machine.h"
#include "number.h"

namespace ptxsim {
namespace {

template <class T> constexpr bool IS_INT = std::is_integral_v<T>;

double to_integral(double x, uint32_t mods) {
  if (mods & RNI) return std::nearbyint(x);
  if (mods & RZI) return std::trunc(x);
  if (mods & RMI) return std::floor(x);
  return mods & RPI ? std::ceil(x) : x;
}

// NaN is 0, or the top bit alone where a type of 64 bits takes part (source f64, or result 64 bits).
template <class D, class S> D to_int(S x, uint32_t mods) {
  if (is_nan(x)) return std::is_same_v<S, double> || sizeof(D) == 8 ? D(uint64_t{1} << (sizeof(D) * 8 - 1)) : D(0);
  double r = to_integral(double(widen(x)), mods);
  if (r <= double(std::numeric_limits<D>::min())) return std::numeric_limits<D>::min();
  if (r >= double(std::numeric_limits<D>::max())) return std::numeric_limits<D>::max();
  return D(r);
}

template <class D, class S> D saturate(S x) {
  using L = std::numeric_limits<D>;
  __int128 wide = x;
  return D(std::clamp<__int128>(wide, L::min(), L::max()));
}

// An integer as a double, which holds 53 of its bits: the nearest, the next in a direction, or of the two neighbours
// the odd one, which a second rounding rounds as it would the integer.
template <class S> double to_double(S x, Round round, bool odd) {
  double nearest = double(x);
  __int128 error = __int128(x) - __int128(nearest);
  if (error == 0) return nearest;
  double other = std::nextafter(nearest, error > 0 ? INFINITY : -INFINITY);
  if (odd) return bits_as<uint64_t>(nearest) & 1 ? nearest : other;
  if (round == Round::NEAREST) return nearest;
  bool up = round == Round::UP || (round == Round::ZERO && x < 0);
  return up == (error > 0) ? other : nearest;
}

template <class D, class S> D convert_one(S x, uint32_t mods) {
  Round round = rounding(mods);
  uint32_t flushing = std::is_same_v<D, float> ? mods : mods & ~FTZ;  // .ftz means float alone
  if constexpr (IS_INT<D> && IS_INT<S>) {
    return mods & SAT ? saturate<D>(x) : D(x);
  } else if constexpr (IS_INT<S>) {
    double wide = std::is_same_v<D, double> ? to_double(x, round, false) : to_double(x, Round::NEAREST, true);
    return finish(narrow<D>(wide, round), flushing);
  } else {
    if (mods & FTZ && std::is_same_v<S, float>) x = flush(x);
    if constexpr (IS_INT<D>) return to_int<D>(x, mods);
    else return finish(narrow<D>(to_integral(double(widen(x)), mods), round), flushing);
  }
}

// a: result, its register's bytes, source, its register's bytes. Integers fill a wider register by their sign.
template <class D, class S> void convert(Warp& w, const Instr& i, Mask m) {
  uint8_t *to = w.regs + i.a[0], *from = w.regs + i.a[2];
  int to_bytes = i.a[1], from_bytes = i.a[3];
  uint32_t mods = i.mods;
  for_lanes(m, [=](int l) {
    S x;
    memcpy(&x, from + l * from_bytes, sizeof x);
    D d = convert_one<D>(x, mods);
    if constexpr (IS_INT<D>) {
      int64_t wide = int64_t(d);
      memcpy(to + l * to_bytes, &wide, size_t(to_bytes));
    } else {
      memcpy(to + l * to_bytes, &d, sizeof d);
    }
  });
}

// a: result, upper, lower
template <class T> void convert_pair(Warp& w, const Instr& i, Mask m) {
  uint32_t* d = w.reg<uint32_t>(i.a[0]);
  const float *high = w.reg<float>(i.a[1]), *low = w.reg<float>(i.a[2]);
  uint32_t mods = i.mods;
  for_lanes(m, [=](int l) {
    T up = convert_one<T>(high[l], mods), down = convert_one<T>(low[l], mods);
    d[l] = uint32_t(up.bits) << 16 | down.bits;
  });
}

// tf32 keeps 10 bits of mantissa. rna rounds halves away from zero.
void convert_tf32(Warp& w, const Instr& i, Mask m) {
  uint32_t* d = w.reg<uint32_t>(i.a[0]);
  const uint32_t* x = w.reg<uint32_t>(i.a[1]);
  uint32_t mods = i.mods;
  for_lanes(m, [=](int l) {
    bool special = (x[l] & 0x7F800000) == 0x7F800000;
    uint32_t up = mods & RZ || special ? 0 : mods & RNA ? 0x1000 : 0xFFF + (x[l] >> 13 & 1);
    uint32_t value = special && (x[l] & 0x7FFFFF) ? 0x7FFFFFFF : (x[l] + up) & ~0x1FFFu;
    d[l] = mods & RELU && value >> 31 ? 0 : value;
  });
}

enum Comparison { EQ, NE, LT, LE, GT, GE, EQU, NEU, LTU, LEU, GTU, GEU, NUM, IS_NAN };

template <class T> Mask compare(const T* x, const T* y, Mask m, int comparison, bool ftz, int stride, int half) {
  auto each = [&](auto holds) {
    return which_lanes(m, [&](int l) {
      T a = x[l * stride + half], b = y[l * stride + half];
      if constexpr (IS_INT<T>) {
        return holds(a, b);
      } else {
        if (ftz) a = flush(a), b = flush(b);
        return holds(widen(a), widen(b));
      }
    });
  };
  auto unordered = [&](Mask ordered) {
    if constexpr (IS_INT<T>) return ordered;
    else
      return ordered |
             which_lanes(m, [&](int l) { return is_nan(x[l * stride + half]) || is_nan(y[l * stride + half]); });
  };
  switch (comparison) {
    case EQ: return each([](auto a, auto b) { return a == b; });
    case NE: return each([](auto a, auto b) { return a < b || a > b; });
    case LT: return each([](auto a, auto b) { return a < b; });
    case LE: return each([](auto a, auto b) { return a <= b; });
    case GT: return each([](auto a, auto b) { return a > b; });
    case GE: return each([](auto a, auto b) { return a >= b; });
    case EQU: return unordered(each([](auto a, auto b) { return a == b; }));
    case NEU: return each([](auto a, auto b) { return !(a == b); });
    case LTU: return each([](auto a, auto b) { return !(a >= b); });
    case LEU: return each([](auto a, auto b) { return !(a > b); });
    case GTU: return each([](auto a, auto b) { return !(a <= b); });
    case GEU: return each([](auto a, auto b) { return !(a < b); });
    case IS_NAN: return unordered(0);
    default: return m & ~unordered(0);
  }
}

enum Combine { NONE, AND, OR, XOR };

Mask combine(Mask value, Mask c, int how) {
  return how == AND ? value & c : how == OR ? value | c : how == XOR ? value ^ c : value;
}

// a: p, q (-1: none), x, y, comparison, combination, c, its flip. q is the negated comparison, combined likewise; for a
// pair of halves p is the lower one's result and q the upper one's.
template <class T, int PER> void setp(Warp& w, const Instr& i, Mask m) {
  const T *x = w.reg<T>(i.a[2]), *y = w.reg<T>(i.a[3]);
  Mask c = i.a[5] == NONE ? 0 : w.pred(i.a[6]) ^ Mask(i.a[7]);
  auto set = [&](int32_t where, Mask value) {
    Mask& p = w.pred(where);
    p = (p & ~m) | (combine(value, c, i.a[5]) & m);
  };
  bool ftz = i.mods & FTZ;
  Mask first = compare(x, y, m, i.a[4], ftz, PER, 0);
  Mask second = PER == 2 ? compare(x, y, m, i.a[4], ftz, PER, 1) : ~first;
  set(i.a[0], first);
  if (i.a[1] >= 0) set(i.a[1], second);
}

template <class S, class... D>
void add_conversions_from(Table& t, const std::string& from, std::initializer_list<const char*> to) {
  auto name = to.begin();
  constexpr uint32_t MODS = FTZ | SAT | RN | RZ | RM | RP | RNI | RZI | RMI | RPI;
  ((t["cvt." + std::string(*name++) + "." + from] = {convert<D, S>,
                                                     MODS | (sizeof(D) == 2 && !IS_INT<D> ? uint32_t(RELU) : 0)}),
   ...);
}

template <class S> void add_conversions(Table& t, const std::string& from) {
  add_conversions_from<S, uint8_t, int8_t, uint16_t, int16_t, uint32_t, int32_t, uint64_t, int64_t, Half, Bf16, float,
                       double>(t, from,
                               {"u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64", "f16", "bf16", "f32", "f64"});
}

template <class T> void add_comparison(Table& t, std::initializer_list<const char*> types, uint32_t mods = 0) {
  for (std::string type : types) t["setp." + type] = {setp<T, 1>, mods};
}

}  // namespace

void add_convert(Table& t) {
  add_conversions<uint8_t>(t, "u8");
  add_conversions<int8_t>(t, "s8");
  add_conversions<uint16_t>(t, "u16");
  add_conversions<int16_t>(t, "s16");
  add_conversions<uint32_t>(t, "u32");
  add_conversions<int32_t>(t, "s32");
  add_conversions<uint64_t>(t, "u64");
  add_conversions<int64_t>(t, "s64");
  add_conversions<Half>(t, "f16");
  add_conversions<Bf16>(t, "bf16");
  add_conversions<float>(t, "f32");
  add_conversions<double>(t, "f64");
  t["cvt.f16x2.f32"] = {convert_pair<Half>, RN | RZ | RELU};
  t["cvt.bf16x2.f32"] = {convert_pair<Bf16>, RN | RZ | RELU};
  t["cvt.tf32.f32"] = {convert_tf32, RN | RNA | RZ | RELU};
  add_comparison<int16_t>(t, {"s16"});
  add_comparison<uint16_t>(t, {"u16", "b16"});
  add_comparison<int32_t>(t, {"s32"});
  add_comparison<uint32_t>(t, {"u32", "b32"});
  add_comparison<int64_t>(t, {"s64"});
  add_comparison<uint64_t>(t, {"u64", "b64"});
  add_comparison<float>(t, {"f32"}, FTZ);
  add_comparison<Half>(t, {"f16"}, FTZ);
  add_comparison<Bf16>(t, {"bf16"});
  t["setp.f16x2"] = {setp<Half, 2>, FTZ};
  t["setp.bf16x2"] = {setp<Bf16, 2>};
}

}  // namespace ptxsim
