// Integer and bit operations, moves and selections.
#include <algorithm>
#include <bit>
#include <limits>
#include <type_traits>

#include "machine.h"

namespace ptxsim {
namespace {

using u32 = uint32_t;
using u64 = uint64_t;

template <int BYTES, bool SIGNED> struct Integer;
template <> struct Integer<2, true> {
  using type = int16_t;
};
template <> struct Integer<2, false> {
  using type = uint16_t;
};
template <> struct Integer<4, true> {
  using type = int32_t;
};
template <> struct Integer<4, false> {
  using type = u32;
};
template <> struct Integer<8, true> {
  using type = int64_t;
};
template <> struct Integer<8, false> {
  using type = u64;
};
template <> struct Integer<16, true> {
  using type = __int128;
};
template <> struct Integer<16, false> {
  using type = unsigned __int128;
};
template <class T> using Wide = typename Integer<2 * sizeof(T), std::is_signed_v<T>>::type;
template <class T> using Unsigned = typename Integer<sizeof(T), false>::type;
template <class T> constexpr u32 BITS = sizeof(T) * 8;

// Arithmetic wraps.
template <class T> T plus(T x, T y) { return T(Unsigned<T>(x) + Unsigned<T>(y)); }
template <class T> T minus(T x, T y) { return T(Unsigned<T>(x) - Unsigned<T>(y)); }
template <class T> T low(T x, T y) { return T(u64(x) * u64(y)); }
template <class T> T high(T x, T y) { return T(Wide<T>(x) * Wide<T>(y) >> BITS<T>); }

// By zero: what PTX leaves open. The least integer by -1: itself.
template <class T> T quotient(T x, T y) {
  if (y == 0) return T(-1);
  return std::is_signed_v<T> && y == T(-1) ? minus(T(0), x) : T(x / y);
}

// A field of bits. Above it stands the sign: the field's last bit, or the source's if the field reaches past it.
template <class T> T extract(T x, u32 position, u32 length) {
  u32 p = position & 255, n = length & 255, kept = std::min(n, p < BITS<T> ? BITS<T> - p : 0);
  bool sign = std::is_signed_v<T> && n && x >> std::min(p + n - 1, BITS<T> - 1) & 1;
  Unsigned<T> field = p < BITS<T> ? Unsigned<T>(x) >> p : 0;
  if (kept == BITS<T>) return T(field);
  Unsigned<T> ones = (Unsigned<T>(1) << kept) - 1;
  return T(sign ? field | ~ones : field & ones);
}

template <class T> T insert(T x, T into, u32 position, u32 length) {
  u32 p = position & 255, n = length & 255;
  if (p >= BITS<T>) return into;
  T field = T((n < BITS<T> ? (T(1) << n) - 1 : T(-1)) << p);
  return (into & ~field) | (T(x << p) & field);
}

// Bytes of b:a, each chosen by a nibble; a nibble's top bit asks for the byte's sign instead.
u32 permute(u32 a, u32 b, u32 selector) {
  u64 both = u64(b) << 32 | a;
  u32 result = 0;
  for (int byte = 0; byte < 4; ++byte) {
    u32 pick = selector >> (4 * byte) & 15, value = u32(both >> (8 * (pick & 7)) & 255);
    result |= (pick & 8 ? (value >> 7) * 255 : value) << (8 * byte);
  }
  return result;
}

u32 lop3(u32 a, u32 b, u32 c, u32 table) {
  u32 result = 0;
  for (u32 row = 0; row < 8; ++row)
    result |= -(table >> row & 1) & (row & 4 ? a : ~a) & (row & 2 ? b : ~b) & (row & 1 ? c : ~c);
  return result;
}

// shf shifts b:a and gives 32 bits of it.
u32 funnel_left(u32 a, u32 b, u32 n) { return u32((u64(b) << 32 | a) << n >> 32); }
u32 funnel_right(u32 a, u32 b, u32 n) { return u32((u64(b) << 32 | a) >> n); }

// a: result, if true, if false, predicate, flip
template <class T> void select(Warp& w, const Instr& i, Mask m) {
  T* d = w.reg<T>(i.a[0]);
  const T *x = w.reg<T>(i.a[1]), *y = w.reg<T>(i.a[2]);
  Mask p = w.pred(i.a[3]) ^ Mask(i.a[4]);
  for_lanes(m, [=](int l) { d[l] = p >> l & 1 ? x[l] : y[l]; });
}

// Predicates are masks. a: result, two sources, each with its flip
template <auto F> void predicate(Warp& w, const Instr& i, Mask m) {
  Mask value = F(w.pred(i.a[1]) ^ Mask(i.a[2]), w.pred(i.a[3]) ^ Mask(i.a[4]));
  w.pred(i.a[0]) = (w.pred(i.a[0]) & ~m) | (value & m);
}

// mov between a register and the narrower registers that fill it. a: number of parts, whole, parts
template <class W, class P, bool PACK> void repack(Warp& w, const Instr& i, Mask m) {
  W* whole = w.reg<W>(i.a[1]);
  for (int part = 0; part < i.a[0]; ++part) {
    P* piece = w.reg<P>(i.a[2 + part]);
    int shift = part * int(BITS<P>);
    if (!PACK) for_lanes(m, [=](int l) { piece[l] = P(whole[l] >> shift); });
    else if (part == 0) for_lanes(m, [=](int l) { whole[l] = piece[l]; });
    else for_lanes(m, [=](int l) { whole[l] |= W(piece[l]) << shift; });
  }
}

template <class T> void add_arithmetic(Table& t, const std::string& type) {
  using W = Wide<T>;
  t["add." + type] = {lanewise<plus<T>, T, T, T>};
  t["sub." + type] = {lanewise<minus<T>, T, T, T>};
  t["mul.lo." + type] = {lanewise<low<T>, T, T, T>};
  t["mul.hi." + type] = {lanewise<high<T>, T, T, T>};
  t["mad.lo." + type] = {lanewise<[](T x, T y, T z) { return plus(low(x, y), z); }, T, T, T, T>};
  if constexpr (sizeof(T) < 8) {
    t["mul.wide." + type] = {lanewise<[](T x, T y) { return W(x) * W(y); }, W, T, T>};
    t["mad.wide." + type] = {lanewise<[](T x, T y, W z) { return plus(W(W(x) * W(y)), z); }, W, T, T, W>};
  }
  t["min." + type] = {lanewise<[](T x, T y) { return std::min(x, y); }, T, T, T>};
  t["max." + type] = {lanewise<[](T x, T y) { return std::max(x, y); }, T, T, T>};
  t["shr." + type] = {lanewise<[](T x, u32 n) { return n < BITS<T> ? T(x >> n) : T(x < 0 ? -1 : 0); }, T, T, u32>};
  if constexpr (sizeof(T) >= 4) {
    t["div." + type] = {lanewise<quotient<T>, T, T, T>};
    t["rem." + type] = {lanewise<[](T x, T y) { return y ? minus(x, low(y, quotient(x, y))) : x; }, T, T, T>};
    t["bfe." + type] = {lanewise<extract<T>, T, T, u32, u32>};
  }
  if constexpr (std::is_signed_v<T>) {
    t["neg." + type] = {lanewise<[](T x) { return minus(T(0), x); }, T, T>};
    t["abs." + type] = {lanewise<[](T x) { return x < 0 ? minus(T(0), x) : x; }, T, T>};
  }
}

template <class T> void add_bits(Table& t, const std::string& bits) {
  t["and.b" + bits] = {lanewise<[](T x, T y) { return T(x & y); }, T, T, T>};
  t["or.b" + bits] = {lanewise<[](T x, T y) { return T(x | y); }, T, T, T>};
  t["xor.b" + bits] = {lanewise<[](T x, T y) { return T(x ^ y); }, T, T, T>};
  t["not.b" + bits] = {lanewise<[](T x) { return T(~x); }, T, T>};
  t["shl.b" + bits] = {lanewise<[](T x, u32 n) { return n < BITS<T> ? T(x << n) : T(0); }, T, T, u32>};
  t["shr.b" + bits] = {lanewise<[](T x, u32 n) { return n < BITS<T> ? T(x >> n) : T(0); }, T, T, u32>};
  if constexpr (sizeof(T) >= 4) {
    t["popc.b" + bits] = {lanewise<[](T x) { return std::popcount(x); }, u32, T>};
    t["clz.b" + bits] = {lanewise<[](T x) { return std::countl_zero(x); }, u32, T>};
    t["bfi.b" + bits] = {lanewise<insert<T>, T, T, T, u32, u32>};
  }
  for (std::string kind : {"b", "s", "u", "f"}) {
    t["mov." + kind + bits] = {lanewise<[](T x) { return x; }, T, T>};
    t["selp." + kind + bits] = {select<T>};
  }
}

}  // namespace

void add_integer(Table& t) {
  add_arithmetic<int16_t>(t, "s16");
  add_arithmetic<uint16_t>(t, "u16");
  add_arithmetic<int32_t>(t, "s32");
  add_arithmetic<u32>(t, "u32");
  add_arithmetic<int64_t>(t, "s64");
  add_arithmetic<u64>(t, "u64");
  add_bits<uint16_t>(t, "16");
  add_bits<u32>(t, "32");
  add_bits<u64>(t, "64");
  t["shf.l.wrap.b32"] = {lanewise<[](u32 a, u32 b, u32 n) { return funnel_left(a, b, n & 31); }, u32, u32, u32, u32>};
  t["shf.r.wrap.b32"] = {lanewise<[](u32 a, u32 b, u32 n) { return funnel_right(a, b, n & 31); }, u32, u32, u32, u32>};
  t["shf.l.clamp.b32"] = {
      lanewise<[](u32 a, u32 b, u32 n) { return funnel_left(a, b, std::min(n, 32u)); }, u32, u32, u32, u32>};
  t["shf.r.clamp.b32"] = {
      lanewise<[](u32 a, u32 b, u32 n) { return funnel_right(a, b, std::min(n, 32u)); }, u32, u32, u32, u32>};
  t["lop3.b32"] = {lanewise<lop3, u32, u32, u32, u32, u32>};
  t["prmt.b32"] = {lanewise<permute, u32, u32, u32, u32>};
  t["and.pred"] = {predicate<[](Mask x, Mask y) { return x & y; }>};
  t["or.pred"] = {predicate<[](Mask x, Mask y) { return x | y; }>};
  t["xor.pred"] = {predicate<[](Mask x, Mask y) { return x ^ y; }>};
  t["not.pred"] = t["mov.pred"] = t["or.pred"];  // lower.py gives the source twice, flipped for not
  t["pack.16.32"] = {repack<u32, uint16_t, true>};
  t["pack.32.64"] = {repack<u64, u32, true>};
  t["pack.16.64"] = {repack<u64, uint16_t, true>};
  t["unpack.16.32"] = {repack<u32, uint16_t, false>};
  t["unpack.32.64"] = {repack<u64, u32, false>};
  t["unpack.16.64"] = {repack<u64, uint16_t, false>};
}

}  // namespace ptxsim
