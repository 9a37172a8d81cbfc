// The two ways through an activation, for both memory formats: visit every element, or reduce each channel.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "cpu/bn_act.h"
#include "cpu/simd/element.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace fused_resnet {
namespace CPU_CAPABILITY {

// Sets out[i] = value(i, channel(c)) for every element i of channel c. channel(c) gathers what `value` needs to know of
// its channel: read beside the element in NHWC, once per plane in NCHW. Ordinary stores: non-temporal ones made the
// pass itself up to twice as fast and the training step around it slower, for the convolution that reads next.
template <typename Storage, typename Channel, typename Value>
void for_each_element(const Activation& shape, Storage* out, const Channel& channel, const Value& value) {
  const int64_t channels = shape.channels;
  const int64_t pixels = shape.pixels;
  if (shape.channels_last) {
    const int64_t rows = shape.count();
#pragma omp parallel for num_threads(shape.threads) schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t offset = row * channels;
#pragma GCC ivdep
      for (int64_t c = 0; c < channels; ++c) out[offset + c] = value(offset + c, channel(c));
    }
  } else {
    const int64_t planes = shape.images * channels;
#pragma omp parallel for num_threads(shape.threads) schedule(static)
    for (int64_t plane = 0; plane < planes; ++plane) {
      const int64_t offset = plane * pixels;
      const auto plane_channel = channel(plane % channels);
#pragma GCC ivdep
      for (int64_t p = 0; p < pixels; ++p) out[offset + p] = value(offset + p, plane_channel);
    }
  }
}

inline int thread_number() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// Two sums a reduction keeps of one channel.
struct Sums {
  float first;
  float second;
};

// Elements summed in float32 before they go into the float64 totals.
constexpr int64_t kTilePixels = 512;          // of one plane (NCHW)
constexpr int64_t kMinTileRows = 64;          // of an NHWC activation
constexpr int64_t kMaxTileRows = 256;         // before rounding shows in float32
constexpr int64_t kMaxChunks = 32;            // of an NHWC activation: as many as cores may work on it
constexpr int64_t kMergedChannels = 64;       // merged by one thread over all chunks
constexpr int kLanes = 32;                    // interleaved sums along a contiguous run
constexpr int kRowGroup = 4;                  // short rows added together before they touch the sums in memory
constexpr int64_t kShortRow = 128;            // longer rows out of memory are read one by one, as prefetchers like it
constexpr int64_t kCachedElements = 1 << 20;  // of an activation that the producer left in a cache

template <typename Reduction, typename Result>
void reduce_rows(const Activation& shape, const Reduction& reduction, const Result& result) {
  const int64_t channels = shape.channels;
  const int64_t rows = shape.count();
  const int64_t tile_rows = std::min(std::max((rows + kMaxChunks - 1) / kMaxChunks, kMinTileRows), kMaxTileRows);
  const int64_t tiles = (rows + tile_rows - 1) / tile_rows;
  const int64_t chunk_rows = (tiles + kMaxChunks - 1) / kMaxChunks * tile_rows;
  const int64_t chunks = (rows + chunk_rows - 1) / chunk_rows;
  const bool by_groups = channels <= kShortRow || rows * channels <= kCachedElements;
  std::vector<double> totals(2 * chunks * channels);
  double* const total_first = totals.data();
  double* const total_second = total_first + chunks * channels;
  // All memory is taken out here: an exception that leaves a parallel region ends the process.
  std::vector<Reduction> locals(chunks, reduction);
  std::vector<float> sums(2 * chunks * channels);
#pragma omp parallel for num_threads(shape.threads) schedule(static)
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    Reduction& local = locals[chunk];
    float* const first = sums.data() + 2 * chunk * channels;
    float* const second = first + channels;
    const int64_t begin = chunk * chunk_rows;
    const int64_t end = std::min(rows, begin + chunk_rows);
    for (int64_t tile = begin; tile < end; tile += tile_rows) {
      const int64_t tile_end = std::min(tile + tile_rows, end);
      local.begin_tile(0, channels, tile * channels, channels, tile_end - tile);
      std::fill(first, second + channels, 0.0f);
      int64_t row = tile;
      const auto add_rows = [&](auto group) {
        const int64_t offset = row * channels;
#pragma GCC ivdep
        for (int64_t c = 0; c < channels; ++c) {
          const auto channel = local.channel(c);
          Sums added{0.0f, 0.0f};
          for (int g = 0; g < decltype(group)::value; ++g) {
            const Sums value = local.value(offset + g * channels + c, channel);
            added.first += value.first;
            added.second += value.second;
          }
          first[c] += added.first;
          second[c] += added.second;
        }
        row += decltype(group)::value;
      };
      if (by_groups) {
        while (row + kRowGroup <= tile_end) add_rows(std::integral_constant<int, kRowGroup>{});
      }
      while (row < tile_end) add_rows(std::integral_constant<int, 1>{});
      local.end_tile(0, channels, first, second, tile_end - tile, tile - begin, total_first + chunk * channels,
                     total_second + chunk * channels);
    }
  }
#pragma omp parallel for num_threads(shape.threads) schedule(static)
  for (int64_t c_begin = 0; c_begin < channels; c_begin += kMergedChannels) {
    const int64_t c_end = std::min(channels, c_begin + kMergedChannels);
    for (int64_t chunk = 1; chunk < chunks; ++chunk) {
      const int64_t before = chunk * chunk_rows;
      const int64_t offset = chunk * channels + c_begin;
      Reduction::merge(c_end - c_begin, total_first + offset, total_second + offset,
                       std::min(chunk_rows, rows - before), before, total_first + c_begin, total_second + c_begin);
    }
    for (int64_t c = c_begin; c < c_end; ++c) result(c, total_first[c], total_second[c]);
  }
}

template <typename Reduction, typename Result>
void reduce_planes(const Activation& shape, const Reduction& reduction, const Result& result) {
  std::vector<Reduction> locals(shape.threads, reduction);  // out here, as in reduce_rows
#pragma omp parallel for num_threads(shape.threads) schedule(static)
  for (int64_t c = 0; c < shape.channels; ++c) {
    Reduction& local = locals[thread_number()];
    double total_first = 0.0, total_second = 0.0;
    int64_t total_count = 0;
    for (int64_t image = 0; image < shape.images; ++image) {
      const int64_t plane = (image * shape.channels + c) * shape.pixels;
      for (int64_t begin = 0; begin < shape.pixels; begin += kTilePixels) {
        const int64_t count = std::min(kTilePixels, shape.pixels - begin);
        const int64_t offset = plane + begin;
        local.begin_tile(c, c + 1, offset, 1, count);
        const auto channel = local.channel(c);
        float first[kLanes] = {};
        float second[kLanes] = {};
        int64_t i = 0;
        for (; i + kLanes <= count; i += kLanes) {
#pragma GCC ivdep
          for (int lane = 0; lane < kLanes; ++lane) {
            const Sums value = local.value(offset + i + lane, channel);
            first[lane] += value.first;
            second[lane] += value.second;
          }
        }
        for (int lane = 0; i < count; ++i, ++lane) {
          const Sums value = local.value(offset + i, channel);
          first[lane] += value.first;
          second[lane] += value.second;
        }
        for (int lane = 1; lane < kLanes; ++lane) {
          first[0] += first[lane];
          second[0] += second[lane];
        }
        local.end_tile(c, c + 1, first, second, count, total_count, &total_first, &total_second);
        total_count += count;
      }
    }
    result(c, total_first, total_second);
  }
}

// Reduces every channel with `reduction`, which is copied for every chunk of work and has
//   begin_tile(c_begin, c_end, offset, stride, count): the tile's elements of channel c lie at offset + c - c_begin,
//                                                      `stride` apart;
//   channel(c), value(i, channel) -> Sums:             what element i adds;
//   end_tile(c_begin, c_end, first, second, count, total_count, total_first, total_second):
//                                                      adds a finished tile of `count` elements, whose sums are first[c
//                                                      - c_begin] and so on, to the totals of `total_count` before it;
//   merge(channels, first, second, count, total_count, total_first, total_second): adds other totals, of `count`
//                                                      elements, to the totals of so many channels;
// and calls result(c, first, second) once per channel.
template <typename Reduction, typename Result>
void reduce_channels(const Activation& shape, const Reduction& reduction, const Result& result) {
  if (shape.channels_last) {
    reduce_rows(shape, reduction, result);
  } else {
    reduce_planes(shape, reduction, result);
  }
}

// Calls run(T{}) with the element type of `dtype`.
template <typename Run>
void with_element(DType dtype, const Run& run) {
  switch (dtype) {
    case DType::float32:
      return run(Float32{});
    case DType::float16:
      return run(Float16{});
    case DType::bfloat16:
      return run(BFloat16{});
  }
}

// Calls run(std::true_type or std::false_type): a choice made once, outside the loops.
template <typename Run>
void with_bool(bool value, const Run& run) {
  value ? run(std::true_type{}) : run(std::false_type{});
}

// A Norm's vectors with the null ones filled in.
struct ChannelVectors {
  const float* mean;
  std::vector<float> scale;  // weight * invstd
  std::vector<float> bias;

  ChannelVectors(const Norm& norm, int64_t channels)
      : mean(norm.mean), scale(norm.invstd, norm.invstd + channels), bias(channels, 0.0f) {
    if (norm.weight != nullptr) {
      for (int64_t c = 0; c < channels; ++c) scale[c] *= norm.weight[c];
    }
    if (norm.bias != nullptr) std::copy_n(norm.bias, channels, bias.begin());
  }
};

}  // namespace CPU_CAPABILITY
}  // namespace fused_resnet
