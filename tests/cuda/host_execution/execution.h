// What the engine (engine.cpp, warp.cpp) does for the thread that calls it. The engine is compiled without sanitizers:
// what it reads and writes itself is invisible to them, and what a kernel reads and writes is seen because the bodies
// in device_names.h and host_execution.h are compiled into the kernel's own file.
#pragma once

#include <cstddef>
#include <cstdint>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned width = 1, unsigned height = 1, unsigned depth = 1) : x(width), y(height), z(depth) {}
  constexpr dim3(uint3 size) : x(size.x), y(size.y), z(size.z) {}
};

// Of the thread that runs now.
extern uint3 threadIdx;
extern uint3 blockIdx;
extern dim3 blockDim;
extern dim3 gridDim;

namespace fused_resnet {
namespace host_execution {

// Where a thread can be waiting for others.
enum class Operation {
  kNone,
  kBlockBarrier,
  kGridBarrier,
  kWarpBarrier,
  kShuffle,
  kShuffleXor,
  kShuffleDown,
  kShuffleUp,
  kBallot,
  kAny,
  kAll,
  kLoadMatrix,
  kMultiply,
  kCount
};
const char* name_of(Operation operation);

void block_barrier();
void grid_barrier();
void fence();

// Collective over the warp: each returns once every lane of the warp has called it. Only warp_barrier orders memory.
unsigned lane();
void warp_barrier(unsigned mask);
// The source lane's value; this lane's own if there is no such lane.
uint64_t shuffle(Operation operation, unsigned mask, uint64_t value, unsigned source_lane);
unsigned ballot(Operation operation, unsigned mask, bool predicate);
// rows[i] becomes the address that lane 8 * i + lane() / 4 gave.
void exchange_rows(const void* row, const void* (&rows)[4]);
// multiply_accumulate of device.cuh, for the 16-bit elements that `widen` makes float32 of.
void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, float (*widen)(uint16_t));

// The block's shared memory; check_shared fails unless the bytes lie in it, check_aligned unless the address is a
// multiple of so many bytes.
void* shared_memory();
void check_shared(const void* address, size_t bytes, const char* operation);
void check_aligned(const void* address, size_t bytes, const char* operation);

// The calling thread's queue of asynchronous copies, in the order of their beginning.
struct Copy {
  void* shared;
  const void* global;  // null: zeros
  unsigned group;
};
void begin_copy(void* shared, const void* global);
void commit_copies();
// Takes the oldest copy out of the queue if it is not in the newest `pending` committed groups, nor uncommitted.
bool take_arrived_copy(unsigned pending, Copy* copy);

// Ends the launch: every thread is abandoned and the message is thrown out of cudaLaunchKernelEx.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

}  // namespace host_execution
}  // namespace fused_resnet
