// The bodies, in plain C++, of what csrc/cuda/device.cuh declares: same names, same meaning.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "control.h"
#include "element_bits.h"
#include "execution.h"

namespace fused_resnet {

inline void* dynamic_shared_memory() { return host_execution::shared_memory(); }

inline void grid_barrier() { host_execution::grid_barrier(); }

// A launch has always ended before the next one starts.
inline void wait_for_previous_grid() {}
inline void allow_next_grid() {}

// Until the copy arrives, its destination holds NaN: who reads too early, or still reads what was there, sees that.
inline void copy_async_16(void* shared, const void* global, bool inside) {
  host_execution::check_aligned(shared, 16, "copy_async_16 to shared memory");
  host_execution::check_aligned(global, 16, "copy_async_16 from global memory");
  host_execution::check_shared(shared, 16, "copy_async_16");
  if (inside) {  // seen by sanitizers: global memory may be read from now on
    for (int i = 0; i < 4; i++) static_cast<void>(static_cast<const volatile uint32_t*>(global)[i]);
  }
  *static_cast<uint4*>(shared) = make_uint4(~0u, ~0u, ~0u, ~0u);
  host_execution::begin_copy(shared, inside ? global : nullptr);
}
inline void commit_copies() { host_execution::commit_copies(); }
template <int kPending>
inline void wait_copies() {
  static_assert(kPending >= 0);
  host_execution::Copy copy;
  while (host_execution::take_arrived_copy(kPending, &copy)) {
    *static_cast<uint4*>(copy.shared) =
        copy.global != nullptr ? *static_cast<const uint4*>(copy.global) : make_uint4(0, 0, 0, 0);
  }
}

inline void load_matrix_x4(uint32_t (&r)[4], const void* row) {
  host_execution::check_aligned(row, 16, "load_matrix_x4");
  host_execution::check_shared(row, 16, "load_matrix_x4");
  const void* rows[4];
  host_execution::exchange_rows(row, rows);
  for (int i = 0; i < 4; i++) r[i] = static_cast<const uint32_t*>(rows[i])[host_execution::lane() % 4];
}

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <typename T>
inline void multiply_accumulate(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
inline void multiply_accumulate<Half>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  host_execution::multiply(d, a, b0, b1, host_execution::float_of_half);
}
template <>
inline void multiply_accumulate<BFloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  host_execution::multiply(d, a, b0, b1, host_execution::float_of_bfloat16);
}

inline float widen(float value) { return value; }
inline float widen(Half value) { return host_execution::float_of_half(value.bits); }
inline float widen(BFloat16 value) { return host_execution::float_of_bfloat16(value.bits); }

template <typename T>
inline T narrow(float value);
template <>
inline float narrow<float>(float value) {
  return value;
}
template <>
inline Half narrow<Half>(float value) {
  return {host_execution::half_of_float(value)};
}
template <>
inline BFloat16 narrow<BFloat16>(float value) {
  return {host_execution::bfloat16_of_float(value)};
}

template <typename T>
inline uint32_t narrow_2(float low, float high);
template <>
inline uint32_t narrow_2<Half>(float low, float high) {
  return host_execution::half_of_float(low) | uint32_t{host_execution::half_of_float(high)} << 16;
}
template <>
inline uint32_t narrow_2<BFloat16>(float low, float high) {
  return host_execution::bfloat16_of_float(low) | uint32_t{host_execution::bfloat16_of_float(high)} << 16;
}

inline uint32_t max_u16x2(uint32_t a, uint32_t b) {
  const uint32_t low = max(a & 0xffffu, b & 0xffffu);
  return low | max(a >> 16, b >> 16) << 16;
}

inline void prefetch(const void*) {}

template <typename V>
inline V load_once(const V* address) {
  host_execution::check_aligned(address, alignof(V), "load_once");
  return *address;
}

}  // namespace fused_resnet
