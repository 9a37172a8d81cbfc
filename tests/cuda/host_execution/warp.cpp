// What a thread does together with its warp, and with its own shared memory and copies.
#include "engine.h"
#include "sanitizers.h"

namespace fused_resnet {
namespace host_execution {

const char* name_of(Operation operation) {
  switch (operation) {
    case Operation::kBlockBarrier:
      return "__syncthreads";
    case Operation::kGridBarrier:
      return "grid_barrier";
    case Operation::kWarpBarrier:
      return "__syncwarp";
    case Operation::kShuffle:
      return "__shfl_sync";
    case Operation::kShuffleXor:
      return "__shfl_xor_sync";
    case Operation::kShuffleDown:
      return "__shfl_down_sync";
    case Operation::kShuffleUp:
      return "__shfl_up_sync";
    case Operation::kBallot:
      return "__ballot_sync";
    case Operation::kAny:
      return "__any_sync";
    case Operation::kAll:
      return "__all_sync";
    case Operation::kLoadMatrix:
      return "load_matrix_x4";
    case Operation::kMultiply:
      return "multiply_accumulate";
    default:
      return "nothing";
  }
}

unsigned lane() { return engine.current->lane; }

// Where the lane puts what it gives to the operation that it now begins.
static Slot& begin(Operation operation, unsigned mask) {
  if (engine.current == nullptr) fail("%s", name_of(operation));
  const Warp& warp = *engine.current->warp;
  const unsigned live = warp.lanes == kWarpLanes ? 0xffffffffu : (1u << warp.lanes) - 1;
  if ((mask & live) != live) fail("%s with the mask 0x%08x, which is not the whole warp", name_of(operation), mask);
  constexpr uint32_t kYieldOneIn = 16;
  if (random_below(kYieldOneIn) == 0) yield_thread();
  return engine.current->warp->slots[warp.generation & 1][engine.current->lane];
}

// Waits for the other lanes; the last to come does `last`, if given, for all. All slots, as they are then.
static const Slot* meet(Operation operation, void (*last)(Warp& warp, Slot* slots, void* argument) = nullptr,
                        void* argument = nullptr) {
  Thread& self = *engine.current;
  Warp& warp = *self.warp;
  Slot* slots = warp.slots[warp.generation & 1];
  if (warp.ended > 0) fail("%s, but %u lanes of the warp have ended", name_of(operation), warp.ended);
  if (warp.arrived > 0 && warp.operation != operation) {
    fail("%s, but %u lanes of the warp wait at %s", name_of(operation), warp.arrived, name_of(warp.operation));
  }
  warp.operation = operation;
  if (++warp.arrived < warp.lanes) {
    wait_at(operation);
    return slots;
  }
  if (last != nullptr) last(warp, slots, argument);
  warp.arrived = 0;
  warp.generation++;
  for (unsigned i = 0; i < warp.lanes; i++) {
    Thread& thread = *engine.threads[warp.first_thread + i];
    if (&thread != &self) make_runnable(thread);
  }
  return slots;
}

void warp_barrier(unsigned mask) {
  begin(Operation::kWarpBarrier, mask);
  char* order = &engine.current->warp->order[engine.current->warp->generation & 1];
  release(order);
  meet(Operation::kWarpBarrier);
  acquire(order);
}

uint64_t shuffle(Operation operation, unsigned mask, uint64_t value, unsigned source_lane) {
  begin(operation, mask).value = value;
  const Slot* slots = meet(operation);
  return source_lane < engine.current->warp->lanes ? slots[source_lane].value : value;
}

unsigned ballot(Operation operation, unsigned mask, bool predicate) {
  begin(operation, mask).value = predicate ? 1 : 0;
  const Slot* slots = meet(operation);
  unsigned bits = 0;
  for (unsigned i = 0; i < engine.current->warp->lanes; i++) bits |= static_cast<unsigned>(slots[i].value) << i;
  return bits;
}

void exchange_rows(const void* row, const void* (&rows)[4]) {
  begin(Operation::kLoadMatrix, ~0u).value = reinterpret_cast<uintptr_t>(row);
  if (engine.current->warp->lanes != kWarpLanes) fail("load_matrix_x4 in a warp of fewer than 32 lanes");
  const Slot* slots = meet(Operation::kLoadMatrix);
  for (int i = 0; i < 4; i++) {
    rows[i] = reinterpret_cast<const void*>(slots[8 * i + engine.current->lane / 4].value);
  }
}

// PTX's fragments: with g = lane / 4 and t = lane % 4, a[i] is row g + 8 * (i % 2), columns 2t + 8 * (i / 2) and + 1;
// b[i] is rows 2t + 8 * i and + 1, column g; d[i] is row g + 8 * (i / 2), column 2t + i % 2.
static void multiply_slots(Warp&, Slot* slots, void* argument) {
  float (*widen)(uint16_t) = *static_cast<float (**)(uint16_t)>(argument);
  double a[16][16], b[16][8];
  for (unsigned lane = 0; lane < kWarpLanes; lane++) {
    const Slot& slot = slots[lane];
    const unsigned g = lane / 4, t = lane % 4;
    for (unsigned i = 0; i < 4; i++) {
      double* at = &a[g + 8 * (i % 2)][2 * t + 8 * (i / 2)];
      at[0] = widen(static_cast<uint16_t>(slot.a[i]));
      at[1] = widen(static_cast<uint16_t>(slot.a[i] >> 16));
    }
    for (unsigned i = 0; i < 2; i++) {
      b[2 * t + 8 * i][g] = widen(static_cast<uint16_t>(slot.b[i]));
      b[2 * t + 8 * i + 1][g] = widen(static_cast<uint16_t>(slot.b[i] >> 16));
    }
  }
  for (unsigned row = 0; row < 16; row++) {
    double sums[8] = {};
    for (unsigned k = 0; k < 16; k++) {
      for (unsigned column = 0; column < 8; column++) sums[column] += a[row][k] * b[k][column];
    }
    for (unsigned column = 0; column < 8; column++) {
      float& d = slots[row % 8 * 4 + column / 2].d[row / 8 * 2 + column % 2];
      d = static_cast<float>(d + sums[column]);
    }
  }
}

void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, float (*widen)(uint16_t)) {
  Slot& slot = begin(Operation::kMultiply, ~0u);
  if (engine.current->warp->lanes != kWarpLanes) fail("multiply_accumulate in a warp of fewer than 32 lanes");
  for (int i = 0; i < 4; i++) {
    slot.a[i] = a[i];
    slot.d[i] = d[i];
  }
  slot.b[0] = b0;
  slot.b[1] = b1;
  const Slot& result = meet(Operation::kMultiply, multiply_slots, &widen)[engine.current->lane];
  for (int i = 0; i < 4; i++) d[i] = result.d[i];
}

void* shared_memory() {
  if (engine.current == nullptr) fail("dynamic_shared_memory");
  return engine.current->block->shared;
}

void check_shared(const void* address, size_t bytes, const char* operation) {
  if (engine.current == nullptr) fail("%s", operation);
  const uintptr_t offset =
      reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(engine.current->block->shared);
  if (offset > engine.shared_bytes || engine.shared_bytes - offset < bytes) {
    fail("%s: offset %td is not inside the %zu bytes of shared memory", operation, static_cast<ptrdiff_t>(offset),
         engine.shared_bytes);
  }
}

void check_aligned(const void* address, size_t bytes, const char* operation) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) {
    fail("%s: the address %p is not a multiple of %zu", operation, address, bytes);
  }
}

void begin_copy(void* shared, const void* global) {
  Thread& self = *engine.current;
  if (self.end_copy - self.first_copy == kMostCopies) fail("more than %u copies of a thread at a time", kMostCopies);
  self.copies[self.end_copy++ % kMostCopies] = {shared, global, self.commits};
}

void commit_copies() { engine.current->commits++; }

bool take_arrived_copy(unsigned pending, Copy* copy) {
  Thread& self = *engine.current;
  if (self.first_copy == self.end_copy) return false;
  const Copy& oldest = self.copies[self.first_copy % kMostCopies];
  if (oldest.group + pending >= self.commits) return false;
  *copy = oldest;
  self.first_copy++;
  return true;
}

}  // namespace host_execution
}  // namespace fused_resnet
