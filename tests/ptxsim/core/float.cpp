// Floating-point arithmetic. Results that are NaN are canonical, as on the hardware.
#include <cfenv>

#include "machine.h"
#include "number.h"

namespace ptxsim {
namespace {

// x86 rounds as this says while it lives: scalar and vector arithmetic both follow it.
class Rounding {
 public:
  explicit Rounding(uint32_t mods) : set_(mods & (RZ | RM | RP)) {
    if (set_) fesetround(mods & RZ ? FE_TOWARDZERO : mods & RM ? FE_DOWNWARD : FE_UPWARD);
  }
  ~Rounding() {
    if (set_) fesetround(FE_TONEAREST);
  }
  Rounding(const Rounding&) = delete;

 private:
  bool set_;
};

// float and double are computed natively. 16-bit floats are computed in double and rounded again, which is exact:
// double has more than twice their bits plus two.
template <class T> using Work = std::conditional_t<std::is_same_v<T, float>, float, double>;
template <class T> Work<T> wide(T x) { return Work<T>(widen(x)); }
template <class T> T from(Work<T> x) {
  if constexpr (std::is_same_v<T, Work<T>>) return x;
  else return narrow<T>(x);
}

// A fused 16-bit sum is inexact in double too. Its product is exact; the sum is rounded to odd, so that rounding it
// again rounds the exact one.
template <class T> T fused(T x, T y, T z) {
  if constexpr (std::is_same_v<T, Work<T>>) {
    return std::fma(x, y, z);
  } else {
    double p = wide(x) * wide(y), c = wide(z), sum = p + c;
    double part = sum - p, error = (p - (sum - part)) + (c - part);
    if (error != 0 && std::isfinite(sum) && !(bits_as<uint64_t>(sum) & 1))
      sum = std::nextafter(sum, error > 0 ? INFINITY : -INFINITY);
    return from<T>(sum);
  }
}

// A NaN loses against a number, or wins; -0 is less than +0.
template <class T, bool LARGEST, bool NAN_WINS> T extremum(T x, T y) {
  auto a = wide(x), b = wide(y);
  if (std::isnan(a) || std::isnan(b)) {
    if (NAN_WINS || (std::isnan(a) && std::isnan(b))) return canonical_nan<T>();
    return std::isnan(a) ? y : x;
  }
  bool less = a < b || (a == b && std::signbit(a));
  return less == LARGEST ? y : x;
}

template <class T> T negate(T x) { return -x; }
template <class T> T magnitude(T x) { return std::fabs(x); }
template <int E, int M> Small<E, M> negate(Small<E, M> x) { return {uint16_t(x.bits ^ 0x8000)}; }
template <int E, int M> Small<E, M> magnitude(Small<E, M> x) { return {uint16_t(x.bits & 0x7FFF)}; }

// a: result, sources. A register holds PER values a lane. F computes one of them.
template <auto F, int PER, class T, class... S> void arithmetic(Warp& w, const Instr& i, Mask m) {
  [&]<size_t... N>(std::index_sequence<N...>) {
    T* d = w.reg<T>(i.a[0]);
    auto sources = std::make_tuple(w.reg<const S>(i.a[1 + N])...);
    Rounding rounding(i.mods);
    uint32_t mods = i.mods;
    if (mods & (FTZ | SAT | RELU)) {
      auto in = [=](T v) { return mods & FTZ ? flush(v) : v; };
      for_lanes(m, [=](int l) {
        for (int e = l * PER; e < l * PER + PER; ++e) d[e] = finish(F(in(std::get<N>(sources)[e])...), mods);
      });
    } else {
      for_lanes(m, [=](int l) {
        for (int e = l * PER; e < l * PER + PER; ++e) {
          T value = F(std::get<N>(sources)[e]...);
          d[e] = is_nan(value) ? canonical_nan<T>() : value;
        }
      });
    }
  }(std::index_sequence_for<S...>{});
}

// neg, abs and copysign touch the sign bit alone, of a NaN too.
template <auto F, int PER, class T, class... S> void signs(Warp& w, const Instr& i, Mask m) {
  [&]<size_t... N>(std::index_sequence<N...>) {
    T* d = w.reg<T>(i.a[0]);
    auto sources = std::make_tuple(w.reg<const S>(i.a[1 + N])...);
    bool ftz = i.mods & FTZ;
    for_lanes(m, [=](int l) {
      for (int e = l * PER; e < l * PER + PER; ++e) {
        T value = F(std::get<N>(sources)[e]...);
        d[e] = ftz ? flush(value) : value;
      }
    });
  }(std::index_sequence_for<S...>{});
}

template <class T, int PER, bool LARGEST> void extremum_of(Warp& w, const Instr& i, Mask m) {
  if (i.mods & NANS) arithmetic<extremum<T, LARGEST, true>, PER, T, T, T>(w, i, m);
  else arithmetic<extremum<T, LARGEST, false>, PER, T, T, T>(w, i, m);
}

template <class T, int PER> void add_common(Table& t, const std::string& type, uint32_t roundings, uint32_t mods) {
  t["add." + type] = {arithmetic<[](T x, T y) { return from<T>(wide(x) + wide(y)); }, PER, T, T, T>, roundings | mods};
  t["sub." + type] = {arithmetic<[](T x, T y) { return from<T>(wide(x) - wide(y)); }, PER, T, T, T>, roundings | mods};
  t["mul." + type] = {arithmetic<[](T x, T y) { return from<T>(wide(x) * wide(y)); }, PER, T, T, T>, roundings | mods};
  t["fma." + type] = {arithmetic<fused<T>, PER, T, T, T, T>, roundings | mods | (sizeof(T) == 2 ? uint32_t(RELU) : 0)};
  t["max." + type] = {extremum_of<T, PER, true>, (mods & FTZ) | NANS};
  t["min." + type] = {extremum_of<T, PER, false>, (mods & FTZ) | NANS};
  t["neg." + type] = {signs<[](T x) { return negate(x); }, PER, T, T>, mods & FTZ};
  t["abs." + type] = {signs<[](T x) { return magnitude(x); }, PER, T, T>, mods & FTZ};
  // The hardware approximates these; here they are evaluated in double and rounded.
  t["ex2." + type] = {arithmetic<[](T x) { return from<T>(Work<T>(std::exp2(double(wide(x))))); }, PER, T, T>,
                      APPROX | FTZ};
  t["tanh." + type] = {arithmetic<[](T x) { return from<T>(Work<T>(std::tanh(double(wide(x))))); }, PER, T, T>, APPROX};
}

template <class T> void add_native(Table& t, const std::string& type, uint32_t mods) {
  t["mad." + type] = t["fma." + type];
  t["div." + type] = {arithmetic<[](T x, T y) { return x / y; }, 1, T, T, T>, mods | FULL};
  t["rcp." + type] = {arithmetic<[](T x) { return 1 / x; }, 1, T, T>, mods};
  t["sqrt." + type] = {arithmetic<[](T x) { return std::sqrt(x); }, 1, T, T>, mods};
  t["copysign." + type] = {signs<[](T x, T y) { return std::copysign(y, x); }, 1, T, T, T>};
}

}  // namespace

void add_float(Table& t) {
  constexpr uint32_t ALL_ROUNDINGS = RN | RZ | RM | RP;
  add_common<float, 1>(t, "f32", ALL_ROUNDINGS, FTZ | SAT);
  add_common<double, 1>(t, "f64", ALL_ROUNDINGS, 0);
  add_common<Half, 1>(t, "f16", RN, FTZ | SAT);
  add_common<Half, 2>(t, "f16x2", RN, FTZ | SAT);
  add_common<Bf16, 1>(t, "bf16", RN, 0);
  add_common<Bf16, 2>(t, "bf16x2", RN, 0);
  add_native<float>(t, "f32", ALL_ROUNDINGS | FTZ | APPROX);
  add_native<double>(t, "f64", ALL_ROUNDINGS);
  constexpr auto lg2 = [](float x) { return float(std::log2(double(x))); };
  constexpr auto rsqrt = [](float x) { return float(1 / std::sqrt(double(x))); };
  constexpr auto sine = [](float x) { return float(std::sin(double(x))); };
  constexpr auto cosine = [](float x) { return float(std::cos(double(x))); };
  t["lg2.f32"] = {arithmetic<lg2, 1, float, float>, APPROX | FTZ};
  t["rsqrt.f32"] = {arithmetic<rsqrt, 1, float, float>, APPROX | FTZ};
  t["sin.f32"] = {arithmetic<sine, 1, float, float>, APPROX | FTZ};
  t["cos.f32"] = {arithmetic<cosine, 1, float, float>, APPROX | FTZ};
}

}  // namespace ptxsim
