// The second stage of a reduction over rows: blocks of a few channels and many lanes, which share the parts.
#pragma once

#include "rows.cuh"

namespace fused_resnet {

constexpr int kMergeChannels = 8;  // of a block: 64 bytes of a row of partial means
constexpr int kMergeLanes = kThreads / kMergeChannels;

// One number of each thread, added up over the threads with the same channel in a fixed order. `shared` is used again
// only after a barrier.
__device__ __forceinline__ double sum_of_lanes(double value, double (&shared)[kMergeLanes][kMergeChannels]) {
  const int channel = threadIdx.x % kMergeChannels, lane = threadIdx.x / kMergeChannels;
  __syncthreads();
  shared[lane][channel] = value;
  __syncthreads();
  double sum = 0.0;
#pragma unroll
  for (int l = 0; l < kMergeLanes; ++l) sum += shared[l][channel];
  return sum;
}

}  // namespace fused_resnet
