// Running a grid: warps with divergence, block barriers, blocks in a given order. And the C interface to Python.
#include "machine.h"

#include <algorithm>
#include <cstring>
#include <iterator>

namespace ptxsim {

void Machine::fault(const Warp& w, int lane, Fault::Kind kind, const std::string& message) {
  throw Fault{kind, w.pc - 1, w.block->index, lane < 0 ? -1 : int64_t(w.thread(lane)), message};
}

// Lanes that have reached their join wait there; the next frame's lanes run. Without a frame the warp is done.
void Warp::next_frame() {
  while (!frames.empty()) {
    Frame f = frames.back();
    frames.pop_back();
    active = f.lanes & live;
    pc = f.pc;
    reconverge = f.reconverge;
    if (active && pc != reconverge) return;
  }
  status = Status::DONE;
}

namespace {

Table build_table() {
  Table table;
  add_control(table);
  add_integer(table);
  add_float(table);
  add_convert(table);
  add_memory(table);
  add_collective(table);
  add_tensor(table);
  add_atomic(table);
  return table;
}

const std::vector<std::pair<std::string, Operation>>& operations() {
  static const Table table = build_table();
  static const std::vector<std::pair<std::string, Operation>> list(table.begin(), table.end());
  return list;
}

uint64_t next_random(uint64_t& state) {  // splitmix64
  uint64_t z = state += 0x9E3779B97F4A7C15;
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
  z = (z ^ z >> 27) * 0x94D049BB133111EB;
  return z ^ z >> 31;
}

template <class T> void shuffle(std::vector<T>& items, uint64_t& random) {
  for (size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[next_random(random) % i]);
}

// Until the warp waits, is done, or has run `limit` instructions; how many it ran.
uint64_t run_warp(Warp& w, uint64_t limit) {
  Machine& machine = *w.machine;
  const Counters& counters = machine.counters;
  uint64_t steps = 0;
  for (; steps < limit && w.status == Status::RUNNING; ++steps) {
    const Instr& instr = machine.code[w.pc];
    Mask lanes = w.active;
    if (instr.guard >= 0) lanes &= w.pred(instr.guard) ^ instr.guard_flip;
    counters.executed[w.pc] += 1;
    counters.threads[w.pc] += uint64_t(__builtin_popcount(lanes));
    Handler run = machine.handlers[size_t(w.pc++)];
    if (lanes) run(w, instr, lanes);
    if (w.pc == w.reconverge || !w.active) w.next_frame();
  }
  return steps;
}

// A warp at the start of a block. Its registers hold ones, but constants (lower.py lists offset, bytes, value) and what
// each lane or warp finds in special registers, in the order of lower.LANE_REGISTERS.
void start_warp(Warp& w, const Machine& m) {
  const uint32_t *shape = m.block_shape, *grid = m.grid, block = w.block->index;
  uint32_t threads = shape[0] * shape[1] * shape[2], left = threads - uint32_t(w.index) * LANES;
  w.live = w.active = left >= LANES ? ALL_LANES : (Mask{1} << left) - 1;
  w.status = Status::RUNNING;
  w.pc = 0;
  w.reconverge = -1;
  w.frames.clear();
  w.copies.clear();
  w.reduction = nullptr;
  std::fill(w.groups, w.groups + LANES, 0);
  memset(w.regs, 0xFF, m.register_bytes);
  for (uint32_t c = 0; c < m.constant_count; ++c) {
    int64_t offset = m.constants[3 * c], bytes = m.constants[3 * c + 1], value = m.constants[3 * c + 2];
    int copies = bytes ? LANES : 1;  // a predicate is one mask
    for (int lane = 0; lane < copies; ++lane) memcpy(w.regs + offset + lane * bytes, &value, size_t(bytes ? bytes : 4));
  }
  for (int lane = 0; lane < LANES; ++lane) {
    uint32_t t = w.thread(lane), equal = 1u << lane, less = equal - 1;
    uint32_t x = t % shape[0], y = t / shape[0] % shape[1], z = t / shape[0] / shape[1], warp = uint32_t(w.index);
    uint32_t values[] = {x, y, z, uint32_t(lane), warp, equal, less, less | equal, ~(less | equal), ~less};
    for (size_t v = 0; v < std::size(values); ++v) w.reg<uint32_t>(m.lane_registers[v])[lane] = values[v];
  }
  uint32_t place[3] = {block % grid[0], block / grid[0] % grid[1], block / grid[0] / grid[1]};
  for (int axis = 0; axis < 3; ++axis) std::fill_n(w.reg<uint32_t>(m.ctaid[axis]), LANES, place[axis]);
}

}  // namespace

Barrier& Machine::arrive(Warp& w, uint32_t id, uint32_t expected, bool waits) {
  Barrier& b = w.block->barriers[id];
  auto warps = [&](uint32_t count) { return count ? count : uint32_t(w.block->warps.size()); };
  if (!b.members.empty() && warps(b.expected) != warps(expected))
    fault(w, -1, Fault::STUCK, "barrier " + std::to_string(id) + " is met with different thread counts");
  b.expected = std::max(b.expected, expected);
  b.members.push_back(&w);
  shared.arrive(uint32_t(w.index), b.known);
  if (waits) {
    b.waiting.push_back(&w);
    w.status = Status::WAITING;
  }
  return b;
}

void Machine::complete_barriers(Block& block) {
  size_t living = 0;
  for (const Warp& w : block.warps) living += w.status != Status::DONE;
  for (Barrier& b : block.barriers) {
    if (b.members.empty() || b.members.size() < (b.expected ? b.expected : living)) continue;
    for (Warp* w : b.waiting) {
      std::copy(b.known, b.known + 32, shared.clock[w->index]);
      w->status = Status::RUNNING;
      if (!w->reduction) continue;
      const Instr& i = *w->reduction;  // a: result, kind (0 popc, 1 and, 2 or)
      if (i.a[1] == 0) for_lanes(w->live, [&](int lane) { w->reg<uint32_t>(i.a[0])[lane] = b.count; });
      else w->pred(i.a[0]) = (i.a[1] == 1 ? b.all : b.count > 0) ? ALL_LANES : 0;
      w->reduction = nullptr;
    }
    b = Barrier{};
    counters.barriers += 1;
  }
}

void Machine::run_block(Block& block) {
  constexpr uint64_t SLICE = 1 << 20;  // long, but a warp that spins lets the others run
  std::vector<Warp*> order;
  for (Warp& w : block.warps) order.push_back(&w);
  shared.start_block();
  std::fill(local.begin(), local.end(), 0xFF);
  for (bool ran = true; ran;) {
    shuffle(order, seed);
    ran = false;
    for (Warp* w : order) {
      if (w->status != Status::RUNNING) continue;
      ran = true;
      max_steps -= run_warp(*w, std::min(SLICE, max_steps));
      if (!max_steps) fault(*w, -1, Fault::STUCK, "the launch ran as many instructions as max_instructions allows");
      complete_barriers(block);
      if (shared.epoch > SharedMemory::LAST_EPOCH - SLICE)
        fault(*w, -1, Fault::STUCK, "the block met at more barriers than the race detector counts");
    }
  }
  for (Warp* w : order)
    if (w->status == Status::WAITING) fault(*w, -1, Fault::STUCK, "waits at a barrier that nobody completes");
}

}  // namespace ptxsim

using namespace ptxsim;

extern "C" {

struct Outcome {
  int32_t kind, pc;  // kind -1: no fault; -2: an exception
  int64_t block, thread;
  char message[512];
};

// The number of an operation, or -1 if it is unknown or lacks one of the modifiers.
int32_t ptxsim_operation(const char* name, uint32_t mods) {
  const auto& list = operations();
  static const std::unordered_map<std::string, int32_t> index = [&] {
    std::unordered_map<std::string, int32_t> result;
    for (size_t i = 0; i < list.size(); ++i) result[list[i].first] = int32_t(i);
    return result;
  }();
  auto found = index.find(name);
  return found == index.end() || (mods & ~list[size_t(found->second)].second.mods) ? -1 : found->second;
}

// The bytes of Instr, Allocation, Launch and Outcome, which Python declares again.
void ptxsim_sizes(uint32_t* sizes) {
  sizes[0] = sizeof(Instr), sizes[1] = sizeof(Allocation), sizes[2] = sizeof(Launch), sizes[3] = sizeof(Outcome);
}

void ptxsim_run(Launch* launch, Outcome* outcome) {
  Machine machine{*launch};
  outcome->kind = -1;
  try {
    for (uint32_t i = 0; i < launch->instructions; ++i)
      machine.handlers.push_back(operations()[size_t(launch->code[i].op)].second.run);
    const uint32_t *grid = launch->grid, *shape = launch->block_shape;
    uint32_t warps = (shape[0] * shape[1] * shape[2] + LANES - 1) / LANES;
    machine.shared.resize(launch->shared_bytes, warps);
    machine.local.resize(size_t(warps) * LANES * launch->local_bytes);
    std::vector<uint8_t> registers(size_t(warps) * launch->register_bytes);
    Block block;
    block.warps.resize(warps);
    for (uint32_t i = 0; i < warps; ++i) {
      Warp& w = block.warps[i];
      w.machine = &machine;
      w.block = &block;
      w.index = int32_t(i);
      w.regs = registers.data() + size_t(i) * launch->register_bytes;
    }
    for (uint64_t b = 0; b < uint64_t(grid[0]) * grid[1] * grid[2]; ++b) {
      block.index = uint32_t(launch->block_order[b]);
      for (Barrier& barrier : block.barriers) barrier = Barrier{};
      for (Warp& w : block.warps) start_warp(w, machine);
      machine.run_block(block);
    }
  } catch (const Fault& f) {
    outcome->kind = f.kind;
    outcome->pc = f.pc;
    outcome->block = f.block;
    outcome->thread = f.thread;
    strncpy(outcome->message, f.message.c_str(), sizeof outcome->message - 1);
  } catch (const std::exception& error) {
    outcome->kind = -2;
    strncpy(outcome->message, error.what(), sizeof outcome->message - 1);
  }
  launch->counters = machine.counters;
}
}
