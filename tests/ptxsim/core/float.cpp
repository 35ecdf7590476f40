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

template <auto F, int PER, class T, class... S> void arithmetic(Warp& w, const Instr& i, Mask m) {
  Rounding rounding(i.mods);
  uint32_t mods = i.mods;
  auto in = [=](T v) { return mods & FTZ ? flush(v) : v; };
  if (mods & (FTZ | SAT | RELU)) elementwise<PER, T, S...>(w, i, m, [=](S... x) { return finish(F(in(x)...), mods); });
  else elementwise<PER, T, S...>(w, i, m, [](S... x) { return finish(F(x...), 0); });
}

// neg, abs and copysign touch the sign bit alone, of a NaN too.
template <auto F, int PER, class T, class... S> void signs(Warp& w, const Instr& i, Mask m) {
  bool ftz = i.mods & FTZ;
  elementwise<PER, T, S...>(w, i, m, [=](S... x) { return ftz ? flush(F(x...)) : F(x...); });
}

template <class T, int PER, bool LARGEST> void extremum_of(Warp& w, const Instr& i, Mask m) {
  if (i.mods & NANS) arithmetic<extremum<T, LARGEST, true>, PER, T, T, T>(w, i, m);
  else arithmetic<extremum<T, LARGEST, false>, PER, T, T, T>(w, i, m);
}

template <class T, int PER> void add_sums(Table& t, const std::string& type, uint32_t mods) {
  t["add." + type] = {arithmetic<[](T x, T y) { return from<T>(wide(x) + wide(y)); }, PER, T, T, T>, mods};
  t["sub." + type] = {arithmetic<[](T x, T y) { return from<T>(wide(x) - wide(y)); }, PER, T, T, T>, mods};
  t["mul." + type] = {arithmetic<[](T x, T y) { return from<T>(wide(x) * wide(y)); }, PER, T, T, T>, mods};
  t["fma." + type] = {arithmetic<fused<T>, PER, T, T, T, T>, mods | (sizeof(T) == 2 ? uint32_t(RELU) : 0)};
}

template <class T, int PER> void add_all(Table& t, const std::string& type, uint32_t mods) {
  add_sums<T, PER>(t, type, mods);
  t["max." + type] = {extremum_of<T, PER, true>, (mods & FTZ) | NANS};
  t["min." + type] = {extremum_of<T, PER, false>, (mods & FTZ) | NANS};
  t["neg." + type] = {signs<[](T x) { return negate(x); }, PER, T, T>, mods & FTZ};
  t["abs." + type] = {signs<[](T x) { return magnitude(x); }, PER, T, T>, mods & FTZ};
}

// The hardware approximates it; here it is evaluated in double and rounded.
template <auto F> constexpr Handler approximate = arithmetic<[](float x) { return float(F(double(x))); }, 1, float, float>;

}  // namespace

void add_float(Table& t) {
  constexpr uint32_t ALL_ROUNDINGS = RN | RZ | RM | RP, NATIVE = ALL_ROUNDINGS | FTZ | APPROX;
  add_all<float, 1>(t, "f32", ALL_ROUNDINGS | FTZ | SAT);
  add_sums<double, 1>(t, "f64", ALL_ROUNDINGS);
  add_all<Half, 1>(t, "f16", RN | FTZ | SAT);
  add_all<Half, 2>(t, "f16x2", RN | FTZ | SAT);
  add_all<Bf16, 1>(t, "bf16", RN);
  add_all<Bf16, 2>(t, "bf16x2", RN);
  using F = float;
  t["mad.f32"] = t["fma.f32"];
  t["div.f32"] = {arithmetic<[](F x, F y) { return x / y; }, 1, F, F, F>, NATIVE | FULL};
  t["rcp.f32"] = {arithmetic<[](F x) { return 1 / x; }, 1, F, F>, NATIVE};
  t["sqrt.f32"] = {arithmetic<[](F x) { return std::sqrt(x); }, 1, F, F>, NATIVE};
  t["copysign.f32"] = {signs<[](F x, F y) { return std::copysign(y, x); }, 1, F, F, F>};
  t["ex2.f32"] = {approximate<[](double x) { return std::exp2(x); }>, APPROX | FTZ};
  t["lg2.f32"] = {approximate<[](double x) { return std::log2(x); }>, APPROX | FTZ};
  t["rsqrt.f32"] = {approximate<[](double x) { return 1 / std::sqrt(x); }>, APPROX | FTZ};
  t["sin.f32"] = {approximate<[](double x) { return std::sin(x); }>, APPROX | FTZ};
  t["cos.f32"] = {approximate<[](double x) { return std::cos(x); }>, APPROX | FTZ};
  t["tanh.f32"] = {approximate<[](double x) { return std::tanh(x); }>, APPROX};
}

}  // namespace ptxsim
