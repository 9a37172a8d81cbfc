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

// What a block has merged of its channels, and reads again where it overflowed: squares of distances beyond 1e19 do, in
// float32. Threads whose number is the same modulo `width` have the same channel and the same m2, which lies in
// `shared` as sum_modulo has left it. Then mean and m2 are of two passes over x in float64, which hardly ever run.
template <int kAll, typename T>
__device__ __forceinline__ void read_again_what_overflowed(const T* x, int64_t rows, int channels, int channel,
                                                           int width, double* shared, double& mean, double& m2) {
  bool all_finite = true;
  for (int i = 0; i < width; ++i) all_finite = all_finite && shared[i] - shared[i] == 0.0;
  if (all_finite) return;
  const bool mine = channel < channels && m2 - m2 != 0.0;
  const int64_t step = kAll / width, first = mine ? threadIdx.x / width : rows;
  double sum = 0.0, squares = 0.0;
#pragma unroll 1
  for (int64_t row = first; row < rows; row += step) sum += widen(x[row * channels + channel]);
  sum = sum_modulo<kAll>(width, sum, shared) / static_cast<double>(rows);
#pragma unroll 1
  for (int64_t row = first; row < rows; row += step) {
    const double distance = widen(x[row * channels + channel]) - sum;
    squares += distance * distance;
  }
  squares = sum_modulo<kAll>(width, squares, shared);
  if (mine) mean = sum, m2 = squares;
}

}  // namespace fused_resnet
