#include "engine.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "sanitizers.h"

uint3 threadIdx;
uint3 blockIdx;
dim3 blockDim;
dim3 gridDim;

namespace fused_resnet {
namespace host_execution {

Engine engine;

static char fence_order;

// xorshift64*, and the high bits of a product instead of a division.
uint32_t random_below(uint32_t bound) {
  uint64_t& state = engine.random;
  state ^= state >> 12;
  state ^= state << 25;
  state ^= state >> 27;
  const uint64_t bits = (state * 0x2545f4914f6cdd1du) >> 32;
  return static_cast<uint32_t>((bits * bound) >> 32);
}

void make_runnable(Thread& thread) {
  thread.waits = Operation::kNone;
  engine.runnable[engine.runnable_count++] = &thread;
}

// Another thread at random; the launching thread if none can run.
static void run_another(Fiber& from, bool ended) {
  if (engine.runnable_count == 0) {
    engine.current = nullptr;
    switch_fiber(from, engine.main, ended, false);
    return;
  }
  const uint32_t picked = random_below(engine.runnable_count);
  Thread* next = engine.runnable[picked];
  engine.runnable[picked] = engine.runnable[--engine.runnable_count];
  engine.current = next;
  threadIdx = next->index;
  blockIdx = next->block->index;
  if (&next->fiber != &from) switch_fiber(from, next->fiber, ended, false);
}

void wait_at(Operation operation) {
  engine.current->waits = operation;
  run_another(engine.current->fiber, false);
}

void yield_thread() {
  Thread& self = *engine.current;
  make_runnable(self);
  run_another(self.fiber, false);
}

void fail(const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof(text), format, arguments);
  va_end(arguments);
  if (engine.current == nullptr) throw std::runtime_error(std::string(text) + ": not inside a kernel");
  char place[128];
  snprintf(place, sizeof(place), " in block (%u, %u, %u), thread (%u, %u, %u)", blockIdx.x, blockIdx.y, blockIdx.z,
           threadIdx.x, threadIdx.y, threadIdx.z);
  engine.message = std::string(text) + place;
  engine.failed = true;
  Thread& self = *engine.current;
  engine.current = nullptr;
  switch_fiber(self.fiber, engine.main, true, true);
  abort();  // nothing switches to a thread of a launch that failed
}

static void run_thread() {
  Thread& self = *engine.current;
  arrive_in(self.fiber);
  acquire(&engine.start);
  engine.body.call(engine.body.arguments);
  release(&engine.end);
  self.ended = true;
  self.warp->ended++;
  engine.unfinished--;
  if (self.warp->arrived > 0) {
    fail("a thread ended while %u lanes of its warp wait at %s", self.warp->arrived, name_of(self.warp->operation));
  }
  run_another(self.fiber, true);
  abort();
}

void block_barrier() {
  if (engine.current == nullptr) fail("__syncthreads");
  Thread& self = *engine.current;
  Block& block = *self.block;
  char* order = &block.order[block.generation & 1];
  release(order);
  const unsigned threads = engine.block.x * engine.block.y * engine.block.z;
  if (++block.arrived < threads) {
    wait_at(Operation::kBlockBarrier);
  } else {
    block.arrived = 0;
    block.generation++;
    for (unsigned i = 0; i < threads; i++) {
      Thread& thread = *engine.threads[block.first_thread + i];
      if (&thread != &self) make_runnable(thread);
    }
    yield_thread();
  }
  acquire(order);
}

void grid_barrier() {
  if (!engine.cooperative) fail("grid_barrier in a launch that is not cooperative");
  Thread& self = *engine.current;
  char* order = &engine.grid_order[engine.grid_generation & 1];
  release(order);
  if (++engine.grid_arrived < engine.thread_count) {
    wait_at(Operation::kGridBarrier);
  } else {
    engine.grid_arrived = 0;
    engine.grid_generation++;
    for (unsigned i = 0; i < engine.thread_count; i++) {
      if (engine.threads[i].get() != &self) make_runnable(*engine.threads[i]);
    }
    yield_thread();
  }
  acquire(order);
}

void fence() {
  acquire(&fence_order);
  release(&fence_order);
}

// Where threads are, when none can run.
static std::string describe_deadlock() {
  std::string text = "deadlock: no thread can go on";
  const unsigned threads = engine.block.x * engine.block.y * engine.block.z;
  unsigned described = 0;
  for (const Block& block : engine.blocks) {
    unsigned counts[static_cast<int>(Operation::kCount)] = {};
    unsigned ended = 0;
    for (unsigned i = 0; i < threads; i++) {
      const Thread& thread = *engine.threads[block.first_thread + i];
      if (thread.ended) {
        ended++;
      } else {
        counts[static_cast<int>(thread.waits)]++;
      }
    }
    if (ended == threads || described++ >= 4) continue;
    char line[160];
    snprintf(line, sizeof(line), "; block (%u, %u, %u): ", block.index.x, block.index.y, block.index.z);
    text += line;
    const char* separator = "";
    for (int i = 0; i < static_cast<int>(Operation::kCount); i++) {
      if (counts[i] == 0) continue;
      snprintf(line, sizeof(line), "%s%u wait at %s", separator, counts[i], name_of(static_cast<Operation>(i)));
      text += line;
      separator = ", ";
    }
    snprintf(line, sizeof(line), "%s%u ended", separator, ended);
    text += line;
  }
  return text;
}

// Bytes behind the shared memory that a kernel must leave alone. Under AddressSanitizer the allocation ends exactly, so
// that the overrun itself is reported.
constexpr size_t kGuardBytes = 128;
static size_t guard_bytes() { return has_address_sanitizer() ? 0 : kGuardBytes; }
static size_t shared_stride() { return (engine.shared_bytes + guard_bytes() + 127) / 128 * 128; }

static void give_shared_memory(Block& block, unsigned index) {
  void* memory = nullptr;
  if (has_thread_sanitizer()) {
    memory = static_cast<unsigned char*>(engine.stacks.extra()) + index * shared_stride();
  } else if (posix_memalign(&memory, 128, engine.shared_bytes + guard_bytes()) != 0) {
    throw std::bad_alloc();
  }
  block.shared = static_cast<unsigned char*>(memory);
  memset(block.shared, 0xff, engine.shared_bytes);  // NaN, in every type
  memset(block.shared + engine.shared_bytes, 0xa5, guard_bytes());
}

static void take_shared_memory(Block& block) {
  bool touched = false;
  for (size_t i = 0; i < guard_bytes(); i++) touched |= block.shared[engine.shared_bytes + i] != 0xa5;
  if (!has_thread_sanitizer()) free(block.shared);
  block.shared = nullptr;
  if (touched && !engine.failed) {
    char text[160];
    snprintf(text, sizeof(text), "written beyond the %zu bytes of shared memory in block (%u, %u, %u)",
             engine.shared_bytes, block.index.x, block.index.y, block.index.z);
    engine.message = text;
    engine.failed = true;
  }
}

// Contexts enough for the threads alive and, unless these are many, for a few blocks before them.
static void provide_race_contexts() {
  if (!has_thread_sanitizer()) return;
  constexpr size_t kMost = 6000;  // ThreadSanitizer ends the process at some 8,000
  const size_t alive = engine.thread_count;
  if (alive > kMost) throw std::runtime_error("too many threads at a time for ThreadSanitizer");
  const size_t wanted = engine.cooperative ? alive : std::max<size_t>(2 * alive, std::min<size_t>(4 * alive, 1024));
  while (engine.race_contexts.size() < wanted) engine.race_contexts.push_back(__tsan_create_fiber(0));
}

static void* take_race_context() {
  if (!has_thread_sanitizer()) return nullptr;
  return engine.race_contexts[engine.next_race_context++ % engine.race_contexts.size()];
}

// What abandoned threads did is over before what follows, and their contexts do not serve again.
static void abandon_race_contexts() {
  if (!has_thread_sanitizer()) return;
  for (void* context : engine.race_contexts) {
    __tsan_switch_to_fiber(context, 1);
    __tsan_switch_to_fiber(engine.main.race_context, 0);
  }
  std::vector<void*> kept;
  for (void* context : engine.race_contexts) {
    bool abandoned = false;
    for (unsigned i = 0; i < engine.thread_count; i++) {
      const Thread& thread = *engine.threads[i];
      abandoned |= !thread.ended && thread.fiber.race_context == context;
    }
    if (abandoned) {
      __tsan_destroy_fiber(context);
    } else {
      kept.push_back(context);
    }
  }
  engine.race_contexts.swap(kept);
}

static void start_threads(Block& block, unsigned first_thread) {
  const unsigned threads = engine.block.x * engine.block.y * engine.block.z;
  block.first_thread = first_thread;
  block.order = std::make_unique<char[]>(2);
  block.warps = std::vector<Warp>((threads + kWarpLanes - 1) / kWarpLanes);
  for (unsigned i = 0; i < threads; i++) {
    Thread& thread = *engine.threads[first_thread + i];
    thread.index = {i % engine.block.x, i / engine.block.x % engine.block.y, i / engine.block.x / engine.block.y};
    thread.block = &block;
    thread.warp = &block.warps[i / kWarpLanes];
    thread.lane = i % kWarpLanes;
    if (thread.lane == 0) thread.warp->first_thread = first_thread + i;
    thread.warp->lanes++;
    thread.ended = false;
    thread.commits = thread.first_copy = thread.end_copy = 0;
    prepare(thread.fiber, engine.stacks.bottom(first_thread + i), engine.stacks.bytes(), run_thread);
    thread.fiber.race_context = take_race_context();
    make_runnable(thread);
  }
}

// Runs blocks together until all have ended, or something went wrong.
static void run_group(const uint64_t* indices, unsigned count) {
  const unsigned threads = engine.block.x * engine.block.y * engine.block.z;
  engine.thread_count = engine.unfinished = count * threads;
  while (engine.threads.size() < engine.thread_count) engine.threads.push_back(std::make_unique<Thread>());
  engine.runnable.resize(engine.threads.size());
  engine.runnable_count = 0;
  engine.grid_arrived = engine.grid_generation = 0;
  provide_race_contexts();
  engine.stacks.reserve(engine.thread_count, has_thread_sanitizer() ? count * shared_stride() : 0);
  engine.blocks = std::vector<Block>(count);
  for (unsigned i = 0; i < count; i++) {
    Block& block = engine.blocks[i];
    const uint64_t width = engine.grid.x, height = engine.grid.y;
    block.index = {static_cast<unsigned>(indices[i] % width), static_cast<unsigned>(indices[i] / width % height),
                   static_cast<unsigned>(indices[i] / width / height)};
    give_shared_memory(block, i);
    start_threads(block, i * threads);
  }
  release(&engine.start);

  run_another(engine.main, false);

  if (!engine.failed && engine.unfinished > 0) {
    engine.message = describe_deadlock();
    engine.failed = true;
  }
  if (engine.failed) abandon_race_contexts();
  for (Block& block : engine.blocks) take_shared_memory(block);
}

bool run_launch(const cudaLaunchConfig_t& config, bool cooperative, Body body, const std::string& kernel) {
  engine.body = body;
  engine.grid = gridDim = config.gridDim;
  engine.block = blockDim = config.blockDim;
  engine.shared_bytes = config.dynamicSmemBytes;
  engine.cooperative = cooperative;
  engine.failed = false;
  engine.message.clear();
  adopt_thread(engine.main);

  std::vector<uint64_t> order(uint64_t{config.gridDim.x} * config.gridDim.y * config.gridDim.z);
  for (uint64_t i = 0; i < order.size(); i++) order[i] = i;
  for (uint64_t i = order.size(); i > 1; i--) std::swap(order[i - 1], order[random_below(static_cast<uint32_t>(i))]);
  if (cooperative) {
    run_group(order.data(), static_cast<unsigned>(order.size()));
  } else {
    for (uint64_t i = 0; i < order.size() && !engine.failed; i++) run_group(&order[i], 1);
  }
  acquire(&engine.end);
  engine.cooperative = false;
  if (engine.failed) engine.message = kernel + ": " + engine.message;
  return !engine.failed;
}

}  // namespace host_execution
}  // namespace fused_resnet
