// Integer and bit operations, moves and selections.
#include <algorithm>
#include <limits>
#include <type_traits>

#include "machine.h"
#include "number.h"

namespace ptxsim {
namespace {

template <class T>
struct Wider;
template <> struct Wider<int16_t> { using type = int32_t; };
template <> struct Wider<uint16_t> { using type = uint32_t; };
template <> struct Wider<int32_t> { using type = int64_t; };
template <> struct Wider<uint32_t> { using type = uint64_t; };
template <> struct Wider<int64_t> { using type = __int128; };
template <> struct Wider<uint64_t> { using type = unsigned __int128; };
template <class T> using Wide = typename Wider<T>::type;
template <class T> using Unsigned = std::make_unsigned_t<T>;

// Handlers for operations of one type: a: result, sources.
template <class D, class S, class F>
void unary(Warp& w, const Instr& i, Mask m) {
    D* d = w.reg<D>(i.a[0]);
    const S* x = w.reg<S>(i.a[1]);
    for_lanes(m, [=](int l) { d[l] = F::of(x[l]); });
}
template <class D, class S, class F>
void binary(Warp& w, const Instr& i, Mask m) {
    D* d = w.reg<D>(i.a[0]);
    const S *x = w.reg<S>(i.a[1]), *y = w.reg<S>(i.a[2]);
    for_lanes(m, [=](int l) { d[l] = F::of(x[l], y[l]); });
}
template <class D, class S, class C, class F>
void ternary(Warp& w, const Instr& i, Mask m) {
    D* d = w.reg<D>(i.a[0]);
    const S *x = w.reg<S>(i.a[1]), *y = w.reg<S>(i.a[2]);
    const C* z = w.reg<C>(i.a[3]);
    for_lanes(m, [=](int l) { d[l] = F::of(x[l], y[l], z[l]); });
}

// Unsigned arithmetic wraps, as PTX asks.
template <class T> struct Add { static T of(T x, T y) { return T(Unsigned<T>(x) + Unsigned<T>(y)); } };
template <class T> struct Sub { static T of(T x, T y) { return T(Unsigned<T>(x) - Unsigned<T>(y)); } };
template <class T> struct MulLo { static T of(T x, T y) { return T(uint64_t(x) * uint64_t(y)); } };
template <class T> struct MulHi { static T of(T x, T y) { return T(Wide<T>(x) * Wide<T>(y) >> (sizeof(T) * 8)); } };
template <class T> struct MulWide { static Wide<T> of(T x, T y) { return Wide<T>(x) * Wide<T>(y); } };
template <class T> struct MadLo { static T of(T x, T y, T z) { return Add<T>::of(MulLo<T>::of(x, y), z); } };
template <class T> struct MadHi { static T of(T x, T y, T z) { return Add<T>::of(MulHi<T>::of(x, y), z); } };
template <class T> struct MadWide {
    static Wide<T> of(T x, T y, Wide<T> z) { return Add<Wide<T>>::of(MulWide<T>::of(x, y), z); }
};
template <class T> struct Div {
    static T of(T x, T y) {
        if (y == 0) return T(~T(0));  // unspecified by PTX
        if (std::is_signed_v<T> && y == T(-1)) return Sub<T>::of(0, x);
        return T(x / y);
    }
};
template <class T> struct Rem {
    static T of(T x, T y) {
        if (y == 0) return x;  // unspecified by PTX
        return std::is_signed_v<T> && y == T(-1) ? T(0) : T(x % y);
    }
};
template <class T> struct Min { static T of(T x, T y) { return std::min(x, y); } };
template <class T> struct Max { static T of(T x, T y) { return std::max(x, y); } };
template <class T> struct Neg { static T of(T x) { return Sub<T>::of(0, x); } };
template <class T> struct Abs { static T of(T x) { return x < 0 ? Sub<T>::of(0, x) : x; } };
template <class T> struct Sad { static T of(T x, T y, T z) { return Add<T>::of(z, x < y ? Sub<T>::of(y, x) : Sub<T>::of(x, y)); } };
template <class T> struct And { static T of(T x, T y) { return T(x & y); } };
template <class T> struct Or { static T of(T x, T y) { return T(x | y); } };
template <class T> struct Xor { static T of(T x, T y) { return T(x ^ y); } };
template <class T> struct Not { static T of(T x) { return T(~x); } };
template <class T> struct Cnot { static T of(T x) { return T(x == 0); } };
template <class T> struct Same { static T of(T x) { return x; } };
struct AddSat {
    static int32_t of(int32_t x, int32_t y) { return int32_t(std::clamp<int64_t>(int64_t(x) + y, INT32_MIN, INT32_MAX)); }
};
struct SubSat {
    static int32_t of(int32_t x, int32_t y) { return int32_t(std::clamp<int64_t>(int64_t(x) - y, INT32_MIN, INT32_MAX)); }
};
template <class T> struct Popc { static uint32_t of(T x) { return uint32_t(__builtin_popcountll(x)); } };
template <class T> struct Clz {
    static uint32_t of(T x) { return x ? uint32_t(__builtin_clzll(x)) - (64 - sizeof(T) * 8) : sizeof(T) * 8; }
};
template <class T> struct Brev {
    static T of(T x) {
        T result = 0;
        for (unsigned b = 0; b < sizeof(T) * 8; ++b) result |= (x >> b & 1) << (sizeof(T) * 8 - 1 - b);
        return result;
    }
};
template <class T> struct Bfind {  // the highest bit that differs from the sign
    static uint32_t of(T x) {
        Unsigned<T> y = x < 0 ? Unsigned<T>(~x) : Unsigned<T>(x);
        return y ? 63 - uint32_t(__builtin_clzll(y)) : ~0u;
    }
};

// Shift amounts and bit positions are u32, whatever the type; a shift clamps at the width.
template <class T>
void shift_left(Warp& w, const Instr& i, Mask m) {
    T* d = w.reg<T>(i.a[0]);
    const T* x = w.reg<T>(i.a[1]);
    const uint32_t* n = w.reg<uint32_t>(i.a[2]);
    for_lanes(m, [=](int l) { d[l] = n[l] < sizeof(T) * 8 ? T(x[l] << n[l]) : T(0); });
}
template <class T>
void shift_right(Warp& w, const Instr& i, Mask m) {
    T* d = w.reg<T>(i.a[0]);
    const T* x = w.reg<T>(i.a[1]);
    const uint32_t* n = w.reg<uint32_t>(i.a[2]);
    for_lanes(m, [=](int l) { d[l] = n[l] < sizeof(T) * 8 ? T(x[l] >> n[l]) : T(x[l] < 0 ? -1 : 0); });
}

// shf joins b:a to 64 bits. a: result, a, b, count. clamp stops at 32, wrap takes the count modulo 32.
template <bool LEFT, bool CLAMP>
void funnel(Warp& w, const Instr& i, Mask m) {
    uint32_t* d = w.reg<uint32_t>(i.a[0]);
    const uint32_t *low = w.reg<uint32_t>(i.a[1]), *high = w.reg<uint32_t>(i.a[2]), *count = w.reg<uint32_t>(i.a[3]);
    for_lanes(m, [=](int l) {
        uint32_t n = CLAMP ? std::min(count[l], 32u) : count[l] & 31;
        uint64_t both = uint64_t(high[l]) << 32 | low[l];
        d[l] = LEFT ? uint32_t(both << n >> 32) : uint32_t(both >> n);
    });
}

// a: result, source, position, length. Bits past the top repeat the sign bit: the last bit of the field, or of the
// source if the field reaches past it.
template <class T>
void extract(Warp& w, const Instr& i, Mask m) {
    constexpr uint32_t BITS = sizeof(T) * 8;
    T* d = w.reg<T>(i.a[0]);
    const T* x = w.reg<T>(i.a[1]);
    const uint32_t *position = w.reg<uint32_t>(i.a[2]), *length = w.reg<uint32_t>(i.a[3]);
    for_lanes(m, [=](int l) {
        uint32_t p = position[l] & 255, n = length[l] & 255;
        bool sign = std::is_signed_v<T> && n && x[l] >> std::min(p + n - 1, BITS - 1) & 1;
        Unsigned<T> field = p < BITS ? Unsigned<T>(x[l]) >> p : 0;
        uint32_t kept = std::min(n, p < BITS ? BITS - p : 0);
        if (kept < BITS) {
            Unsigned<T> low = (Unsigned<T>(1) << kept) - 1;
            field = sign ? field | Unsigned<T>(~low) : field & low;
        }
        d[l] = T(field);
    });
}

// a: result, the bits, where they go, position, length
template <class T>
void insert(Warp& w, const Instr& i, Mask m) {
    constexpr uint32_t BITS = sizeof(T) * 8;
    T* d = w.reg<T>(i.a[0]);
    const T *x = w.reg<T>(i.a[1]), *into = w.reg<T>(i.a[2]);
    const uint32_t *position = w.reg<uint32_t>(i.a[3]), *length = w.reg<uint32_t>(i.a[4]);
    for_lanes(m, [=](int l) {
        uint32_t p = position[l] & 255, n = length[l] & 255;
        T low = n < BITS ? (T(1) << n) - 1 : T(~T(0)), field = p < BITS ? T(low << p) : T(0);
        d[l] = (into[l] & ~field) | (p < BITS ? (x[l] << p) & field : 0);
    });
}

// a: result, a, b, c, truth table
void lop3(Warp& w, const Instr& i, Mask m) {
    uint32_t* d = w.reg<uint32_t>(i.a[0]);
    const uint32_t *a = w.reg<uint32_t>(i.a[1]), *b = w.reg<uint32_t>(i.a[2]), *c = w.reg<uint32_t>(i.a[3]);
    uint32_t table = *w.reg<uint32_t>(i.a[4]);
    for_lanes(m, [=](int l) {
        uint32_t result = 0;
        for (uint32_t row = 0; row < 8; ++row)
            if (table >> row & 1)
                result |= (row & 4 ? a[l] : ~a[l]) & (row & 2 ? b[l] : ~b[l]) & (row & 1 ? c[l] : ~c[l]);
        d[l] = result;
    });
}

// a: result, a, b, selector: four nibbles, each the number of a byte of b:a, its top bit asking for the sign instead
void permute(Warp& w, const Instr& i, Mask m) {
    uint32_t* d = w.reg<uint32_t>(i.a[0]);
    const uint32_t *a = w.reg<uint32_t>(i.a[1]), *b = w.reg<uint32_t>(i.a[2]), *selector = w.reg<uint32_t>(i.a[3]);
    for_lanes(m, [=](int l) {
        uint64_t both = uint64_t(b[l]) << 32 | a[l];
        uint32_t result = 0;
        for (int byte = 0; byte < 4; ++byte) {
            uint32_t pick = selector[l] >> (4 * byte) & 15;
            uint32_t value = uint32_t(both >> (8 * (pick & 7)) & 255);
            if (pick & 8) value = value & 128 ? 255 : 0;
            result |= value << (8 * byte);
        }
        d[l] = result;
    });
}

// a: result, if true, if false, predicate, flip
template <class T>
void select(Warp& w, const Instr& i, Mask m) {
    T* d = w.reg<T>(i.a[0]);
    const T *x = w.reg<T>(i.a[1]), *y = w.reg<T>(i.a[2]);
    Mask p = w.pred(i.a[3]) ^ Mask(i.a[4]);
    for_lanes(m, [=](int l) { d[l] = p >> l & 1 ? x[l] : y[l]; });
}

// a: result, if c >= 0, otherwise, c
template <class T, class C>
void select_sign(Warp& w, const Instr& i, Mask m) {
    T* d = w.reg<T>(i.a[0]);
    const T *x = w.reg<T>(i.a[1]), *y = w.reg<T>(i.a[2]);
    const C* c = w.reg<C>(i.a[3]);
    for_lanes(m, [=](int l) { d[l] = c[l] >= 0 ? x[l] : y[l]; });
}

// Predicates are masks. a: result, sources with their flips
template <class F>
void predicate(Warp& w, const Instr& i, Mask m) {
    Mask value = F::of(w.pred(i.a[1]) ^ Mask(i.a[2]), w.pred(i.a[3]) ^ Mask(i.a[4]));
    Mask& d = w.pred(i.a[0]);
    d = (d & ~m) | (value & m);
}

// mov between a register and the narrower registers that fill it. a: number of parts, whole, parts
template <class W, class P, bool PACK>
void repack(Warp& w, const Instr& i, Mask m) {
    W* whole = w.reg<W>(i.a[1]);
    for (int part = 0; part < i.a[0]; ++part) {
        P* piece = w.reg<P>(i.a[2 + part]);
        int shift = part * int(sizeof(P)) * 8;
        if (!PACK) for_lanes(m, [=](int l) { piece[l] = P(whole[l] >> shift); });
        else if (part == 0) for_lanes(m, [=](int l) { whole[l] = piece[l]; });
        else for_lanes(m, [=](int l) { whole[l] |= W(piece[l]) << shift; });
    }
}

// add.cc and its kin: the carry is a mask that the warp keeps at a.[4]. a: result, x, y, z, carry
template <bool SUBTRACT, bool IN, bool OUT>
void with_carry(Warp& w, const Instr& i, Mask m) {
    uint32_t* d = w.reg<uint32_t>(i.a[0]);
    const uint32_t *x = w.reg<uint32_t>(i.a[1]), *y = w.reg<uint32_t>(i.a[2]);
    Mask before = w.pred(i.a[3]), after = 0;
    for_lanes(m, [&](int l) {
        uint64_t carry = IN ? before >> l & 1 : SUBTRACT;
        uint64_t sum = uint64_t(x[l]) + (SUBTRACT ? uint32_t(~y[l]) : y[l]) + carry;
        d[l] = uint32_t(sum);
        after |= Mask(sum >> 32) << l;
    });
    if (OUT) w.pred(i.a[3]) = (before & ~m) | (after & m);
}

template <class T>
void add_arithmetic(Table& t, const std::string& type) {
    t["add." + type] = {binary<T, T, Add<T>>, 0};
    t["sub." + type] = {binary<T, T, Sub<T>>, 0};
    t["mul.lo." + type] = {binary<T, T, MulLo<T>>, 0};
    t["mul.hi." + type] = {binary<T, T, MulHi<T>>, 0};
    t["mad.lo." + type] = {ternary<T, T, T, MadLo<T>>, 0};
    t["mad.hi." + type] = {ternary<T, T, T, MadHi<T>>, 0};
    if constexpr (sizeof(T) < 8) {
        t["mul.wide." + type] = {binary<Wide<T>, T, MulWide<T>>, 0};
        t["mad.wide." + type] = {ternary<Wide<T>, T, Wide<T>, MadWide<T>>, 0};
    }
    t["div." + type] = {binary<T, T, Div<T>>, 0};
    t["rem." + type] = {binary<T, T, Rem<T>>, 0};
    t["min." + type] = {binary<T, T, Min<T>>, 0};
    t["max." + type] = {binary<T, T, Max<T>>, 0};
    t["sad." + type] = {ternary<T, T, T, Sad<T>>, 0};
    t["shr." + type] = {shift_right<T>, 0};
    if constexpr (sizeof(T) >= 4) {
        t["bfe." + type] = {extract<T>, 0};
        t["bfind." + type] = {unary<uint32_t, T, Bfind<T>>, 0};
    }
    if constexpr (std::is_signed_v<T>) {
        t["neg." + type] = {unary<T, T, Neg<T>>, 0};
        t["abs." + type] = {unary<T, T, Abs<T>>, 0};
    }
}

template <class T>
void add_bits(Table& t, const std::string& type) {
    t["and." + type] = {binary<T, T, And<T>>, 0};
    t["or." + type] = {binary<T, T, Or<T>>, 0};
    t["xor." + type] = {binary<T, T, Xor<T>>, 0};
    t["not." + type] = {unary<T, T, Not<T>>, 0};
    t["cnot." + type] = {unary<T, T, Cnot<T>>, 0};
    t["shl." + type] = {shift_left<T>, 0};
    t["shr." + type] = {shift_right<T>, 0};
    if constexpr (sizeof(T) >= 4) {
        t["popc." + type] = {unary<uint32_t, T, Popc<T>>, 0};
        t["clz." + type] = {unary<uint32_t, T, Clz<T>>, 0};
        t["brev." + type] = {unary<T, T, Brev<T>>, 0};
        t["bfi." + type] = {insert<T>, 0};
    }
    std::string bits = type.substr(1);
    for (std::string kind : {"b", "s", "u", "f"}) {
        t["mov." + kind + bits] = {unary<T, T, Same<T>>, 0};
        t["selp." + kind + bits] = {select<T>, 0};
        t["slct." + kind + bits + ".s32"] = {select_sign<T, int32_t>, 0};
        t["slct." + kind + bits + ".f32"] = {select_sign<T, float>, 0};
    }
}

}  // namespace

void add_integer(Table& t) {
    add_arithmetic<int16_t>(t, "s16");
    add_arithmetic<uint16_t>(t, "u16");
    add_arithmetic<int32_t>(t, "s32");
    add_arithmetic<uint32_t>(t, "u32");
    add_arithmetic<int64_t>(t, "s64");
    add_arithmetic<uint64_t>(t, "u64");
    t["add.s32"] = {[](Warp& w, const Instr& i, Mask m) {
                        (i.mods & SAT ? binary<int32_t, int32_t, AddSat> : binary<int32_t, int32_t, Add<int32_t>>)(w, i, m);
                    }, SAT};
    t["sub.s32"] = {[](Warp& w, const Instr& i, Mask m) {
                        (i.mods & SAT ? binary<int32_t, int32_t, SubSat> : binary<int32_t, int32_t, Sub<int32_t>>)(w, i, m);
                    }, SAT};
    add_bits<uint16_t>(t, "b16");
    add_bits<uint32_t>(t, "b32");
    add_bits<uint64_t>(t, "b64");
    t["shf.l.wrap.b32"] = {funnel<true, false>, 0};
    t["shf.l.clamp.b32"] = {funnel<true, true>, 0};
    t["shf.r.wrap.b32"] = {funnel<false, false>, 0};
    t["shf.r.clamp.b32"] = {funnel<false, true>, 0};
    t["lop3.b32"] = {lop3, 0};
    t["prmt.b32"] = {permute, 0};
    t["and.pred"] = {predicate<And<Mask>>, 0};
    t["or.pred"] = {predicate<Or<Mask>>, 0};
    t["xor.pred"] = {predicate<Xor<Mask>>, 0};
    t["not.pred"] = t["mov.pred"] = {predicate<Or<Mask>>, 0};  // lower.py gives the source twice, flipped for not
    t["pack.16.32"] = {repack<uint32_t, uint16_t, true>, 0};
    t["pack.32.64"] = {repack<uint64_t, uint32_t, true>, 0};
    t["pack.16.64"] = {repack<uint64_t, uint16_t, true>, 0};
    t["unpack.16.32"] = {repack<uint32_t, uint16_t, false>, 0};
    t["unpack.32.64"] = {repack<uint64_t, uint32_t, false>, 0};
    t["unpack.16.64"] = {repack<uint64_t, uint16_t, false>, 0};
    for (std::string type : {"u32", "s32"}) {
        t["add.cc." + type] = {with_carry<false, false, true>, 0};
        t["addc.cc." + type] = {with_carry<false, true, true>, 0};
        t["addc." + type] = {with_carry<false, true, false>, 0};
        t["sub.cc." + type] = {with_carry<true, false, true>, 0};
        t["subc.cc." + type] = {with_carry<true, true, true>, 0};
        t["subc." + type] = {with_carry<true, true, false>, 0};
    }
}

}  // namespace ptxsim
