// ld, st, cp.async and address conversion.
#include <algorithm>
#include <cstring>

#include "machine.h"

namespace ptxsim {
namespace {

uint8_t* local_bytes(Warp& w, int lane, uint64_t address, uint32_t size, const char* what) {
  Machine& machine = *w.machine;
  check_alignment(w, lane, address, size, what);
  if (address + size <= machine.local_bytes) return &machine.local[size_t(w.thread(lane)) * machine.local_bytes + address];
  if (machine.checks_for(Check::BOUNDS))
    machine.fault(w, lane, Fault::OUT_OF_BOUNDS,
                  what + std::to_string(size) + " bytes at local memory + " + std::to_string(address) + " (of " +
                      std::to_string(machine.local_bytes) + " bytes)");
  return nullptr;
}

const uint8_t* param_bytes(Warp& w, int lane, uint64_t address, uint32_t size) {
  Machine& machine = *w.machine;
  if (address + size > machine.param_bytes)
    machine.fault(w, lane, Fault::OUT_OF_BOUNDS, "reads parameters + " + std::to_string(address));
  return machine.params + address;
}

// Registers take a value of `bytes` bytes, by its sign if they are wider.
void put(Warp& w, int32_t reg, int reg_bytes, int lane, const uint8_t* value, int bytes, bool sign) {
  int64_t wide = 0;
  memcpy(&wide, value, size_t(bytes));
  if (sign) wide = wide << (64 - 8 * bytes) >> (64 - 8 * bytes);
  memcpy(w.regs + reg + lane * reg_bytes, &wide, size_t(reg_bytes));
}

enum { BASE, BASE_BYTES, OFFSET, BYTES, COUNT, REG_BYTES, SIGN, STRONG, REGS };

// a: base, its bytes, offset, bytes of an element, elements, bytes of a register, sign, strong, registers
template <Space SPACE> void load(Warp& w, const Instr& i, Mask m) {
  const int32_t* a = i.a;
  uint32_t size = uint32_t(a[BYTES] * a[COUNT]);
  Request request(w, Use::READ);
  Wavefronts wavefronts(w, size);
  for (Mask rest = m; rest; rest &= rest - 1) {
    int lane = __builtin_ctz(rest);
    uint64_t address = w.address(a[BASE], a[BASE_BYTES], a[OFFSET], lane), whole = address;
    const uint8_t* from = nullptr;
    switch (resolve(SPACE, address)) {
      case Space::SHARED:
        from = w.machine->shared.read(w, lane, address, size, a[STRONG]);
        wavefronts.add(lane, uint32_t(address));
        break;
      case Space::LOCAL: from = local_bytes(w, lane, address, size, "reads "); break;
      case Space::PARAM: from = param_bytes(w, lane, address, size); break;
      default:
        from = w.machine->memory.access(w, lane, whole, size, Use::READ, a[STRONG]);
        if (from) request.add(whole, size);
    }
    static const uint8_t ZEROS[32] = {};
    if (!from) from = ZEROS;
    for (int e = 0; e < a[COUNT]; ++e) put(w, a[REGS + e], a[REG_BYTES], lane, from + e * a[BYTES], a[BYTES], a[SIGN]);
  }
}

// a: as load
template <Space SPACE> void store(Warp& w, const Instr& i, Mask m) {
  const int32_t* a = i.a;
  uint32_t size = uint32_t(a[BYTES] * a[COUNT]);
  Request request(w, Use::WRITE);
  Wavefronts wavefronts(w, size);
  for (Mask rest = m; rest; rest &= rest - 1) {
    int lane = __builtin_ctz(rest);
    uint64_t address = w.address(a[BASE], a[BASE_BYTES], a[OFFSET], lane), whole = address;
    uint8_t value[32];
    for (int e = 0; e < a[COUNT]; ++e)
      memcpy(value + e * a[BYTES], w.regs + a[REGS + e] + lane * a[REG_BYTES], size_t(a[BYTES]));
    uint8_t* to = nullptr;
    switch (resolve(SPACE, address)) {
      case Space::SHARED:
        w.machine->shared.write(w, lane, address, size, value, a[STRONG]);
        wavefronts.add(lane, uint32_t(address));
        break;
      case Space::LOCAL: to = local_bytes(w, lane, address, size, "writes "); break;
      default:
        to = w.machine->memory.access(w, lane, whole, size, Use::WRITE, a[STRONG]);
        if (to) request.add(whole, size);
    }
    if (to) memcpy(to, value, size);
  }
}

// a: shared base, its bytes, offset, global base, its bytes, offset, size, register of the bytes to read (-1: all)
void copy_async(Warp& w, const Instr& i, Mask m) {
  const int32_t* a = i.a;
  uint32_t size = uint32_t(a[6]);
  Request request(w, Use::READ);
  Wavefronts wavefronts(w, size);
  for (Mask rest = m; rest; rest &= rest - 1) {
    int lane = __builtin_ctz(rest);
    uint64_t to = w.address(a[0], a[1], a[2], lane), from = w.address(a[3], a[4], a[5], lane);
    resolve(Space::GENERIC, to);
    uint32_t read = a[7] < 0 ? size : std::min(w.reg<uint32_t>(a[7])[lane], size);
    Copy copy{uint32_t(to), uint8_t(lane), uint8_t(size), w.groups[lane], {}};
    if (read) {
      const uint8_t* source = w.machine->memory.access(w, lane, from, read, Use::READ, false, size);
      if (source) {
        memcpy(copy.data, source, read);
        request.add(from, read);
      }
    }
    wavefronts.add(lane, copy.address);
    if (w.machine->shared.begin_copy(w, lane, to, size)) w.copies.push_back(copy);
  }
}

void commit_group(Warp& w, const Instr&, Mask m) {
  for_lanes(m, [&](int lane) { w.groups[lane] += 1; });
}

// Lands the copies of all but the last `pending` groups of each lane, and with `all` those of no group too.
void land(Warp& w, Mask m, uint32_t pending, bool all) {
  auto lands = [&](const Copy& c) {
    if (!(m >> c.lane & 1)) return false;
    if (!all && c.group + pending >= w.groups[c.lane]) return false;
    w.machine->shared.land(w, c.lane, c.address, c.size, c.data);
    return true;
  };
  w.copies.erase(std::remove_if(w.copies.begin(), w.copies.end(), lands), w.copies.end());
}

// a: pending groups
void wait_group(Warp& w, const Instr& i, Mask m) { land(w, m, uint32_t(i.a[0]), false); }

void wait_all(Warp& w, const Instr&, Mask m) { land(w, m, 0, true); }

// a: result, source, direction (1: to generic), window
void convert_address(Warp& w, const Instr& i, Mask m) {
  uint64_t *d = w.reg<uint64_t>(i.a[0]), *x = w.reg<uint64_t>(i.a[1]);
  uint64_t window = uint64_t(i.a[3]) << WINDOW_BITS;
  bool generic = i.a[2];
  for_lanes(m, [=](int l) { d[l] = generic ? x[l] | window : x[l] & ~window; });
}

// a: predicate, source, window
void is_space(Warp& w, const Instr& i, Mask m) {
  const uint64_t* x = w.reg<uint64_t>(i.a[1]);
  Mask& p = w.pred(i.a[0]);
  p = (p & ~m) | which_lanes(m, [&](int l) { return x[l] >> WINDOW_BITS == uint64_t(i.a[2]); });
}

}  // namespace

void add_memory(Table& t) {
  t["ld"] = {load<Space::GENERIC>};
  t["ld.global"] = t["ld.const"] = {load<Space::GLOBAL>};
  t["ld.shared"] = {load<Space::SHARED>};
  t["ld.local"] = {load<Space::LOCAL>};
  t["ld.param"] = {load<Space::PARAM>};
  t["st"] = {store<Space::GENERIC>};
  t["st.global"] = {store<Space::GLOBAL>};
  t["st.shared"] = {store<Space::SHARED>};
  t["st.local"] = {store<Space::LOCAL>};
  t["cp.async"] = {copy_async};
  t["cp.async.commit_group"] = {commit_group};
  t["cp.async.wait_group"] = {wait_group};
  t["cp.async.wait_all"] = {wait_all};
  t["cvta"] = {convert_address};
  t["isspacep"] = {is_space};
}

}  // namespace ptxsim
