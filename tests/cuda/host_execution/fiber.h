// Fibers: several executions, each with a stack of its own, of which one runs on this OS thread at a time.
#pragma once

#include <cstddef>

#if !defined(__x86_64__) || defined(HOST_EXECUTION_UCONTEXT)
#define HOST_EXECUTION_UCONTEXT 1
#include <ucontext.h>
#endif

namespace fused_resnet {
namespace host_execution {

struct Fiber {
  void* stack_pointer = nullptr;  // while it does not run
  void* stack_bottom = nullptr;
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;    // AddressSanitizer's
  void* race_context = nullptr;  // ThreadSanitizer's: what this fiber has seen of the others
#ifdef HOST_EXECUTION_UCONTEXT
  ucontext_t context;
#endif
};

// The one that runs now, on the OS thread's own stack.
void adopt_thread(Fiber& fiber);
// Will run entry, which never returns, when first switched to.
void prepare(Fiber& fiber, void* stack_bottom, size_t stack_bytes, void (*entry)());
// Leaves `from`, for ever if it has ended, and goes on in `to`; returns when something switches to `from`. Only an
// ordered switch tells ThreadSanitizer that `to` sees what `from` did.
void switch_fiber(Fiber& from, Fiber& to, bool ended, bool ordered);
// To be called first by entry.
void arrive_in(Fiber& fiber);

// Stacks, one after another, in memory that no sanitizer remembers anything of.
class Stacks {
 public:
  // At least this many, and `extra_bytes` more behind them. Under ThreadSanitizer always fresh memory.
  void reserve(size_t count, size_t extra_bytes);
  void* bottom(size_t index) const { return base_ + index * stride_; }
  size_t bytes() const { return stride_ - guard_; }
  void* extra() const { return base_ + count_ * stride_; }

 private:
  char* base_ = nullptr;
  size_t count_ = 0;
  size_t stride_ = 0;
  size_t guard_ = 0;  // bytes at the end of a stride that nobody may touch
  size_t mapped_ = 0;
};

}  // namespace host_execution
}  // namespace fused_resnet
