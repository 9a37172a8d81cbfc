// The state of the one launch that runs. Internal to the engine: engine.cpp starts, schedules and ends threads;
// warp.cpp has the operations of warps; runtime.cpp checks launches.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "fiber.h"

namespace fused_resnet {
namespace host_execution {

constexpr unsigned kWarpLanes = 32;
constexpr unsigned kMostCopies = 256;  // of one thread, begun and not arrived

// What a lane gives to an operation of its warp, and gets from it.
struct Slot {
  uint64_t value;
  uint32_t a[4];
  uint32_t b[2];
  float d[4];
};

struct Warp {
  unsigned lanes = 0;  // fewer than 32 in the last warp of a block whose size is not a multiple of 32
  unsigned first_thread = 0;
  unsigned arrived = 0;
  unsigned ended = 0;
  Operation operation = Operation::kNone;  // of those that arrived
  unsigned generation = 0;                 // operations completed
  // Two sets: a lane may begin the next operation before another has read what came of this one.
  Slot slots[2][kWarpLanes];
  char order[2];  // ThreadSanitizer's objects, by generation
};

struct Block {
  uint3 index = {};
  unsigned first_thread = 0;
  unsigned arrived = 0;
  unsigned generation = 0;
  std::vector<Warp> warps;
  unsigned char* shared = nullptr;
  std::unique_ptr<char[]> order;  // two objects, by generation
};

struct Thread {
  Fiber fiber;
  uint3 index = {};
  Block* block = nullptr;
  Warp* warp = nullptr;
  unsigned lane = 0;
  Operation waits = Operation::kNone;
  bool ended = false;
  unsigned commits = 0;
  unsigned first_copy = 0;  // of the ring
  unsigned end_copy = 0;
  Copy copies[kMostCopies];
};

struct Engine {
  // The launch.
  Body body = {};
  dim3 grid, block;
  size_t shared_bytes = 0;
  bool cooperative = false;
  unsigned grid_arrived = 0;
  unsigned grid_generation = 0;
  char start = 0, end = 0, grid_order[2] = {};

  // The threads alive: of one block, or of all blocks of a cooperative launch.
  std::vector<Block> blocks;
  std::vector<std::unique_ptr<Thread>> threads;
  unsigned thread_count = 0;
  unsigned unfinished = 0;
  std::vector<Thread*> runnable;
  unsigned runnable_count = 0;
  Thread* current = nullptr;
  Fiber main;
  Stacks stacks;
  // ThreadSanitizer's contexts, taken in turn. They cost half a millisecond and a megabyte each, so they serve again: a
  // thread then seems to come after the one that had its context before, in a block some blocks ago.
  std::vector<void*> race_contexts;
  size_t next_race_context = 0;

  uint64_t random = 0x9e3779b97f4a7c15u;
  bool failed = false;
  std::string message;
};
extern Engine engine;

uint32_t random_below(uint32_t bound);
void make_runnable(Thread& thread);
// The current thread stops here until something makes it runnable.
void wait_at(Operation operation);
// The current thread stays runnable; another one, or the same, runs next.
void yield_thread();
// Runs a launch whose configuration has been checked. False if something went wrong: engine.message says what.
bool run_launch(const cudaLaunchConfig_t& config, bool cooperative, Body body, const std::string& kernel);

}  // namespace host_execution
}  // namespace fused_resnet
