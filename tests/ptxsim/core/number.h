// Numbers of 16 bits, and rounding to them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "machine.h"

namespace ptxsim {

template <class To, class From> inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// A float of 16 bits with E exponent and M mantissa bits, held as its bits.
template <int E, int M> struct Small {
  uint16_t bits;
  static constexpr int BIAS = (1 << (E - 1)) - 1;
  static constexpr uint16_t INF = uint16_t(((1 << E) - 1) << M);
  static constexpr uint16_t CANONICAL_NAN = 0x7FFF;
};
using Half = Small<5, 10>;
using Bf16 = Small<8, 7>;

inline float widen(Bf16 x) { return bits_as<float>(uint32_t(x.bits) << 16); }

inline float widen(Half x) {
  // The exponent moves to float's bias by an exact product, which also normalises subnormals.
  uint32_t magnitude = uint32_t(x.bits & 0x7FFF) << 13, sign = uint32_t(x.bits & 0x8000) << 16;
  uint32_t finite = bits_as<uint32_t>(bits_as<float>(magnitude) * 0x1p112f);
  bool special = (x.bits & Half::INF) == Half::INF;
  return bits_as<float>((special ? magnitude | 0x7F800000 : finite) | sign);
}

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }

enum class Round { NEAREST, ZERO, DOWN, UP };

// The nearest T of a double, ties to even, or the next in a direction. Overflow is infinity unless the direction
// forbids.
template <class T> inline T narrow(double value, Round round = Round::NEAREST) {
  if constexpr (std::is_same_v<T, double>) {
    return value;
  } else if constexpr (std::is_same_v<T, float>) {
    float nearest = float(value);
    if (round == Round::NEAREST || std::isnan(value) || double(nearest) == value) return nearest;
    float below = double(nearest) < value ? nearest : std::nextafterf(nearest, -INFINITY);
    float above = double(nearest) > value ? nearest : std::nextafterf(nearest, INFINITY);
    if (round == Round::ZERO) return value > 0 ? below : above;
    return round == Round::DOWN ? below : above;
  } else {
    constexpr int M = T::INF == Half::INF ? 10 : 7, SMALLEST = 1 - T::BIAS;  // the least normal exponent
    uint64_t all = bits_as<uint64_t>(value), magnitude = all & ~(uint64_t{1} << 63);
    uint16_t sign = uint16_t(all >> 63 << 15);
    if (std::isnan(value)) return {T::CANONICAL_NAN};
    if (std::isinf(value)) return {uint16_t(sign | T::INF)};
    int exponent = int(magnitude >> 52) - 1023;
    if (exponent < -1022)
      return {
          uint16_t(sign | ((round == Round::UP && !sign && magnitude) || (round == Round::DOWN && sign && magnitude)))};
    uint64_t mantissa = (magnitude & ((uint64_t{1} << 52) - 1)) | uint64_t{1} << 52;
    int shift = 52 - M + (exponent < SMALLEST ? SMALLEST - exponent : 0);
    if (shift > 62) shift = 62;
    uint64_t kept = mantissa >> shift, rest = mantissa & ((uint64_t{1} << shift) - 1),
             half = uint64_t{1} << (shift - 1);
    bool up = round == Round::NEAREST ? rest > half || (rest == half && (kept & 1))
                                      : rest && ((round == Round::UP && !sign) || (round == Round::DOWN && sign));
    kept += up;
    // A carry out of the mantissa is the next exponent; a subnormal that grows to 1 << M is the least normal.
    uint64_t result = exponent < SMALLEST ? kept : kept + (uint64_t(exponent + T::BIAS - 1) << M);
    if (result >= T::INF) {
      bool to_infinity = round == Round::NEAREST || (round == Round::UP && !sign) || (round == Round::DOWN && sign);
      result = to_infinity ? T::INF : T::INF - 1;
    }
    return {uint16_t(sign | result)};
  }
}

inline Round rounding(uint32_t mods) {
  return mods & RZ ? Round::ZERO : mods & RM ? Round::DOWN : mods & RP ? Round::UP : Round::NEAREST;
}

// A float below the smallest normal magnitude becomes a zero of its sign.
inline float flush(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }
inline Half flush(Half x) { return (x.bits & Half::INF) ? x : Half{uint16_t(x.bits & 0x8000)}; }
inline Bf16 flush(Bf16 x) { return (x.bits & Bf16::INF) ? x : Bf16{uint16_t(x.bits & 0x8000)}; }
inline double flush(double x) { return x; }

inline bool is_nan(float x) { return std::isnan(x); }
inline bool is_nan(double x) { return std::isnan(x); }
template <int E, int M> inline bool is_nan(Small<E, M> x) { return (x.bits & 0x7FFF) > Small<E, M>::INF; }

template <class T> T canonical_nan() {
  if constexpr (sizeof(T) == 2) return {T::CANONICAL_NAN};
  else if constexpr (sizeof(T) == 4) return bits_as<float>(0x7FFFFFFF);
  else return std::numeric_limits<double>::quiet_NaN();
}

// What modifiers make of a result.
template <class T> T finish(T x, uint32_t mods) {
  if (is_nan(x)) return mods & SAT ? narrow<T>(0) : canonical_nan<T>();
  if (mods & FTZ) x = flush(x);
  if (mods & SAT) x = widen(x) >= 1 ? narrow<T>(1) : widen(x) > 0 ? x : narrow<T>(0);
  if (mods & RELU && !(widen(x) > 0)) x = narrow<T>(0);
  return x;
}

}  // namespace ptxsim
