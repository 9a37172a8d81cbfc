// The second stage of a reduction over rows: blocks of a few channels and many lanes, which share the parts.
#pragma once

#include "rows.cuh"

namespace fused_resnet {

constexpr int kMergeChannels = 8;  // of a block: 64 bytes of a row of partial means
constexpr int kMergeLanes = kThreads / kMergeChannels;

// One number of each thread, added up over the threads whose number is the same modulo `width`, a power of two as
// kAll is, in an order that these alone decide; every thread gets the sum of its own. `shared` has kAll numbers.
template <int kAll>
__device__ __forceinline__ double sum_modulo(int width, double value, double* shared) {
  __syncthreads();  // somebody may still read what is there
  shared[threadIdx.x] = value;
  for (int half = kAll / 2; half >= width; half /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < half) shared[threadIdx.x] += shared[threadIdx.x + half];
  }
  __syncthreads();
  return shared[threadIdx.x % width];
}

}  // namespace fused_resnet
