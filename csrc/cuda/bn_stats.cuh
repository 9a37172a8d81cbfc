// Statistics of each channel: every block merges what its threads have seen into one partial result, and a second,
// tiny launch merges those, in an order that shapes alone decide. No atomics: the same bits in every run.
#pragma once

#include "merge.cuh"
#include "rows.cuh"

namespace fused_resnet {

// Elements for each thread, at most 16 bytes, and rows that it loads before it computes with any of them.
constexpr int kStatsCount = 8, kStatsRows = 4;

// Count, mean and summed squared deviations of kCount channels. The means are distances from a shift, a value of the
// channel itself: where |mean| >> std, that distance is exact and small, while a float32 mean would be rounded at every
// step by more than the variance can bear.
template <int kCount>
struct Moments {
  float count = 0.0f;
  float mean[kCount] = {};
  float m2[kCount] = {};

  // One more value of each channel: Welford's update.
  template <typename T>
  __device__ __forceinline__ void add(const Vector<T, kCount>& row, const float (&shift)[kCount]) {
    float values[kCount];
    row.unpack(values);
    count += 1.0f;
    const float share = 1.0f / count;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float distance = (values[i] - shift[i]) - mean[i];
      mean[i] += distance * share;
      m2[i] += distance * ((values[i] - shift[i]) - mean[i]);
    }
  }

  // Four more values of each channel: their own moments first, then Chan's formula. A word at a time, or the values of
  // all four rows would take more registers than there are.
  template <typename T>
  __device__ __forceinline__ void add(const Vector<T, kCount> (&rows)[4], const float (&shift)[kCount]) {
    using Row = Vector<T, kCount>;
    const float share = 4.0f / (count + 4.0f);
    const float weight = count * share;
    count += 4.0f;
#pragma unroll
    for (int word = 0; word < Row::kWords; ++word) {
      float values[4][Row::kPerWord];
#pragma unroll
      for (int k = 0; k < 4; ++k) rows[k].unpack_word(word, values[k]);
#pragma unroll
      for (int k = 0; k < Row::kPerWord; ++k) {
        const int i = word * Row::kPerWord + k;
        const float a = values[0][k] - shift[i], b = values[1][k] - shift[i];
        const float c = values[2][k] - shift[i], d = values[3][k] - shift[i];
        const float middle = ((a + b) + (c + d)) * 0.25f;
        const float squares = ((a - middle) * (a - middle) + (b - middle) * (b - middle)) +
                              ((c - middle) * (c - middle) + (d - middle) * (d - middle));
        const float distance = middle - mean[i];
        mean[i] += distance * share;
        m2[i] += squares + distance * distance * weight;
      }
    }
  }

  // The moments of both this lane's values and those of the lane `offset` away.
  __device__ __forceinline__ void merge_across(int offset) {
    const float other_count = __shfl_xor_sync(~0u, count, offset);
    const float total = count + other_count;
    const float share = total > 0.0f ? other_count / total : 0.0f;
    const float weight = count * share;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float distance = __shfl_xor_sync(~0u, mean[i], offset) - mean[i];
      const float other_m2 = __shfl_xor_sync(~0u, m2[i], offset);
      mean[i] += distance * share;
      m2[i] += other_m2 + distance * distance * weight;
    }
    count = total;
  }
};

// Moments of a block's channels, one row for each warp.
template <int kCount, int kWarps>
struct MomentsOfWarps {
  float count[kWarps];
  float mean[kWarps][32 * kCount];
  float m2[kWarps][32 * kCount];
  float shift[32 * kCount];
};

// The moments of all threads with the same lane: threads 0 to lanes * kCount - 1 call `result(index of the channel in
// the block, mean, m2)` with them. Lanes that stand outside of the channels hold anything.
template <int kCount, int kWarps, typename Result>
__device__ __forceinline__ void merge_in_block(Moments<kCount> moments, const float (&shift)[kCount], const Rows& shape,
                                               MomentsOfWarps<kCount, kWarps>& shared, const Result& result) {
  for (int offset = shape.lanes; offset < 32; offset *= 2) moments.merge_across(offset);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (lane < shape.lanes) {
    if (lane == 0) shared.count[warp] = moments.count;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      shared.mean[warp][lane * kCount + i] = moments.mean[i];
      shared.m2[warp][lane * kCount + i] = moments.m2[i];
      if (warp == 0) shared.shift[lane * kCount + i] = shift[i];
    }
  }
  __syncthreads();
  const int index = threadIdx.x;
  if (index < shape.lanes * kCount) {
    float count = 0.0f, mean = 0.0f, m2 = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) count += shared.count[w];
#pragma unroll
    for (int w = 0; w < kWarps; ++w) mean += shared.mean[w][index] * (shared.count[w] / count);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float distance = shared.mean[w][index] - mean;
      m2 += shared.m2[w][index] + shared.count[w] * distance * distance;
    }
    result(index, static_cast<double>(shared.shift[index]) + mean, m2);
  }
}

// Row blockIdx.y of the partial means and M2, for the block's channels. Reads 1T.
template <typename T, int kCount>
__global__ __launch_bounds__(kThreads, kBlocksPerMultiprocessor) void bn_stats_kernel(const T* __restrict__ x,
                                                                                      Rows shape,
                                                                                      double* __restrict__ means,
                                                                                      float* __restrict__ m2s) {
  wait_for_previous_grid();
  const Position<kCount> place(shape);
  const int tile_rows = shape.layer * kStatsRows;
  float shift[kCount] = {};
  Moments<kCount> moments;
  if (place.inside) {
    const int64_t first_row = int64_t{blockIdx.y} * tile_rows;
    const T* from = x + first_row * shape.channels + place.channel;
    load_vector<kCount>(from).unpack(shift);
    from += int64_t{place.row} * shape.channels;
    const int64_t layer = int64_t{shape.layer} * shape.channels, step = int64_t{gridDim.y} * tile_rows;
    for (int64_t left = shape.rows - first_row - place.row; left > 0; left -= step, from += step * shape.channels) {
      if ((kStatsRows - 1) * shape.layer < left) {
        Vector<T, kCount> loaded[kStatsRows];
#pragma unroll
        for (int k = 0; k < kStatsRows; ++k) loaded[k] = load_vector<kCount>(from + k * layer);
        moments.add(loaded, shift);
      } else {
        for (int k = 0; k * shape.layer < left; ++k) moments.add(load_vector<kCount>(from + k * layer), shift);
      }
    }
  }
  allow_next_grid();
  auto& shared = *static_cast<MomentsOfWarps<kCount, kThreads / 32>*>(dynamic_shared_memory());
  merge_in_block(moments, shift, shape, shared, [&](int index, double mean, float m2) {
    const int channel = blockIdx.x * shape.lanes * kCount + index;
    if (channel < shape.channels) {
      means[int64_t{blockIdx.y} * shape.channels + channel] = mean;
      m2s[int64_t{blockIdx.y} * shape.channels + channel] = m2;
    }
  });
}

// What becomes of merged statistics; each of the running vectors may be null.
struct Statistics {
  float *mean, *invstd, *running_mean, *running_var;
  double momentum, eps;

  __device__ __forceinline__ void store(int channel, double merged_mean, double m2, double count) const {
    mean[channel] = static_cast<float>(merged_mean);
    invstd[channel] = static_cast<float>(1.0 / sqrt(m2 / count + eps));
    if (running_mean != nullptr) {
      running_mean[channel] = static_cast<float>((1.0 - momentum) * running_mean[channel] + momentum * merged_mean);
    }
    if (running_var != nullptr) {
      const double unbiased = m2 / (count > 1.0 ? count - 1.0 : 1.0);
      running_var[channel] = static_cast<float>((1.0 - momentum) * running_var[channel] + momentum * unbiased);
    }
  }
};

// Merges the partial results of each part (which the launch in front may still be writing when this one starts, so that
// the compiler must not take them for constant): first the mean of all, then the deviations from it.
template <typename T>
__global__ __launch_bounds__(kThreads, kBlocksPerMultiprocessor) void bn_finalize_kernel(
    const T* x, const double* means, const float* m2s, int channels, Deal deal, int64_t rows, Statistics statistics) {
  wait_for_previous_grid();
  double* const shared = static_cast<double*>(dynamic_shared_memory());
  const int channel = blockIdx.x * kMergeChannels + threadIdx.x % kMergeChannels;
  const int lane = threadIdx.x / kMergeChannels;
  const bool inside = channel < channels;
  const double share = 1.0 / static_cast<double>(rows);
  double mean = 0.0, m2 = 0.0;
  for (int part = lane; inside && part < deal.parts; part += kMergeLanes) {
    const double count = deal.rows_of(part);
    mean += means[int64_t{part} * channels + channel] * (count * share);
  }
  mean = sum_modulo<kThreads>(kMergeChannels, mean, shared);
  for (int part = lane; inside && part < deal.parts; part += kMergeLanes) {
    const double count = deal.rows_of(part);
    const double distance = means[int64_t{part} * channels + channel] - mean;
    m2 += m2s[int64_t{part} * channels + channel] + count * distance * distance;
  }
  m2 = sum_modulo<kThreads>(kMergeChannels, m2, shared);
  allow_next_grid();
  read_again_what_overflowed<kThreads>(x, rows, channels, channel, kMergeChannels, shared, mean, m2);
  if (inside && lane == 0) statistics.store(channel, mean, m2, static_cast<double>(rows));
}

}  // namespace fused_resnet
