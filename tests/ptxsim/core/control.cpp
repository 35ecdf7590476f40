// Control flow: branches, exits, barriers.
#include "machine.h"

namespace ptxsim {
namespace {

void exit_lanes(Warp& w, const Instr&, Mask lanes) {
  w.live &= ~lanes;
  w.active &= ~lanes;
}

bool leaves(const Warp& w, int32_t pc) {
  return w.machine->handlers[size_t(pc)] == exit_lanes && w.machine->code[pc].guard < 0;
}

// A side that leads to an exit alone is gone at once: barriers on the other side do not wait for its lanes.
// a: target, where the two sides meet (-1: nowhere)
void branch(Warp& w, const Instr& i, Mask taken) {
  Mask other = w.active & ~taken;
  if (other && leaves(w, i.a[0])) return exit_lanes(w, i, taken);
  if (other && leaves(w, w.pc)) exit_lanes(w, i, other), other = 0;
  if (other) {
    int32_t join = i.a[1] < 0 ? w.reconverge : i.a[1];
    if (join != w.reconverge) w.frames.push_back({join, w.reconverge, w.active});
    if (w.pc != join) w.frames.push_back({w.pc, join, other});
    w.reconverge = join;
    w.active = taken;
  }
  w.pc = i.a[0];
}

void trap(Warp& w, const Instr&, Mask lanes) {
  w.machine->fault(w, __builtin_ctz(lanes), Fault::TRAPPED, "the kernel trapped");
}

void failed_assert(Warp& w, const Instr&, Mask lanes) {
  w.machine->fault(w, __builtin_ctz(lanes), Fault::TRAPPED, "a device assert failed");
}

void nothing(Warp&, const Instr&, Mask) {}

void check_whole(Warp& w, Mask lanes) {
  if (lanes != w.live && w.machine->checks_for(Check::BARRIERS))
    w.machine->fault(w, __builtin_ctz(w.live & ~lanes), Fault::DIVERGENT_BARRIER,
                     "is not at the barrier that other threads of its warp have reached");
}

// a: id register, count register (-1: all threads)
Barrier& arrive(Warp& w, const Instr& i, Mask lanes, bool waits) {
  check_whole(w, lanes);
  int lane = __builtin_ctz(lanes);
  uint32_t id = w.reg<uint32_t>(i.a[0])[lane], count = i.a[1] < 0 ? 0 : w.reg<uint32_t>(i.a[1])[lane];
  if (id >= 16 || count % LANES)
    w.machine->fault(w, lane, Fault::STUCK,
                     "barrier " + std::to_string(id) + " for " + std::to_string(count) + " threads: no such barrier");
  return w.machine->arrive(w, id, count / LANES, waits);
}

void sync(Warp& w, const Instr& i, Mask lanes) { arrive(w, i, lanes, true); }

void arrive_only(Warp& w, const Instr& i, Mask lanes) { arrive(w, i, lanes, false); }

// a: result and kind (see Machine::complete_barriers), id, count, predicate, flip
void reduce(Warp& w, const Instr& i, Mask lanes) {
  Instr barrier = i;
  barrier.a[0] = i.a[2], barrier.a[1] = i.a[3];
  Barrier& b = arrive(w, barrier, lanes, true);
  Mask holds = (w.pred(i.a[4]) ^ Mask(i.a[5])) & lanes;
  b.count += uint32_t(__builtin_popcount(holds));
  b.all &= holds == lanes;
  w.reduction = &i;
}

}  // namespace

void add_control(Table& t) {
  t["bra"] = {branch};
  t["exit"] = t["ret"] = {exit_lanes};
  t["trap"] = {trap};
  t["assert"] = {failed_assert};
  for (const char* name : {"membar", "fence", "nanosleep", "prefetch"}) t[name] = {nothing};
  t["bar.sync"] = {sync};
  t["bar.arrive"] = {arrive_only};
  t["bar.red"] = {reduce};
}

}  // namespace ptxsim
