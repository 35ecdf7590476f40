// atom and red, in global and shared memory. Lanes of one instruction act in their order.
#include <algorithm>
#include <type_traits>

#include "machine.h"
#include "number.h"

namespace ptxsim {
namespace {



template <class T> struct Add { static T of(T old, T b, T) { return T(old + b); } };
template <> struct Add<Half> { static Half of(Half old, Half b, Half) { return narrow<Half>(double(widen(old)) + widen(b)); } };
template <> struct Add<Bf16> { static Bf16 of(Bf16 old, Bf16 b, Bf16) { return narrow<Bf16>(double(widen(old)) + widen(b)); } };
template <class T> struct AddPair {
    static uint32_t of(uint32_t old, uint32_t b, uint32_t) {
        auto half = [](uint32_t x, uint32_t y) { return uint32_t(Add<T>::of({uint16_t(x)}, {uint16_t(y)}, {}).bits); };
        return half(old >> 16, b >> 16) << 16 | half(old & 0xFFFF, b & 0xFFFF);
    }
};
template <class T> struct Min { static T of(T old, T b, T) { return std::min(old, b); } };
template <class T> struct Max { static T of(T old, T b, T) { return std::max(old, b); } };
template <class T> struct And { static T of(T old, T b, T) { return old & b; } };
template <class T> struct Or { static T of(T old, T b, T) { return old | b; } };
template <class T> struct Xor { static T of(T old, T b, T) { return old ^ b; } };
template <class T> struct Exchange { static T of(T, T b, T) { return b; } };
template <class T> struct Compare { static T of(T old, T b, T c) { return old == b ? c : old; } };
template <class T> struct Inc { static T of(T old, T b, T) { return old >= b ? 0 : old + 1; } };
template <class T> struct Dec { static T of(T old, T b, T) { return old == 0 || old > b ? b : old - 1; } };

// a: result (-1: none), base, its bytes, offset, space, b, c (-1: none)
template <class T, class F>
void update(Warp& w, const Instr& i, Mask m) {
    Request request(w, Use::ATOMIC);
    Wavefronts wavefronts(w, sizeof(T));
    for (Mask rest = m; rest; rest &= rest - 1) {
        int lane = __builtin_ctz(rest);
        uint64_t address = w.address(i.a[1], i.a[2], i.a[3], lane);
        Space space = Space(i.a[4]);
        if (space == Space::GENERIC) {
            space = Space(address >> WINDOW_BITS);
            address &= (uint64_t{1} << WINDOW_BITS) - 1;
        }
        uint8_t* where;
        if (space == Space::SHARED) {
            where = w.machine->shared.atomic(w, lane, address, sizeof(T));
            wavefronts.add(lane, uint32_t(address));
        } else {
            where = w.machine->memory.access(w, lane, address, sizeof(T), Use::ATOMIC, true);
            if (where) request.add(address, sizeof(T));
        }
        if (!where) continue;
        T old, b = w.reg<T>(i.a[5])[lane], c = i.a[6] < 0 ? b : w.reg<T>(i.a[6])[lane];
        memcpy(&old, where, sizeof old);
        T value = F::of(old, b, c);
        memcpy(where, &value, sizeof value);
        if (i.a[0] >= 0) w.reg<T>(i.a[0])[lane] = old;
    }
}

template <class T>
void add_integers(Table& t, const std::string& type) {
    t["atom.add." + type] = {update<T, Add<T>>, 0};
    t["atom.min." + type] = {update<T, Min<T>>, 0};
    t["atom.max." + type] = {update<T, Max<T>>, 0};
}

template <class T>
void add_bits(Table& t, const std::string& type) {
    t["atom.and." + type] = {update<T, And<T>>, 0};
    t["atom.or." + type] = {update<T, Or<T>>, 0};
    t["atom.xor." + type] = {update<T, Xor<T>>, 0};
    t["atom.exch." + type] = {update<T, Exchange<T>>, 0};
    t["atom.cas." + type] = {update<T, Compare<T>>, 0};
}

}  // namespace

void add_atomic(Table& t) {
    add_integers<uint32_t>(t, "u32");
    add_integers<int32_t>(t, "s32");
    add_integers<uint64_t>(t, "u64");
    add_integers<int64_t>(t, "s64");
    add_bits<uint32_t>(t, "b32");
    add_bits<uint64_t>(t, "b64");
    t["atom.cas.b16"] = {update<uint16_t, Compare<uint16_t>>, 0};
    t["atom.inc.u32"] = {update<uint32_t, Inc<uint32_t>>, 0};
    t["atom.dec.u32"] = {update<uint32_t, Dec<uint32_t>>, 0};
    t["atom.add.f32"] = {update<float, Add<float>>, 0};
    t["atom.add.f64"] = {update<double, Add<double>>, 0};
    t["atom.add.f16"] = {update<Half, Add<Half>>, 0};
    t["atom.add.bf16"] = {update<Bf16, Add<Bf16>>, 0};
    t["atom.add.f16x2"] = {update<uint32_t, AddPair<Half>>, 0};
    t["atom.add.bf16x2"] = {update<uint32_t, AddPair<Bf16>>, 0};
}

}  // namespace ptxsim
