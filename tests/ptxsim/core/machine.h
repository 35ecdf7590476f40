// What every part of the simulator shares: instructions, warps, blocks, and the table of operations.
#pragma once

#include <cstdint>
#include <string>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#include "memory.h"

namespace ptxsim {

constexpr int LANES = 32;
using Mask = uint32_t;
constexpr Mask ALL_LANES = ~Mask{0};

// Modifiers of an instruction, as lower.py numbers them.
enum Mod : uint32_t {
  FTZ = 1 << 0,
  SAT = 1 << 1,
  RN = 1 << 2,
  RZ = 1 << 3,
  RM = 1 << 4,
  RP = 1 << 5,
  RNI = 1 << 6,
  RZI = 1 << 7,
  RMI = 1 << 8,
  RPI = 1 << 9,
  RNA = 1 << 10,
  APPROX = 1 << 11,
  FULL = 1 << 12,
  NANS = 1 << 13,
  RELU = 1 << 14,
};

// One PTX instruction, laid out as lower.py packs it. Operands are offsets into the warp's register file, immediates or
// instruction indices, in the order that the operation's handler states.
struct Instr {
  int32_t op;
  int32_t guard;        // offset of the guarding predicate, -1 without one
  uint32_t guard_flip;  // ~0 for @!p
  uint32_t mods;
  int32_t a[20];
};

struct Machine;
struct Block;

// The join of a divergent branch, or its other side: lanes that continue at `pc` until they meet at `reconverge`.
struct Frame {
  int32_t pc;
  int32_t reconverge;
  Mask lanes;
};

// A cp.async between its issue and the wait that lands it.
struct Copy {
  uint32_t address;
  uint8_t lane, size;
  uint32_t group;
  uint8_t data[16];
};

enum class Status { RUNNING, WAITING, DONE };

// 32 threads. A register holds its 32 lanes side by side (u16, u32 or u64); a predicate is one mask.
struct Warp {
  Machine* machine;
  Block* block;
  uint8_t* regs;
  int32_t index;
  Status status;
  int32_t pc, reconverge;
  Mask live, active;
  std::vector<Frame> frames;
  std::vector<Copy> copies;
  uint32_t groups[LANES];  // cp.async groups that each lane has committed
  const Instr* reduction;  // the bar.red that this warp waits in

  template <class T> T* reg(int32_t offset) { return reinterpret_cast<T*>(regs + offset); }
  Mask& pred(int32_t offset) { return *reg<Mask>(offset); }
  uint32_t thread(int lane) const { return uint32_t(index) * LANES + uint32_t(lane); }
  // Where `lane` points: base register of `width` bytes plus an immediate.
  uint64_t address(int32_t base, int32_t width, int32_t offset, int lane) {
    return width == 8 ? reg<uint64_t>(base)[lane] + uint64_t(int64_t(offset))
                      : uint64_t(reg<uint32_t>(base)[lane] + uint32_t(offset));
  }
  void next_frame();
};

// A named barrier of a block.
struct Barrier {
  uint32_t expected = 0;  // warps; 0: all that live
  std::vector<Warp*> members, waiting;
  uint32_t known[32] = {};  // what its members knew when they arrived: SharedMemory::clock of those who wait
  uint32_t count = 0;  // bar.red: threads whose predicate holds
  bool all = true;
};

struct Block {
  uint32_t index;
  std::vector<Warp> warps;
  Barrier barriers[16];
};

using Handler = void (*)(Warp&, const Instr&, Mask);
struct Operation {
  Handler run;
  uint32_t mods = 0;  // the modifiers that it implements
};
using Table = std::unordered_map<std::string, Operation>;

void add_control(Table&);
void add_integer(Table&);
void add_float(Table&);
void add_convert(Table&);
void add_memory(Table&);
void add_collective(Table&);
void add_tensor(Table&);
void add_atomic(Table&);

// Counters of one launch, one entry for each static instruction.
struct Counters {
  uint64_t *executed, *threads, *passes, *ideal;
  uint64_t macs, barriers;
};

// Everything about a launch, as launch.py lays it out.
struct Launch {
  const Instr* code;
  uint32_t instructions, register_bytes;
  const int64_t* constants;
  uint32_t constant_count, checks;
  int32_t lane_registers[10], ctaid[3];
  uint32_t grid[3], block_shape[3];
  uint32_t shared_bytes, local_bytes, param_bytes;
  const uint8_t* params;
  Memory memory;
  const uint64_t* block_order;
  uint64_t seed, max_steps;
  Counters counters;
};

// The state of a running launch: its seed and max_steps run on.
struct Machine : Launch {
  std::vector<Handler> handlers;
  SharedMemory shared;
  std::vector<uint8_t> local;  // of the block that runs: [thread][byte]

  [[noreturn]] void fault(const Warp& w, int lane, Fault::Kind kind, const std::string& message);
  bool checks_for(Check check) const { return checks >> uint32_t(check) & 1; }
  void run_block(Block& block);
  Barrier& arrive(Warp& w, uint32_t id, uint32_t expected, bool waits);
  void complete_barriers(Block& block);
};

// f(lane) for each lane of the mask; a full mask is the loop that compilers vectorise. A handler's operands may be the
// same register but never overlap in part, so lanes are independent.
template <class F> inline void for_lanes(Mask mask, F f) {
  if (mask == ALL_LANES) {
#pragma GCC ivdep
    for (int lane = 0; lane < LANES; ++lane) f(lane);
  } else {
    for (Mask rest = mask; rest; rest &= rest - 1) f(__builtin_ctz(rest));
  }
}

// D d = f(S x, ...) for each lane and each of the PER values that a register holds for it. a: result, sources.
template <int PER, class D, class... S, class F> void elementwise(Warp& w, const Instr& i, Mask mask, F f) {
  [&]<size_t... N>(std::index_sequence<N...>) {
    D* d = w.reg<D>(i.a[0]);
    auto sources = std::make_tuple(w.reg<const S>(i.a[1 + N])...);
    for_lanes(mask, [=](int lane) {
      for (int e = lane * PER; e < lane * PER + PER; ++e) d[e] = f(std::get<N>(sources)[e]...);
    });
  }(std::index_sequence_for<S...>{});
}

template <auto F, class D, class... S> void lanewise(Warp& w, const Instr& i, Mask mask) {
  elementwise<1, D, S...>(w, i, mask, F);
}

// The mask of those lanes for which f(lane) holds.
template <class F> inline Mask which_lanes(Mask mask, F f) {
  Mask result = 0;
  for (int lane = 0; lane < LANES; ++lane) result |= Mask(bool(f(lane))) << lane;
  return result & mask;
}

}  // namespace ptxsim
