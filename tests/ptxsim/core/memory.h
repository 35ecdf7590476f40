// Global and shared memory with the shadows that find faults. Every access names the warp and lane that makes it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace ptxsim {

struct Warp;

// The detectors that can be switched off, as launch.py numbers them.
enum class Check { BOUNDS, ALIGNMENT, RACES, UNWRITTEN, WAITS, POISON, BARRIERS, BLOCKS };

struct Fault {
  enum Kind {
    OUT_OF_BOUNDS,
    MISALIGNED,
    SHARED_RACE,
    UNWRITTEN_SHARED,
    MISSING_WAIT,
    POISON_READ,
    DIVERGENT_BARRIER,
    BLOCK_CONFLICT,
    STUCK,
    TRAPPED
  };
  Kind kind;
  int32_t pc;
  int64_t block, thread;
  std::string message;
};

enum class Use { READ, WRITE, ATOMIC };

// What warps asked of one allocation. A request is one instruction of one warp; its sectors are the distinct 32-byte
// sectors that it touches, its ideal sectors what its distinct bytes would fill.
struct Traffic {
  uint64_t requests, bytes, sectors, ideal;
};

// A tensor's storage or a module's constant. Shadows: flags for each byte; for each granule (a tensor's element) the
// block, plus one, that wrote or read it last, MANY if several did. updater: by an atomic or a strong store. Strong
// loads leave no trace.
struct Allocation {
  enum Flag : uint8_t { READ = 1, WRITTEN = 2, ATOMIC = 4, POISON = 8 };
  static constexpr int32_t MANY = -1;
  uint8_t* data;
  uint64_t size;
  uint8_t* flags;
  int32_t *writer, *reader, *updater;
  uint32_t granule, writable;
  Traffic traffic[3];
};

// Where an address of 64 bits lies. Allocation i of global memory begins at (i + 1) << RANGE_BITS; shared, local and
// parameter memory have windows of their own for generic addresses.
constexpr int RANGE_BITS = 36;
constexpr int WINDOW_BITS = 56;
enum class Space : uint64_t { GLOBAL = 0, SHARED = 1, LOCAL = 2, PARAM = 3, GENERIC = 4 };

// The memory that an address means: that of the instruction, or for a generic address that of its window.
inline Space resolve(Space space, uint64_t& address) {
  if (space != Space::GENERIC) return space;
  space = Space(address >> WINDOW_BITS);
  address &= (uint64_t{1} << WINDOW_BITS) - 1;
  return space;
}

// Faults if `address` is no multiple of `size`.
void check_alignment(Warp& w, int lane, uint64_t address, uint32_t size, const char* what);

struct Memory {
  Allocation* allocations;
  const char** names;
  uint64_t count;

  // The host's address of `size` bytes, after all checks; nullptr if they are out of bounds and that check is off.
  // alignment: what the address must be a multiple of, where it is not the size.
  uint8_t* access(Warp& w, int lane, uint64_t address, uint32_t size, Use use, bool strong, uint32_t alignment = 0);
  std::string describe(uint64_t address) const;
};

// Collects what one instruction of a warp touches in global memory, for the counters.
class Request {
 public:
  Request(Warp& w, Use use) : warp_(w), use_(use) {}
  ~Request() { flush(); }
  Request(const Request&) = delete;
  void add(uint64_t address, uint32_t size);

 private:
  void flush();
  Warp& warp_;
  Use use_;
  uint64_t range_ = 0, bytes_ = 0;
  uint32_t sectors_ = 0;
  uint64_t sector_[2 * 32 + 2];
  uint32_t touched_[2 * 32 + 2];
};

// Collects the shared-memory addresses of one instruction: wavefronts by banks, beside what they would be without
// conflicts.
class Wavefronts {
 public:
  Wavefronts(Warp& w, uint32_t size) : warp_(w), size_(size) {}
  ~Wavefronts();
  Wavefronts(const Wavefronts&) = delete;
  void add(int lane, uint32_t address) { address_[lane] = address, lanes_ |= 1u << lane; }

 private:
  Warp& warp_;
  uint32_t size_, lanes_ = 0;
  uint32_t address_[32];
};

// Shared memory of the running block, with happens-before by epochs. A warp's epoch grows at each barrier; clock[w][v]
// is the first epoch of warp v that warp w is not known to follow. An access is a race if another thread's conflicting
// access is of such an epoch. Atomics and strong stores conflict with weak accesses alone; strong loads leave no trace.
// Epochs grow over the whole launch, so that shadows need no clearing between blocks.
struct SharedMemory {
  enum State : uint8_t { IN_FLIGHT = 1, UPDATED = 2 };  // UPDATED: by atomics or strong stores, since the last weak one
  static constexpr uint32_t LAST_EPOCH = (1u << 22) - 1;
  static constexpr int MANY = 32,
                       TOGETHER = 33;  // readers in place of a lane: several lanes; the warp as one (ldmatrix)

  uint32_t size = 0, warps = 0, epoch = 0, block_start = 0;
  std::vector<uint8_t> data, state;
  std::vector<uint32_t> writer;             // epoch << 10 | warp << 5 | lane
  std::vector<uint32_t> readers, updaters;  // [warp][byte]: epoch << 6 | lane; updaters: empty until one comes
  uint32_t clock[32][32];
  uint32_t own_epoch[32];

  void resize(uint32_t bytes, uint32_t warp_count);
  void start_block();
  void next_epoch(uint32_t warp);  // all lanes of a warp have met
  void arrive(uint32_t warp, uint32_t* known);  // adds what the warp knows and has done to a barrier's clock

  // The address of `size` bytes, after all checks; nullptr if they are out of bounds and that check is off.
  const uint8_t* read(Warp& w, int lane, uint64_t address, uint32_t size, bool strong = false, bool together = false);
  void write(Warp& w, int lane, uint64_t address, uint32_t size, const uint8_t* value, bool strong);
  uint8_t* atomic(Warp& w, int lane, uint64_t address, uint32_t size);
  bool begin_copy(Warp& w, int lane, uint64_t address, uint32_t size);
  void land(Warp& w, int lane, uint32_t address, uint32_t size, const uint8_t* value);

 private:
  bool reachable(Warp& w, int lane, uint64_t address, uint32_t size, const char* what);
  void check_flight(Warp& w, int lane, uint64_t address, uint32_t size, const char* what);
  void check_written(Warp& w, int lane, uint64_t address, uint32_t size, const char* what);
  void check_writer(Warp& w, int lane, uint64_t address, uint32_t size, const char* what, const uint8_t* value,
                    bool together = false);
  void check_each_warp(Warp& w, int lane, uint64_t address, uint32_t size, const char* what, const char* did,
                       const std::vector<uint32_t>& shadow);
  void check_updaters(Warp& w, int lane, uint64_t address, uint32_t size, const char* what);
  void check_readers(Warp& w, int lane, uint64_t address, uint32_t size, const char* what) {
    check_each_warp(w, lane, address, size, what, " read", readers);
  }
  void stamp_write(Warp& w, int lane, uint64_t address, uint32_t size);
  void stamp(std::vector<uint32_t>& shadow, Warp& w, int lane, uint64_t address, uint32_t size);
  void update(Warp& w, int lane, uint64_t address, uint32_t size, const char* what);
};

}  // namespace ptxsim
