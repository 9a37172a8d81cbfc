// The kernels of self_test.cpp.
#pragma once

#include <cuda_runtime.h>

#include "../../../csrc/cuda/device.cuh"

constexpr unsigned kAllLanes = 0xffffffffu;

// sums[block] = the sum of the block's values; shared memory: a float for each warp.
__global__ void sum_kernel(const float* values, float* sums) {
  float* of_warps = static_cast<float*>(fused_resnet::dynamic_shared_memory());
  float sum = values[blockIdx.x * blockDim.x + threadIdx.x];
  for (int lane_mask = 16; lane_mask > 0; lane_mask /= 2) sum += __shfl_xor_sync(kAllLanes, sum, lane_mask);
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (unsigned i = 1; i < blockDim.x / 32; i++) sum += of_warps[i];
    sums[blockIdx.x] = sum;
  }
}

// order[n] is the thread that came n-th.
__global__ void order_kernel(unsigned* order, unsigned* next) {
  order[atomicAdd(next, 1u)] = blockIdx.x * blockDim.x + threadIdx.x;
}

// Ballot of "a multiple of 3 of the lanes", any of "thread 7", the value one lane up; 48 threads.
__global__ void vote_kernel(unsigned* results) {
  const unsigned i = threadIdx.x;
  results[i] = __ballot_sync(kAllLanes, i % 32 % 3 == (i < 32 ? 0 : 2));
  results[48 + i] = static_cast<unsigned>(__any_sync(kAllLanes, i == 7));
  results[96 + i] = static_cast<unsigned>(__shfl_down_sync(kAllLanes, static_cast<uint64_t>(i), 1u));
}

// Through shared memory; thread 5's part is zeros. With kPending 1 the copy need not have arrived.
template <int kPending>
__global__ void copy_kernel(const float* from, float* to) {
  float* shared = static_cast<float*>(fused_resnet::dynamic_shared_memory()) + 4 * threadIdx.x;
  fused_resnet::copy_async_16(shared, from + 4 * threadIdx.x, threadIdx.x != 5);
  fused_resnet::commit_copies();
  fused_resnet::wait_copies<kPending>();
  const uint4 value = *reinterpret_cast<const uint4*>(shared);
  reinterpret_cast<uint4*>(to)[threadIdx.x] = value;
}

// d = c + a (16x16, row-major) * b (16x8, column-major), with all fragments taken by load_matrix_x4.
template <typename T>
__global__ void product_kernel(const T* a, const T* b, const float* c, float* d) {
  T* of_a = static_cast<T*>(fused_resnet::dynamic_shared_memory());
  T* of_b = of_a + 256;
  const unsigned lane = threadIdx.x, row = lane / 4, column = lane % 4 * 2;
  for (unsigned i = lane; i < 256; i += 32) of_a[i] = a[i];
  for (unsigned i = lane; i < 128; i += 32) of_b[i] = b[i];
  __syncwarp();
  uint32_t left[4], right[4];
  fused_resnet::load_matrix_x4(left, of_a + lane % 16 * 16 + lane / 16 * 8);
  fused_resnet::load_matrix_x4(right, of_b + lane % 8 * 16 + lane / 8 % 2 * 8);
  float sums[4] = {c[row * 8 + column], c[row * 8 + column + 1], c[row * 8 + 64 + column],
                   c[row * 8 + 64 + column + 1]};
  fused_resnet::multiply_accumulate<T>(sums, left, right[0], right[1]);
  d[row * 8 + column] = sums[0];
  d[row * 8 + column + 1] = sums[1];
  d[row * 8 + 64 + column] = sums[2];
  d[row * 8 + 64 + column + 1] = sums[3];
}

// Twice: every thread writes its value and sums everybody's.
__global__ void grid_kernel(unsigned* values, unsigned* sums) {
  const unsigned self = blockIdx.x * blockDim.x + threadIdx.x;
  fused_resnet::wait_for_previous_grid();
  for (unsigned turn = 0; turn < 2; turn++) {
    fused_resnet::grid_barrier();
    values[self] = self + turn;
    fused_resnet::grid_barrier();
    unsigned sum = 0;
    for (unsigned i = 0; i < gridDim.x * blockDim.x; i++) sum += values[i];
    sums[self] = sum;
  }
  fused_resnet::allow_next_grid();
}

// The block that ends last sums what all blocks have written. Without the fence it may read what was there before.
template <bool kFenced>
__global__ void last_block_kernel(unsigned* values, unsigned* done, unsigned* sum) {
  unsigned* is_last = static_cast<unsigned*>(fused_resnet::dynamic_shared_memory());
  values[blockIdx.x * blockDim.x + threadIdx.x] = blockIdx.x * blockDim.x + threadIdx.x;
  if (kFenced) __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) *is_last = atomicAdd(done, 1u) == gridDim.x - 1;
  __syncthreads();
  if (*is_last == 0 || threadIdx.x != 0) return;
  if (kFenced) __threadfence();
  for (unsigned i = 0; i < gridDim.x * blockDim.x; i++) *sum += values[i];
}

template <bool kSynchronized>
__global__ void neighbour_kernel(int* values) {
  int* shared = static_cast<int*>(fused_resnet::dynamic_shared_memory());
  shared[threadIdx.x] = static_cast<int>(threadIdx.x);
  if (kSynchronized) __syncthreads();
  values[threadIdx.x] = shared[(threadIdx.x + 33) % blockDim.x];
}

// The next lane's value through shared memory. A shuffle makes the lanes meet, but does not order memory.
template <bool kOrdered>
__global__ void next_lane_kernel(int* values) {
  int* shared = static_cast<int*>(fused_resnet::dynamic_shared_memory());
  shared[threadIdx.x] = static_cast<int>(threadIdx.x);
  __shfl_xor_sync(kAllLanes, 1, 1);
  if (kOrdered) __syncwarp();
  values[threadIdx.x] = shared[(threadIdx.x + 1) % 32];
}

// Two stages in one buffer: the copy of the second begins before or after all have read the first.
template <bool kAfter>
__global__ void two_stages_kernel(const float* from, float* to) {
  float* shared = static_cast<float*>(fused_resnet::dynamic_shared_memory());
  const unsigned i = threadIdx.x;
  for (unsigned stage = 0; stage < 2; stage++) {
    fused_resnet::copy_async_16(shared + 4 * i, from + 4 * i, true);
    fused_resnet::commit_copies();
    if (!kAfter && stage > 0) __syncthreads();
    fused_resnet::wait_copies<0>();
    __syncthreads();
    to[i] = shared[(4 * i + 64) % 128];
    if (kAfter) __syncthreads();
  }
}

__global__ void misaligned_kernel(const float* from, float* to) {
  to[0] = static_cast<float>(reinterpret_cast<const uint2*>(from + 1)->x);
}

__global__ void divergent_barrier_kernel() {
  if (threadIdx.x < 40) __syncthreads();
}
__global__ void missing_lane_kernel() {
  if (threadIdx.x != 9) __shfl_xor_sync(kAllLanes, 1.0f, 1);
}
__global__ void mixed_operations_kernel() {
  if (threadIdx.x % 2 == 0) {
    __shfl_xor_sync(kAllLanes, 1.0f, 2);
  } else {
    __ballot_sync(kAllLanes, 1);
  }
}
__global__ void partial_mask_kernel() { __syncwarp(0xffffu); }

__global__ void bad_address_kernel(const float* from, int shared_offset, int global_offset) {
  char* shared = static_cast<char*>(fused_resnet::dynamic_shared_memory());
  fused_resnet::copy_async_16(shared + shared_offset, reinterpret_cast<const char*>(from) + global_offset, true);
}

template <typename V>
__global__ void load_kernel(const float* from, float* to) {
  to[0] = static_cast<float>(fused_resnet::load_once(reinterpret_cast<const V*>(from)).x);
}

__global__ void empty_kernel() {}

__global__ void overrun_kernel(int index) {
  if (threadIdx.x == 3) static_cast<float*>(fused_resnet::dynamic_shared_memory())[index] = 1.0f;
}
