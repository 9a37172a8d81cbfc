// What a kernel says to the machine in words of its own: shared memory, asynchronous copies, matrix instructions,
// conversions. Nothing else in csrc/cuda is assembly, so the same kernel source runs on the CPU in the tests, where
// tests/cuda/host_execution gives these functions, and the CUDA names that C++ does not know, bodies of plain C++.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#ifndef __CUDACC__
#include <host_execution.h>
#else

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace fused_resnet {

// The block's shared memory, as many bytes as the launch asked for.
__device__ __forceinline__ void* dynamic_shared_memory() {
  extern __shared__ __align__(128) unsigned char bytes[];
  return bytes;
}

// Every thread of a cooperative launch waits for every other; what was written to global memory before is seen after.
__device__ __forceinline__ void grid_barrier() { cooperative_groups::this_grid().sync(); }

// A launch may start before the one in front of it on the stream has ended, where it was launched so (launch.h): before
// it touches memory it waits here until what that one wrote is seen.
__device__ __forceinline__ void wait_for_previous_grid() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// From here on, the next launch on the stream may start, if it waits as above.
__device__ __forceinline__ void allow_next_grid() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// 16 bytes global -> shared, both addresses multiples of 16, not waited for; zeros, and `global` not read, if not
// inside.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global, bool inside) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const int bytes = inside ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(bytes) : "memory");
}
// The copies begun by this thread since the last commit become one group.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// All but the last kPending groups of this thread have arrived; a barrier makes them visible to the other threads.
template <int kPending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// A warp reads four 8x8 matrices of 16-bit elements from shared memory. Lane l gives the address of row l % 8 of matrix
// l / 8, a multiple of 16 bytes; of matrix i it gets in r[i] elements 2 * (l % 4) and + 1 of row l / 4.
__device__ __forceinline__ void load_matrix_x4(uint32_t (&r)[4], const void* row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// d (16x8, float32) += a (16x16, row-major) * b (16x8, column-major), by a warp. The fragments are those of PTX's
// mma.m16n8k16: a is the matrices of load_matrix_x4 {rows 0-7 | 8-15} of columns 0-7, then of columns 8-15.
template <typename T>
__device__ __forceinline__ void multiply_accumulate(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ __forceinline__ void multiply_accumulate<Half>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                                          uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void multiply_accumulate<BFloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                                              uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Elements in memory to float32 and back, rounded to nearest even. Two at once: the low half of the word first.
__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ float widen(Half value) { return __half2float(__ushort_as_half(value.bits)); }
__device__ __forceinline__ float widen(BFloat16 value) { return __uint_as_float(uint32_t{value.bits} << 16); }

template <typename T>
__device__ __forceinline__ T narrow(float value);
template <>
__device__ __forceinline__ float narrow<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ Half narrow<Half>(float value) {
  return {__half_as_ushort(__float2half_rn(value))};
}
template <>
__device__ __forceinline__ BFloat16 narrow<BFloat16>(float value) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
}

template <typename T>
__device__ __forceinline__ uint32_t narrow_2(float low, float high);
template <>
__device__ __forceinline__ uint32_t narrow_2<Half>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}
template <>
__device__ __forceinline__ uint32_t narrow_2<BFloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

// The larger of each of two unsigned 16-bit numbers.
__device__ __forceinline__ uint32_t max_u16x2(uint32_t a, uint32_t b) { return __vmaxu2(a, b); }

// The line of memory at this address is on its way to the L2 cache.
__device__ __forceinline__ void prefetch(const void* global) { asm volatile("prefetch.global.L2 [%0];" ::"l"(global)); }

// A load of what nobody reads again soon: it need not push anything else out of the caches.
template <typename V>
__device__ __forceinline__ V load_once(const V* address) {
  return __ldcs(address);
}

}  // namespace fused_resnet
#endif  // __CUDACC__
