// The names that CUDA gives to code of a kernel: built-in variables, vector types, warp operations, arithmetic.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "execution.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

constexpr int warpSize = 32;

inline void __syncthreads() { fused_resnet::host_execution::block_barrier(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { fused_resnet::host_execution::warp_barrier(mask); }
inline void __threadfence() { fused_resnet::host_execution::fence(); }
inline void __threadfence_block() { fused_resnet::host_execution::fence(); }

namespace fused_resnet {
namespace host_execution {

template <typename T>
inline T shuffle_of(Operation operation, unsigned mask, T value, unsigned source_lane) {
  static_assert(std::is_trivially_copyable_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "4 or 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = shuffle(operation, mask, bits, source_lane);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace host_execution
}  // namespace fused_resnet

// A source outside the warp gives the lane its own value.
template <typename T>
inline T __shfl_sync(unsigned mask, T value, int source_lane) {
  using namespace fused_resnet::host_execution;
  return shuffle_of(Operation::kShuffle, mask, value, static_cast<unsigned>(source_lane) % 32);
}
template <typename T>
inline T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  using namespace fused_resnet::host_execution;
  return shuffle_of(Operation::kShuffleXor, mask, value, lane() ^ static_cast<unsigned>(lane_mask));
}
template <typename T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta) {
  using namespace fused_resnet::host_execution;
  return shuffle_of(Operation::kShuffleDown, mask, value, lane() + delta);
}
template <typename T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta) {
  using namespace fused_resnet::host_execution;
  return shuffle_of(Operation::kShuffleUp, mask, value, lane() - delta);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return fused_resnet::host_execution::ballot(fused_resnet::host_execution::Operation::kBallot, mask, predicate != 0);
}
inline int __any_sync(unsigned mask, int predicate) {
  return fused_resnet::host_execution::ballot(fused_resnet::host_execution::Operation::kAny, mask, predicate != 0) != 0;
}
inline int __all_sync(unsigned mask, int predicate) {
  return fused_resnet::host_execution::ballot(fused_resnet::host_execution::Operation::kAll, mask, predicate == 0) == 0;
}

// Relaxed, as in CUDA: it orders nothing but itself. Never on float, whose sum would depend on the order.
inline unsigned atomicAdd(unsigned* address, unsigned value) {
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}
inline int atomicAdd(int* address, int value) { return __atomic_fetch_add(address, value, __ATOMIC_RELAXED); }
template <typename T>
inline T __ldg(const T* address) {
  return *address;
}
template <typename T>
inline T __ldcs(const T* address) {
  return *address;
}
template <typename T>
inline void __stcs(T* address, T value) {
  *address = value;
}

// As CUDA's: of a number and a NaN, the number.
template <typename T, typename = std::enable_if_t<std::is_arithmetic_v<T>>>
constexpr T min(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) return std::fmin(a, b);
  return b < a ? b : a;
}
template <typename T, typename = std::enable_if_t<std::is_arithmetic_v<T>>>
constexpr T max(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) return std::fmax(a, b);
  return a < b ? b : a;
}
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float value) { return 1.0f / value; }
inline float __fsqrt_rn(float value) { return std::sqrt(value); }
inline float rsqrtf(float value) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(value))); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
inline int __float_as_int(float value) { return static_cast<int>(__float_as_uint(value)); }
inline float __int_as_float(int bits) { return __uint_as_float(static_cast<unsigned>(bits)); }
inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline int __clz(int value) { return value == 0 ? 32 : __builtin_clz(static_cast<unsigned>(value)); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((uint64_t{a} * b) >> 32); }
