// What lanes of a warp do together: bar.warp.sync, shfl, vote, match, redux.
#include <algorithm>

#include "machine.h"

namespace ptxsim {
namespace {

// Every lane must be one of its own members, and all living members must be here.
void check_members(Warp& w, Mask lanes, int32_t members) {
  if (!w.machine->checks_for(Check::BARRIERS)) return;
  for (Mask rest = lanes; rest; rest &= rest - 1) {
    int lane = __builtin_ctz(rest);
    Mask mask = w.reg<Mask>(members)[lane];
    if (!(mask >> lane & 1))
      w.machine->fault(w, lane, Fault::DIVERGENT_BARRIER, "is not in the member mask of its warp collective");
    if (mask & w.live & ~lanes)
      w.machine->fault(w, lane, Fault::DIVERGENT_BARRIER, "meets in a warp collective with lanes that are elsewhere");
  }
}

// a: members
void warp_sync(Warp& w, const Instr& i, Mask lanes) {
  check_members(w, lanes, i.a[0]);
  w.machine->shared.next_epoch(uint32_t(w.index));
}

enum Shuffle { UP, DOWN, BFLY, IDX };

// a: result, predicate (-1: none), source, b, c, members. A lane that is not here gives all ones.
template <Shuffle MODE> void shuffle(Warp& w, const Instr& i, Mask m) {
  check_members(w, m, i.a[5]);
  uint32_t* d = w.reg<uint32_t>(i.a[0]);
  uint32_t source[LANES];
  std::copy_n(w.reg<uint32_t>(i.a[2]), LANES, source);
  const uint32_t *b = w.reg<uint32_t>(i.a[3]), *c = w.reg<uint32_t>(i.a[4]);
  Mask inside = 0;
  for (Mask rest = m; rest; rest &= rest - 1) {
    int lane = __builtin_ctz(rest);
    int n = int(b[lane] & 31), clamp = int(c[lane] & 31), segment = int(c[lane] >> 8 & 31);
    int last = (lane & segment) | (clamp & ~segment), first = lane & segment, from;
    bool ok;
    if (MODE == UP) from = lane - n, ok = from >= last;
    else if (MODE == DOWN) from = lane + n, ok = from <= last;
    else if (MODE == BFLY) from = lane ^ n, ok = from <= last;
    else from = first | (n & ~segment), ok = from <= last;
    if (!ok) from = lane;
    inside |= Mask(ok) << lane;
    d[lane] = m >> from & 1 ? source[from] : ~0u;
  }
  if (i.a[1] >= 0) w.pred(i.a[1]) = (w.pred(i.a[1]) & ~m) | inside;
}

// Calls f(lane, members present) for each lane, after the check.
template <class F> void for_members(Warp& w, Mask m, int32_t members, F f) {
  check_members(w, m, members);
  for (Mask rest = m; rest; rest &= rest - 1) {
    int lane = __builtin_ctz(rest);
    f(lane, w.reg<Mask>(members)[lane] & m);
  }
}

// a: result, predicate, flip, members
void ballot(Warp& w, const Instr& i, Mask m) {
  Mask holds = w.pred(i.a[1]) ^ Mask(i.a[2]);
  for_members(w, m, i.a[3], [&](int lane, Mask members) { w.reg<Mask>(i.a[0])[lane] = holds & members; });
}

enum Vote { ALL, ANY };

template <Vote MODE> void vote(Warp& w, const Instr& i, Mask m) {
  Mask holds = w.pred(i.a[1]) ^ Mask(i.a[2]), result = 0;
  for_members(w, m, i.a[3], [&](int lane, Mask members) {
    Mask yes = holds & members;
    bool value = MODE == ANY ? yes != 0 : yes == members;
    result |= Mask(value) << lane;
  });
  w.pred(i.a[0]) = (w.pred(i.a[0]) & ~m) | result;
}

// a: result, source, members
void match_any(Warp& w, const Instr& i, Mask m) {
  uint32_t x[LANES];
  std::copy_n(w.reg<uint32_t>(i.a[1]), LANES, x);
  for_members(w, m, i.a[2], [&](int lane, Mask members) {
    w.reg<Mask>(i.a[0])[lane] = which_lanes(members, [&](int l) { return x[l] == x[lane]; });
  });
}

// a: result, source, members
template <class T, auto F> void reduce(Warp& w, const Instr& i, Mask m) {
  T x[LANES];
  std::copy_n(w.reg<T>(i.a[1]), LANES, x);
  for_members(w, m, i.a[2], [&](int lane, Mask members) {
    T total = x[__builtin_ctz(members)];
    for (Mask rest = members & (members - 1); rest; rest &= rest - 1) total = F(total, x[__builtin_ctz(rest)]);
    w.reg<T>(i.a[0])[lane] = total;
  });
}

// a: result
void active_mask(Warp& w, const Instr& i, Mask m) {
  Mask* d = w.reg<Mask>(i.a[0]);
  for_lanes(m, [=](int lane) { d[lane] = m; });
}

}  // namespace

void add_collective(Table& t) {
  t["bar.warp.sync"] = {warp_sync};
  t["shfl.sync.up.b32"] = {shuffle<UP>};
  t["shfl.sync.down.b32"] = {shuffle<DOWN>};
  t["shfl.sync.bfly.b32"] = {shuffle<BFLY>};
  t["shfl.sync.idx.b32"] = {shuffle<IDX>};
  t["vote.sync.ballot.b32"] = {ballot};
  t["vote.sync.all.pred"] = {vote<ALL>};
  t["vote.sync.any.pred"] = {vote<ANY>};
  t["match.any.sync.b32"] = {match_any};
  using U = uint32_t;
  using S = int32_t;
  t["redux.sync.add.u32"] = t["redux.sync.add.s32"] = {reduce<U, [](U x, U y) { return x + y; }>};
  t["redux.sync.min.u32"] = {reduce<U, [](U x, U y) { return std::min(x, y); }>};
  t["redux.sync.min.s32"] = {reduce<S, [](S x, S y) { return std::min(x, y); }>};
  t["redux.sync.max.u32"] = {reduce<U, [](U x, U y) { return std::max(x, y); }>};
  t["redux.sync.max.s32"] = {reduce<S, [](S x, S y) { return std::max(x, y); }>};
  t["redux.sync.and.b32"] = {reduce<U, [](U x, U y) { return x & y; }>};
  t["redux.sync.or.b32"] = {reduce<U, [](U x, U y) { return x | y; }>};
  t["redux.sync.xor.b32"] = {reduce<U, [](U x, U y) { return x ^ y; }>};
  t["activemask.b32"] = {active_mask};
}

}  // namespace ptxsim
