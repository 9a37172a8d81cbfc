// Batch norm in training, residual add and ReLU of an activation that fits in the shared memory of the whole device: a
// single launch that reads it once. Between its statistics and its use it waits in shared memory for the slowest block.
#pragma once

#include "bn_apply.cuh"
#include "bn_stats.cuh"
#include "merge.cuh"

namespace fused_resnet {

constexpr int kResidentThreads = 512;  // one block a multiprocessor, with 128 registers for each thread

// The block's shared memory: this, then one Vector for each thread and layer.
template <int kCount>
struct Resident {
  MomentsOfWarps<kCount, kResidentThreads / 32> moments;
  double sums[kResidentThreads];
};

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

  // The parts of a slice share its channels: each merges those of `own` channels, and a second barrier hands them to
  // all. Were every part to merge all of them, they would read the partial results as often as there are parts.
  int own = 1;
  while (own * parts < width) own *= 2;
  if (static_cast<int>(blockIdx.y) * own < width) {
    const double rows = static_cast<double>(shape.rows), share = 1.0 / rows;
    const int channel = blockIdx.x * width + blockIdx.y * own + threadIdx.x % own;
    const int first = threadIdx.x / own, step = kResidentThreads / own;
    double mean = 0.0, m2 = 0.0;
    for (int part = first; channel < shape.channels && part < parts; part += step) {
      mean += means[int64_t{part} * shape.channels + channel] * (deal.rows_of(part) * share);
    }
    mean = sum_modulo<kResidentThreads>(own, mean, shared.sums);
    for (int part = first; channel < shape.channels && part < parts; part += step) {
      const double distance = means[int64_t{part} * shape.channels + channel] - mean;
      m2 += m2s[int64_t{part} * shape.channels + channel] + deal.rows_of(part) * distance * distance;
    }
    m2 = sum_modulo<kResidentThreads>(own, m2, shared.sums);
    read_again_what_overflowed<kResidentThreads>(x, shape.rows, shape.channels, channel, own, shared.sums, mean, m2);
    if (first == 0 && channel < shape.channels) statistics.store(channel, mean, m2, rows);
  }
  grid_barrier();

  float offset[kCount] = {};
  const Norm norm{statistics.mean, statistics.invstd, weight, bias};
  const Normalization<kCount> normalization(norm, place.inside ? place.channel : 0, offset);
  for (int k = 0; k < layers; ++k) {
    const int64_t row = row_of(k);
    const bool inside = place.inside && row < shape.rows;
    float z[kCount] = {}, added[kCount] = {};
    if (inside) kept[k * kResidentThreads].unpack(z);
    if (inside && residual != nullptr) {
      load_vector<kCount, Reuse::kOnce>(residual + row * shape.channels + place.channel).unpack(added);
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      z[i] = (z[i] - normalization.mean[i]) * normalization.scale[i] + offset[i] + added[i];
      if (relu) z[i] = relu_of(z[i]);
    }
    if (inside) store_vector(out + row * shape.channels + place.channel, Vector<T, kCount>::pack(z));
    if (mask.bits != nullptr) mask.store<kCount>(row, place.channel, inside, bits_of(z));
  }
}

}  // namespace fused_resnet
