// Batch norm in training, residual add and ReLU of an activation that fits in the shared memory of the whole device: a
// single launch that reads it once. Between its statistics and its use it waits in shared memory for the slowest block.
#pragma once

#include "bn_apply.cuh"
#include "bn_stats.cuh"

namespace fused_resnet {

constexpr int kResidentThreads = 512;  // one block a multiprocessor, with 128 registers for each thread

// The block's shared memory: this, then one Vector for each thread and layer.
template <int kCount>
struct Resident {
  MomentsOfWarps<kCount, kResidentThreads / 32> moments;
  double sums[kResidentThreads];
  double merged_mean[32 * kCount];
  float mean[32 * kCount], scale[32 * kCount], bias[32 * kCount];
};

// Of each channel of the block the sum of `term(part, channel)` over the parts, in a fixed order, in the threads below
// lanes * kCount. `shared` is used again only after a barrier.
template <int kCount, typename Term>
__device__ __forceinline__ double sum_of_parts(const Rows& shape, int parts, double (&shared)[kResidentThreads],
                                               const Term& term) {
  const int width = shape.lanes * kCount;
  const int index = threadIdx.x % width, first = threadIdx.x / width, step = kResidentThreads / width;
  const int channel = blockIdx.x * width + index;
  double sum = 0.0;
  for (int part = first; channel < shape.channels && part < parts; part += step) sum += term(part, channel, index);
  shared[threadIdx.x] = sum;
  __syncthreads();
  sum = 0.0;
  for (int k = 0; first == 0 && k < step; ++k) sum += shared[k * width + index];
  return sum;
}

// out = act(batch_norm(x) + residual), and the statistics. A cooperative launch: block (i, j) owns the i-th slice of
// channels and, of its layers of rows, j, j + gridDim.y, ...; `layers` is the most that a block has. The partial
// results are (gridDim.y, channels). Reads 1T (2T with a residual), writes 1T, and the mask if `mask.bits` is not null.
template <typename T, int kCount>
__global__ __launch_bounds__(kResidentThreads) void bn_stats_apply_kernel(
    const T* __restrict__ x, const T* __restrict__ residual, const float* __restrict__ weight,
    const float* __restrict__ bias, Rows shape, Deal deal, int layers, double* means, float* m2s, Statistics statistics,
    bool relu, T* __restrict__ out, BitMask mask) {
  auto& shared = *static_cast<Resident<kCount>*>(dynamic_shared_memory());
  auto* const kept = reinterpret_cast<Vector<T, kCount>*>(&shared + 1) + threadIdx.x;
  const Position<kCount> place(shape);
  const int parts = gridDim.y, width = shape.lanes * kCount;
  const auto row_of = [&](int k) { return (blockIdx.y + int64_t{k} * parts) * shape.layer + place.row; };

  float shift[kCount] = {};
  Moments<kCount> moments;
  if (place.inside) {
    load_vector<kCount>(x + int64_t{blockIdx.y} * shape.layer * shape.channels + place.channel).unpack(shift);
  }
  for (int k = 0; k < layers; k += kStatsRows) {
    int own = 0;  // rows of this thread among the next kStatsRows
    while (place.inside && own < kStatsRows && k + own < layers && row_of(k + own) < shape.rows) ++own;
    Vector<T, kCount> loaded[kStatsRows] = {};
#pragma unroll
    for (int j = 0; j < kStatsRows; ++j) {
      if (j < own) loaded[j] = load_vector<kCount>(x + row_of(k + j) * shape.channels + place.channel);
    }
#pragma unroll
    for (int j = 0; j < kStatsRows; ++j) {
      if (j >= own) continue;
      kept[(k + j) * kResidentThreads] = loaded[j];
      if (own < kStatsRows) moments.add(loaded[j], shift);
    }
    if (own == kStatsRows) moments.add(loaded, shift);
  }
  merge_in_block(moments, shift, shape, shared.moments, [&](int index, double mean, float m2) {
    const int channel = blockIdx.x * width + index;
    if (channel < shape.channels) {
      means[int64_t{blockIdx.y} * shape.channels + channel] = mean;
      m2s[int64_t{blockIdx.y} * shape.channels + channel] = m2;
    }
  });
  grid_barrier();

  const double rows = static_cast<double>(shape.rows), share = 1.0 / rows;
  const double mean = sum_of_parts<kCount>(shape, parts, shared.sums, [&](int part, int channel, int) {
    return means[int64_t{part} * shape.channels + channel] * (deal.rows_of(part) * share);
  });
  const int own_channel = blockIdx.x * width + threadIdx.x;
  const bool owns_channel = static_cast<int>(threadIdx.x) < width && own_channel < shape.channels;
  if (owns_channel) shared.merged_mean[threadIdx.x] = mean;
  __syncthreads();
  const double m2 = sum_of_parts<kCount>(shape, parts, shared.sums, [&](int part, int channel, int index) {
    const double distance = means[int64_t{part} * shape.channels + channel] - shared.merged_mean[index];
    return m2s[int64_t{part} * shape.channels + channel] + deal.rows_of(part) * distance * distance;
  });
  if (owns_channel) {
    const float invstd = statistics.invstd_of(m2, rows);
    if (blockIdx.y == 0) statistics.store(own_channel, mean, m2, rows);
    shared.mean[threadIdx.x] = static_cast<float>(mean);
    shared.scale[threadIdx.x] = invstd * (weight == nullptr ? 1.0f : weight[own_channel]);
    shared.bias[threadIdx.x] = bias == nullptr ? 0.0f : bias[own_channel];
  }
  __syncthreads();

  float center[kCount], scale[kCount], offset[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    center[i] = shared.mean[place.lane * kCount + i];
    scale[i] = shared.scale[place.lane * kCount + i];
    offset[i] = shared.bias[place.lane * kCount + i];
  }
  for (int k = 0; k < layers; ++k) {
    const int64_t row = row_of(k);
    const bool inside = place.inside && row < shape.rows;
    float z[kCount] = {}, added[kCount] = {};
    if (inside) kept[k * kResidentThreads].unpack(z);
    if (inside && residual != nullptr) {
      load_vector<kCount, Reuse::kOnce>(residual + row * shape.channels + place.channel).unpack(added);
    }
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      z[i] = (z[i] - center[i]) * scale[i] + offset[i] + added[i];
      if (relu) {
        bits |= static_cast<uint32_t>(!(z[i] <= 0.0f)) << i;
        z[i] = relu_of(z[i]);
      }
    }
    if (inside) store_vector(out + row * shape.channels + place.channel, Vector<T, kCount>::pack(z));
    if (mask.bits != nullptr) mask.store<kCount>(row, place.channel, inside, bits);
  }
}

}  // namespace fused_resnet
