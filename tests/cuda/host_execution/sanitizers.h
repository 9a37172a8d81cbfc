// The sanitizers' own functions, as far as fibers need them. They are weak: in a program without the sanitizer they are
// null, so the engine is one object file for all.
#pragma once

#include <cstddef>

extern "C" {
void* __tsan_get_current_fiber() __attribute__((weak));
void* __tsan_create_fiber(unsigned flags) __attribute__((weak));
void __tsan_destroy_fiber(void* fiber) __attribute__((weak));
void __tsan_switch_to_fiber(void* fiber, unsigned flags) __attribute__((weak));
void __tsan_acquire(void* address) __attribute__((weak));
void __tsan_release(void* address) __attribute__((weak));
void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t bytes) __attribute__((weak));
void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* bytes) __attribute__((weak));
void __asan_unpoison_memory_region(const volatile void* address, size_t bytes) __attribute__((weak));
}

namespace fused_resnet {
namespace host_execution {

inline bool has_thread_sanitizer() { return __tsan_create_fiber != nullptr; }
inline bool has_address_sanitizer() { return __asan_unpoison_memory_region != nullptr; }

// What happened before a release is seen after an acquire of the same object.
inline void release(void* object) {
  if (has_thread_sanitizer()) __tsan_release(object);
}
inline void acquire(void* object) {
  if (has_thread_sanitizer()) __tsan_acquire(object);
}

}  // namespace host_execution
}  // namespace fused_resnet
