// Floating-point arithmetic. Results that are NaN are canonical, as on the hardware.
#include <cfenv>

#include "machine.h"
#include "number.h"

namespace ptxsim {
namespace {

template <class T> T canonical_nan();
template <> float canonical_nan() { return bits_as<float>(0x7FFFFFFF); }
template <> double canonical_nan() { return std::numeric_limits<double>::quiet_NaN(); }
template <> Half canonical_nan() { return {Half::CANONICAL_NAN}; }
template <> Bf16 canonical_nan() { return {Bf16::CANONICAL_NAN}; }

template <class T> T from(double x) { return narrow<T>(x); }
template <> float from(double x) { return float(x); }

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

// What float and double do natively, 16-bit floats do in double and round once. That is exact rounding: double has more
// than twice their bits plus two.
template <class T> struct Add { static T of(T x, T y) { return from<T>(double(widen(x)) + double(widen(y))); } };
template <> float Add<float>::of(float x, float y) { return x + y; }
template <class T> struct Sub { static T of(T x, T y) { return from<T>(double(widen(x)) - double(widen(y))); } };
template <> float Sub<float>::of(float x, float y) { return x - y; }
template <class T> struct Mul { static T of(T x, T y) { return from<T>(double(widen(x)) * double(widen(y))); } };
template <> float Mul<float>::of(float x, float y) { return x * y; }
template <class T> struct Div { static T of(T x, T y) { return x / y; } };

// The product is exact in double; its sum with z is rounded to odd, so that rounding it again is exact.
template <class T> struct Fma {
    static T of(T x, T y, T z) {
        double p = double(widen(x)) * double(widen(y)), c = widen(z), sum = p + c;
        double part = sum - p, error = (p - (sum - part)) + (c - part);
        if (error != 0 && std::isfinite(sum) && !(bits_as<uint64_t>(sum) & 1))
            sum = std::nextafter(sum, error > 0 ? INFINITY : -INFINITY);
        return from<T>(sum);
    }
};
template <> float Fma<float>::of(float x, float y, float z) { return std::fma(x, y, z); }
template <> double Fma<double>::of(double x, double y, double z) { return std::fma(x, y, z); }

// A NaN loses against a number; -0 is less than +0.
template <class T> struct Max {
    static T of(T x, T y) {
        auto a = widen(x), b = widen(y);
        bool second = std::isnan(a) || a < b || (a == b && std::signbit(a));
        return second && !std::isnan(b) ? y : std::isnan(a) ? canonical_nan<T>() : x;
    }
};
template <class T> struct Min {
    static T of(T x, T y) {
        auto a = widen(x), b = widen(y);
        bool second = std::isnan(a) || b < a || (a == b && std::signbit(b));
        return second && !std::isnan(b) ? y : std::isnan(a) ? canonical_nan<T>() : x;
    }
};
template <class F, class T> struct Propagate {
    static T of(T x, T y) { return is_nan(x) || is_nan(y) ? canonical_nan<T>() : F::of(x, y); }
};
template <class T> struct Neg { static T of(T x) { return -x; } };
template <class T> struct Abs { static T of(T x) { return std::fabs(x); } };
template <int E, int M> struct Neg<Small<E, M>> {
    static Small<E, M> of(Small<E, M> x) { return {uint16_t(x.bits ^ 0x8000)}; }
};
template <int E, int M> struct Abs<Small<E, M>> {
    static Small<E, M> of(Small<E, M> x) { return {uint16_t(x.bits & 0x7FFF)}; }
};
template <class T> struct Copysign { static T of(T x, T y) { return std::copysign(y, x); } };

template <class T> struct Rcp { static T of(T x) { return 1 / x; } };
template <class T> struct Sqrt { static T of(T x) { return std::sqrt(x); } };
template <class T> struct Rsqrt { static T of(T x) { return T(1 / std::sqrt(double(x))); } };
// The hardware approximates these; here they are evaluated in double and rounded.
template <class T> struct Ex2 { static T of(T x) { return from<T>(std::exp2(double(widen(x)))); } };
template <class T> struct Lg2 { static T of(T x) { return from<T>(std::log2(double(widen(x)))); } };
template <class T> struct Sin { static T of(T x) { return from<T>(std::sin(double(widen(x)))); } };
template <class T> struct Cos { static T of(T x) { return from<T>(std::cos(double(widen(x)))); } };
template <class T> struct Tanh { static T of(T x) { return from<T>(std::tanh(double(widen(x)))); } };

template <class T>
T finish(T x, uint32_t mods) {
    if (is_nan(x)) return mods & SAT ? from<T>(0) : canonical_nan<T>();
    if (mods & FTZ) x = flush(x);
    if (mods & SAT) x = widen(x) >= 1 ? from<T>(1) : widen(x) > 0 ? x : from<T>(0);
    if (mods & RELU && !(widen(x) > 0)) x = from<T>(0);
    return x;
}

// a: result, sources. A register holds PER values a lane.
template <class T, class F, int SOURCES, int PER>
void arithmetic(Warp& w, const Instr& i, Mask m) {
    T* d = w.reg<T>(i.a[0]);
    const T *x = w.reg<T>(i.a[1]), *y = w.reg<T>(i.a[SOURCES > 1 ? 2 : 1]), *z = w.reg<T>(i.a[SOURCES > 2 ? 3 : 1]);
    auto evaluate = [](T a, T b, T c) {
        (void)b, (void)c;
        if constexpr (SOURCES == 1) return F::of(a);
        else if constexpr (SOURCES == 2) return F::of(a, b);
        else return F::of(a, b, c);
    };
    Rounding rounding(i.mods);
    uint32_t mods = i.mods;
    if (mods & (FTZ | SAT | RELU)) {
        auto in = [=](T v) { return mods & FTZ ? flush(v) : v; };
        for_lanes(m, [=](int l) {
            for (int e = l * PER; e < l * PER + PER; ++e) d[e] = finish(evaluate(in(x[e]), in(y[e]), in(z[e])), mods);
        });
    } else {
        for_lanes(m, [=](int l) {
            for (int e = l * PER; e < l * PER + PER; ++e) {
                T value = evaluate(x[e], y[e], z[e]);
                d[e] = is_nan(value) ? canonical_nan<T>() : value;
            }
        });
    }
}

// neg, abs and copysign touch the sign bit alone.
template <class T, class F, int SOURCES, int PER>
void signs(Warp& w, const Instr& i, Mask m) {
    T* d = w.reg<T>(i.a[0]);
    const T *x = w.reg<T>(i.a[1]), *y = w.reg<T>(i.a[SOURCES > 1 ? 2 : 1]);
    bool ftz = i.mods & FTZ;
    for_lanes(m, [=](int l) {
        for (int e = l * PER; e < l * PER + PER; ++e) {
            T value;
            if constexpr (SOURCES == 1) value = F::of(x[e]);
            else value = F::of(x[e], y[e]);
            d[e] = ftz ? flush(value) : value;
        }
    });
}

template <class T, template <class> class F, int PER>
void extremum(Warp& w, const Instr& i, Mask m) {
    if (i.mods & NANS) arithmetic<T, Propagate<F<T>, T>, 2, PER>(w, i, m);
    else arithmetic<T, F<T>, 2, PER>(w, i, m);
}

template <class T, int PER>
void add_common(Table& t, const std::string& type, uint32_t roundings, uint32_t mods) {
    t["add." + type] = {arithmetic<T, Add<T>, 2, PER>, roundings | mods};
    t["sub." + type] = {arithmetic<T, Sub<T>, 2, PER>, roundings | mods};
    t["mul." + type] = {arithmetic<T, Mul<T>, 2, PER>, roundings | mods};
    t["fma." + type] = {arithmetic<T, Fma<T>, 3, PER>, roundings | mods | (sizeof(T) == 2 ? uint32_t(RELU) : 0)};
    t["max." + type] = {extremum<T, Max, PER>, (mods & FTZ) | NANS};
    t["min." + type] = {extremum<T, Min, PER>, (mods & FTZ) | NANS};
    t["neg." + type] = {signs<T, Neg<T>, 1, PER>, mods & FTZ};
    t["abs." + type] = {signs<T, Abs<T>, 1, PER>, mods & FTZ};
}

template <class T, int PER>
void add_small(Table& t, const std::string& type) {
    t["ex2." + type] = {arithmetic<T, Ex2<T>, 1, PER>, APPROX | FTZ};
    t["tanh." + type] = {arithmetic<T, Tanh<T>, 1, PER>, APPROX};
}

}  // namespace

void add_float(Table& t) {
    constexpr uint32_t ALL_ROUNDINGS = RN | RZ | RM | RP;
    add_common<float, 1>(t, "f32", ALL_ROUNDINGS, FTZ | SAT);
    add_common<double, 1>(t, "f64", ALL_ROUNDINGS, 0);
    t["mad.f32"] = t["fma.f32"];
    t["mad.f64"] = t["fma.f64"];
    add_common<Half, 1>(t, "f16", RN, FTZ | SAT);
    add_common<Half, 2>(t, "f16x2", RN, FTZ | SAT);
    add_common<Bf16, 1>(t, "bf16", RN, 0);
    add_common<Bf16, 2>(t, "bf16x2", RN, 0);
    add_small<Half, 1>(t, "f16");
    add_small<Half, 2>(t, "f16x2");
    add_small<Bf16, 1>(t, "bf16");
    add_small<Bf16, 2>(t, "bf16x2");
    t["div.f32"] = {arithmetic<float, Div<float>, 2, 1>, ALL_ROUNDINGS | FTZ | APPROX | FULL};
    t["rcp.f32"] = {arithmetic<float, Rcp<float>, 1, 1>, ALL_ROUNDINGS | FTZ | APPROX};
    t["sqrt.f32"] = {arithmetic<float, Sqrt<float>, 1, 1>, ALL_ROUNDINGS | FTZ | APPROX};
    t["div.f64"] = {arithmetic<double, Div<double>, 2, 1>, ALL_ROUNDINGS};
    t["rcp.f64"] = {arithmetic<double, Rcp<double>, 1, 1>, ALL_ROUNDINGS};
    t["sqrt.f64"] = {arithmetic<double, Sqrt<double>, 1, 1>, ALL_ROUNDINGS};
    t["rsqrt.f32"] = {arithmetic<float, Rsqrt<float>, 1, 1>, APPROX | FTZ};
    t["ex2.f32"] = {arithmetic<float, Ex2<float>, 1, 1>, APPROX | FTZ};
    t["lg2.f32"] = {arithmetic<float, Lg2<float>, 1, 1>, APPROX | FTZ};
    t["sin.f32"] = {arithmetic<float, Sin<float>, 1, 1>, APPROX | FTZ};
    t["cos.f32"] = {arithmetic<float, Cos<float>, 1, 1>, APPROX | FTZ};
    t["tanh.f32"] = {arithmetic<float, Tanh<float>, 1, 1>, APPROX};
    t["copysign.f32"] = {signs<float, Copysign<float>, 2, 1>, 0};
    t["copysign.f64"] = {signs<double, Copysign<double>, 2, 1>, 0};
}

}  // namespace ptxsim
