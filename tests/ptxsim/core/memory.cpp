#include "memory.h"

#include <algorithm>
#include <cstring>

#include "machine.h"

namespace ptxsim {
namespace {

const char* verb(Use use) { return use == Use::READ ? "reads " : use == Use::WRITE ? "writes " : "updates "; }

std::string bytes(uint32_t size) { return size == 1 ? "1 byte" : std::to_string(size) + " bytes"; }

Allocation::Flag flag(Use use) {
  return use == Use::READ ? Allocation::READ : use == Use::WRITE ? Allocation::WRITTEN : Allocation::ATOMIC;
}

// Holds a use against those of other blocks, and records it. Two strong ones do not conflict.
void check_blocks(Warp& w, int lane, Allocation& a, uint64_t address, uint64_t granule, Use use, bool strong) {
  int32_t me = int32_t(w.block->index) + 1;
  auto check = [&](int32_t block, const char* did) {
    if (block == 0 || block == me) return;
    w.machine->fault(w, lane, Fault::BLOCK_CONFLICT,
                     verb(use) + w.machine->memory.describe(address) + ", which " +
                         (block == Allocation::MANY ? "several blocks" : "block " + std::to_string(block - 1)) + did +
                         " in the same launch");
  };
  check(a.writer[granule], " wrote");
  if (!strong) check(a.updater[granule], " updated");
  if (use != Use::READ) check(a.reader[granule], " read");
  if (use == Use::READ && strong) return;
  int32_t& mine = (use == Use::READ ? a.reader : strong ? a.updater : a.writer)[granule];
  mine = mine == 0 || mine == me ? me : Allocation::MANY;
}

}  // namespace

void check_alignment(Warp& w, int lane, uint64_t address, uint32_t size, const char* what) {
  if (address % size && w.machine->checks_for(Check::ALIGNMENT))
    w.machine->fault(w, lane, Fault::MISALIGNED,
                     std::string(what) + bytes(size) + " at an address that is " + std::to_string(address % size) +
                         " past a multiple of " + std::to_string(size));
}

std::string Memory::describe(uint64_t address) const {
  uint64_t range = address >> RANGE_BITS, offset = address & ((uint64_t{1} << RANGE_BITS) - 1);
  if (offset >> (RANGE_BITS - 1) && range < count)  // below the start of the next one
    return std::string(names[range]) + " - " + std::to_string((uint64_t{1} << RANGE_BITS) - offset);
  if (range == 0 || range > count) return "address " + std::to_string(address) + " (no tensor)";
  return std::string(names[range - 1]) + " + " + std::to_string(offset) + " (of " +
         std::to_string(allocations[range - 1].size) + " bytes)";
}

uint8_t* Memory::access(Warp& w, int lane, uint64_t address, uint32_t size, Use use, bool strong, uint32_t alignment) {
  Machine& machine = *w.machine;
  uint64_t range = address >> RANGE_BITS, offset = address & ((uint64_t{1} << RANGE_BITS) - 1);
  bool inside = range > 0 && range <= count && offset + size <= allocations[range - 1].size;
  if (!inside || (use != Use::READ && !allocations[range - 1].writable)) {
    if (machine.checks_for(Check::BOUNDS))
      machine.fault(w, lane, Fault::OUT_OF_BOUNDS,
                    verb(use) + bytes(size) + " at " + describe(address) + (inside ? ", a constant" : ""));
    return nullptr;
  }
  check_alignment(w, lane, address, alignment ? alignment : size, verb(use));
  Allocation& a = allocations[range - 1];
  uint8_t* flags = a.flags + offset;
  if (use != Use::WRITE && machine.checks_for(Check::POISON))
    for (uint32_t b = 0; b < size; ++b)
      if (flags[b] & Allocation::POISON)
        machine.fault(w, lane, Fault::POISON_READ,
                      "reads " + describe(address + b) + ", an output that nobody has written");
  uint8_t mark = flag(use), keep = use == Use::READ ? 0xFF : uint8_t(~Allocation::POISON);
  for (uint32_t b = 0; b < size; ++b) flags[b] = (flags[b] | mark) & keep;

  if (a.writable && machine.checks_for(Check::BLOCKS))
    for (uint64_t g = offset / a.granule; g <= (offset + size - 1) / a.granule; ++g)
      check_blocks(w, lane, a, address, g, use, strong);
  return a.data + offset;
}

void Request::add(uint64_t address, uint32_t size) {
  if (bytes_ && address >> RANGE_BITS != range_) flush();
  range_ = address >> RANGE_BITS;
  bytes_ += size;
  for (uint64_t at = address, end = address + size; at < end;) {
    uint64_t sector = at / 32, stop = std::min(end, (sector + 1) * 32);
    uint32_t touched = uint32_t(((uint64_t{1} << (stop - at)) - 1) << (at % 32));
    uint32_t s = sectors_;
    while (s > 0 && sector_[s - 1] != sector) --s;
    if (s > 0) {
      touched_[s - 1] |= touched;
    } else {
      sector_[sectors_] = sector;
      touched_[sectors_++] = touched;
    }
    at = stop;
  }
}

void Request::flush() {
  Machine& machine = *warp_.machine;
  if (!bytes_) return;
  uint32_t distinct = 0;
  for (uint32_t s = 0; s < sectors_; ++s) distinct += uint32_t(__builtin_popcount(touched_[s]));
  Traffic& t = machine.memory.allocations[range_ - 1].traffic[int(use_)];
  t.requests += 1;
  t.bytes += bytes_;
  t.sectors += sectors_;
  t.ideal += (distinct + 31) / 32;
  bytes_ = sectors_ = 0;
}

// Up to 4 bytes a lane, all 32 lanes share a wavefront; 8 bytes take two halves, 16 bytes four quarters. Within each,
// a bank delivers one 4-byte word a wavefront, to any number of lanes.
Wavefronts::~Wavefronts() {
  uint64_t wavefronts = 0, ideal = 0;
  int step = size_ <= 4 ? 32 : size_ == 8 ? 16 : 8;
  for (int first = 0; first < LANES; first += step) {
    uint32_t words[32][32];
    uint8_t used[32] = {};
    uint8_t deepest = 0;
    for (int lane = first; lane < first + step; ++lane) {
      if (!(lanes_ >> lane & 1)) continue;
      for (uint32_t word = address_[lane] / 4; word <= (address_[lane] + size_ - 1) / 4; ++word) {
        uint32_t bank = word % 32;
        uint8_t n = 0;
        while (n < used[bank] && words[bank][n] != word) ++n;
        if (n == used[bank] && n < 32) words[bank][used[bank]++] = word;
        deepest = std::max(deepest, used[bank]);
      }
    }
    wavefronts += deepest;
    ideal += deepest > 0;
  }
  Counters& c = warp_.machine->counters;
  c.passes[warp_.pc - 1] += wavefronts;
  c.ideal[warp_.pc - 1] += ideal;
}

void SharedMemory::resize(uint32_t bytes, uint32_t warp_count) {
  size = bytes;
  warps = warp_count;
  data.resize(size);
  state.resize(size);
  writer.assign(size, 0);
  readers.assign(size_t(size) * warps, 0);
  epoch = 0;
}

void SharedMemory::start_block() {
  if (epoch > LAST_EPOCH / 2) {
    std::fill(writer.begin(), writer.end(), 0);
    std::fill(readers.begin(), readers.end(), 0);
    std::fill(updaters.begin(), updaters.end(), 0);
    epoch = 0;
  }
  block_start = ++epoch;  // of no access: what is stamped with it came before all of them
  ++epoch;
  for (uint32_t w = 0; w < warps; ++w) {
    own_epoch[w] = epoch;
    std::fill(clock[w], clock[w] + warps, epoch);
  }
  std::fill(data.begin(), data.end(), 0xFF);
  std::fill(state.begin(), state.end(), 0);
}

void SharedMemory::next_epoch(uint32_t warp) { own_epoch[warp] = clock[warp][warp] = ++epoch; }

void SharedMemory::arrive(uint32_t warp, uint32_t* known) {
  for (uint32_t v = 0; v < warps; ++v) known[v] = std::max(known[v], clock[warp][v]);
  known[warp] = own_epoch[warp] = ++epoch;
}

bool SharedMemory::reachable(Warp& w, int lane, uint64_t address, uint32_t bytes_, const char* what) {
  if (address + bytes_ > size) {
    if (w.machine->checks_for(Check::BOUNDS))
      w.machine->fault(w, lane, Fault::OUT_OF_BOUNDS,
                       std::string(what) + bytes(bytes_) + " at shared memory + " + std::to_string(address) + " (of " +
                           std::to_string(size) + " bytes)");
    return false;
  }
  check_alignment(w, lane, address, bytes_, what);
  return true;
}

void SharedMemory::check_flight(Warp& w, int lane, uint64_t address, uint32_t bytes_, const char* what) {
  if (!w.machine->checks_for(Check::WAITS)) return;
  for (uint32_t b = 0; b < bytes_; ++b)
    if (state[address + b] & IN_FLIGHT)
      w.machine->fault(w, lane, Fault::MISSING_WAIT,
                       std::string(what) + "shared memory + " + std::to_string(address + b) +
                           " while a cp.async to it is in flight");
}

void SharedMemory::check_written(Warp& w, int lane, uint64_t address, uint32_t bytes_, const char* what) {
  if (!w.machine->checks_for(Check::UNWRITTEN)) return;
  for (uint32_t b = 0; b < bytes_; ++b)
    if (writer[address + b] >> 10 < block_start && !(state[address + b] & IN_FLIGHT))
      w.machine->fault(w, lane, Fault::UNWRITTEN_SHARED,
                       std::string(what) + "shared memory + " + std::to_string(address + b) + ", which nobody wrote");
}

// Races with the last weak writer of each byte; writing the value that is there already is none.
void SharedMemory::check_writer(Warp& w, int lane, uint64_t address, uint32_t bytes_, const char* what,
                                const uint8_t* value, bool together) {
  if (!w.machine->checks_for(Check::RACES)) return;
  const uint32_t *stamps = &writer[address], *known = clock[w.index];
  bool uniform = true;
  for (uint32_t b = 1; b < bytes_; ++b) uniform &= stamps[b] == stamps[0];
  uint32_t me = together ? ~0u : uint32_t(w.index) << 5 | uint32_t(lane);
  for (uint32_t b = 0; b < (uniform ? 1 : bytes_); ++b) {
    uint32_t by = stamps[b] & 1023;
    if (by == me || stamps[b] >> 10 < known[by >> 5] || (value && !memcmp(value, &data[address], bytes_))) continue;
    w.machine->fault(w, lane, Fault::SHARED_RACE,
                     std::string(what) + "shared memory + " + std::to_string(address + b) + ", which thread " +
                         std::to_string(by) + " wrote, without " +
                         (by >> 5 == uint32_t(w.index) ? "bar.warp.sync" : "a barrier") + " between");
  }
}

// Races with what other threads did by a shadow of each warp's last access.
void SharedMemory::check_each_warp(Warp& w, int lane, uint64_t address, uint32_t bytes_, const char* what,
                                   const char* did, const std::vector<uint32_t>& shadow) {
  if (!w.machine->checks_for(Check::RACES)) return;
  for (uint32_t v = 0; v < warps; ++v) {
    const uint32_t* stamps = &shadow[size_t(v) * size + address];
    bool own = v == uint32_t(w.index);
    uint32_t latest = 0;
    for (uint32_t b = 0; b < bytes_; ++b) {
      int by = int(stamps[b] & 63);
      latest = std::max(latest, own && (by == lane || by == TOGETHER) ? 0 : stamps[b]);
    }
    if (latest >> 6 < clock[w.index][v]) continue;
    int by = int(latest & 63);
    std::string who = by < LANES ? "thread " + std::to_string(v * LANES + uint32_t(by)) : "warp " + std::to_string(v);
    w.machine->fault(w, lane, Fault::SHARED_RACE,
                     std::string(what) + "shared memory + " + std::to_string(address) + ", which " + who + did +
                         ", without " + (own ? "bar.warp.sync" : "a barrier") + " between");
  }
}

void SharedMemory::check_updaters(Warp& w, int lane, uint64_t address, uint32_t bytes_, const char* what) {
  if (updaters.empty()) return;
  for (uint32_t b = 0; b < bytes_; ++b)
    if (state[address + b] & UPDATED) check_each_warp(w, lane, address + b, 1, what, " updated", updaters);
}

void SharedMemory::stamp_write(Warp& w, int lane, uint64_t address, uint32_t bytes_) {
  uint32_t stamp = own_epoch[w.index] << 10 | uint32_t(w.index) << 5 | uint32_t(lane);
  std::fill_n(&writer[address], bytes_, stamp);
}

void SharedMemory::stamp(std::vector<uint32_t>& shadow, Warp& w, int lane, uint64_t address, uint32_t bytes_) {
  uint32_t now = own_epoch[w.index] << 6, stamp = now | uint32_t(lane);
  uint32_t* stamps = &shadow[size_t(w.index) * size + address];
  for (uint32_t b = 0; b < bytes_; ++b) {
    bool shared = stamps[b] >= now && stamps[b] != stamp && stamps[b] != (now | TOGETHER);
    stamps[b] = shared ? now | MANY : stamp;
  }
}

const uint8_t* SharedMemory::read(Warp& w, int lane, uint64_t address, uint32_t bytes_, bool strong, bool together) {
  if (!reachable(w, lane, address, bytes_, "reads ")) return nullptr;
  check_flight(w, lane, address, bytes_, "reads ");
  check_written(w, lane, address, bytes_, "reads ");
  check_writer(w, lane, address, bytes_, "reads ", nullptr, together);
  if (!strong) {
    check_updaters(w, lane, address, bytes_, "reads ");
    stamp(readers, w, together ? TOGETHER : lane, address, bytes_);
  }
  return &data[address];
}

void SharedMemory::write(Warp& w, int lane, uint64_t address, uint32_t bytes_, const uint8_t* value, bool strong) {
  if (!reachable(w, lane, address, bytes_, "writes ")) return;
  if (strong) {
    update(w, lane, address, bytes_, "writes ");
  } else {
    check_flight(w, lane, address, bytes_, "writes ");
    check_writer(w, lane, address, bytes_, "writes ", value);
    check_readers(w, lane, address, bytes_, "writes ");
    check_updaters(w, lane, address, bytes_, "writes ");
    stamp_write(w, lane, address, bytes_);
    std::fill_n(&state[address], bytes_, 0);
  }
  memcpy(&data[address], value, bytes_);
}

uint8_t* SharedMemory::atomic(Warp& w, int lane, uint64_t address, uint32_t bytes_) {
  if (!reachable(w, lane, address, bytes_, "updates ")) return nullptr;
  check_written(w, lane, address, bytes_, "updates ");
  update(w, lane, address, bytes_, "updates ");
  return &data[address];
}

// What no earlier access wrote counts as written before all of them, since the update is in the updaters' shadow.
void SharedMemory::update(Warp& w, int lane, uint64_t address, uint32_t bytes_, const char* what) {
  check_flight(w, lane, address, bytes_, what);
  check_writer(w, lane, address, bytes_, what, nullptr);
  check_readers(w, lane, address, bytes_, what);
  if (updaters.empty()) updaters.assign(readers.size(), 0);
  stamp(updaters, w, lane, address, bytes_);
  for (uint32_t b = 0; b < bytes_; ++b) {
    writer[address + b] = std::max(writer[address + b], block_start << 10);
    state[address + b] |= UPDATED;
  }
}

bool SharedMemory::begin_copy(Warp& w, int lane, uint64_t address, uint32_t bytes_) {
  if (!reachable(w, lane, address, bytes_, "copies to ")) return false;
  check_flight(w, lane, address, bytes_, "copies to ");
  check_writer(w, lane, address, bytes_, "copies to ", nullptr);
  check_readers(w, lane, address, bytes_, "copies to ");
  check_updaters(w, lane, address, bytes_, "copies to ");
  for (uint32_t b = 0; b < bytes_; ++b) state[address + b] = IN_FLIGHT;
  std::fill_n(&data[address], bytes_, 0xFF);
  return true;
}

void SharedMemory::land(Warp& w, int lane, uint32_t address, uint32_t bytes_, const uint8_t* value) {
  stamp_write(w, lane, address, bytes_);
  for (uint32_t b = 0; b < bytes_; ++b) state[address + b] = 0;
  memcpy(&data[address], value, bytes_);
}

}  // namespace ptxsim
