#include "fiber.h"

#include <pthread.h>
#include <sys/mman.h>

#include <cstdint>
#include <new>

#include "sanitizers.h"

#ifndef HOST_EXECUTION_UCONTEXT
// Saves what a function must keep, and the stack pointer to *from; takes both from `to`.
extern "C" void host_execution_swap_stack(void** from, void* to);
asm(R"(
.text
.p2align 4
.hidden host_execution_swap_stack
.globl host_execution_swap_stack
.type host_execution_swap_stack, @function
host_execution_swap_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size host_execution_swap_stack, .-host_execution_swap_stack
)");
#endif

namespace fused_resnet {
namespace host_execution {

void adopt_thread(Fiber& fiber) {
  if (__sanitizer_start_switch_fiber != nullptr) {
    pthread_attr_t attributes;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &fiber.stack_bottom, &fiber.stack_bytes);
    pthread_attr_destroy(&attributes);
  }
  if (has_thread_sanitizer()) fiber.race_context = __tsan_get_current_fiber();
}

void prepare(Fiber& fiber, void* stack_bottom, size_t stack_bytes, void (*entry)()) {
  fiber.stack_bottom = stack_bottom;
  fiber.stack_bytes = stack_bytes;
  fiber.fake_stack = nullptr;
  if (has_address_sanitizer()) __asan_unpoison_memory_region(stack_bottom, stack_bytes);
#ifdef HOST_EXECUTION_UCONTEXT
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack_bottom;
  fiber.context.uc_stack.ss_size = stack_bytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
#else
  // As if entry had been called from address 0: six saved registers, where to return to, and the return address.
  void** top = reinterpret_cast<void**>(static_cast<char*>(stack_bottom) + stack_bytes);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; i++) *--top = nullptr;
  fiber.stack_pointer = top;
#endif
}

void arrive_in(Fiber& fiber) {
  if (__sanitizer_finish_switch_fiber != nullptr) __sanitizer_finish_switch_fiber(fiber.fake_stack, nullptr, nullptr);
}

void switch_fiber(Fiber& from, Fiber& to, bool ended, bool ordered) {
  constexpr unsigned kNotOrdered = 1;
  if (has_thread_sanitizer()) __tsan_switch_to_fiber(to.race_context, ordered ? 0 : kNotOrdered);
  if (__sanitizer_start_switch_fiber != nullptr) {
    __sanitizer_start_switch_fiber(ended ? nullptr : &from.fake_stack, to.stack_bottom, to.stack_bytes);
  }
#ifdef HOST_EXECUTION_UCONTEXT
  swapcontext(&from.context, &to.context);
#else
  host_execution_swap_stack(&from.stack_pointer, to.stack_pointer);
#endif
  arrive_in(from);
}

void Stacks::reserve(size_t count, size_t extra_bytes) {
  constexpr size_t kPage = 4096;
  constexpr size_t kMostGuarded = 4096;  // the kernel allows a process some 65,000 mappings
  const bool sanitized = has_thread_sanitizer() || has_address_sanitizer();
  const size_t stride = (sanitized ? 256 : 64) * 1024 + kPage;
  const size_t bytes = (count * stride + extra_bytes + kPage - 1) / kPage * kPage;
  if (!has_thread_sanitizer() && bytes <= mapped_ && count <= count_) return;
  if (base_ != nullptr) munmap(base_, mapped_);
  void* memory =
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
  if (memory == MAP_FAILED) {
    base_ = nullptr;
    mapped_ = count_ = 0;
    throw std::bad_alloc();
  }
  base_ = static_cast<char*>(memory);
  count_ = count;
  stride_ = stride;
  guard_ = kPage;
  mapped_ = bytes;
  if (has_thread_sanitizer() || count > kMostGuarded) return;
  // The guard of a stack is under the next one; the first one's is left out.
  for (size_t i = 0; i < count; i++) mprotect(base_ + (i + 1) * stride - kPage, kPage, PROT_NONE);
}

}  // namespace host_execution
}  // namespace fused_resnet
