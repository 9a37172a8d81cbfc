// Normalise, add, ReLU: the forward pass once the statistics are known, and the bit mask of the ReLU for backward.
#pragma once

#include "norm.h"
#include "rows.cuh"

namespace fused_resnet {

// (x - mean) * scale + bias. The mean is subtracted first: x * scale + shift loses its digits when |mean| >> std.
template <int kCount>
struct Normalization {
  float mean[kCount], scale[kCount];

  // Adds `norm`'s bias to `bias`.
  __device__ __forceinline__ Normalization(const Norm& norm, int channel, float (&bias)[kCount]) {
    load_channels<kCount>(norm.mean, channel, 0.0f, mean);
    load_channels<kCount>(norm.invstd, channel, 1.0f, scale);
    float factor[kCount];
    load_channels<kCount>(norm.weight, channel, 1.0f, factor);
#pragma unroll
    for (int i = 0; i < kCount; ++i) scale[i] *= factor[i];
    load_channels<kCount>(norm.bias, channel, 0.0f, factor);
#pragma unroll
    for (int i = 0; i < kCount; ++i) bias[i] += factor[i];
  }
};

// The bit mask of a ReLU, one row of `stride()` bytes for each row of the activation: bit c % 8 of byte c / 8 is set
// where the gradient of channel c passes. All lanes of a warp call `store` together, each with the bits of its kCount
// channels; kCount 4 needs channels in multiples of 8, kCount 1 needs 32 lanes.
struct BitMask {
  uint8_t* bits;
  int channels;

  __host__ __device__ int64_t stride() const { return (channels + 31) / 32 * 4; }

  template <int kCount>
  __device__ __forceinline__ void store(int64_t row, int channel, bool inside, uint32_t bits_of_lane) const {
    uint8_t* const to = bits + row * stride() + channel / 8;
    if constexpr (kCount == 8) {
      if (inside) *to = static_cast<uint8_t>(bits_of_lane);
    } else if constexpr (kCount == 4) {
      const uint32_t next = __shfl_xor_sync(~0u, bits_of_lane, 1);
      if (inside && channel % 8 == 0) *to = static_cast<uint8_t>(bits_of_lane | next << 4);
    } else {
      const uint32_t word = __ballot_sync(~0u, inside && bits_of_lane != 0);
      if (inside && channel % 32 == 0) *reinterpret_cast<uint32_t*>(to) = word;
    }
  }

  // The bits of kCount channels from `channel` on.
  template <int kCount>
  __device__ __forceinline__ uint32_t load(int64_t row, int channel) const {
    return bits[row * stride() + channel / 8] >> (channel % 8);
  }
};

// Which of a ReLU's results let a gradient pass: those that are not 0, NaN among them.
template <int kCount>
__device__ __forceinline__ uint32_t bits_of(const float (&results)[kCount]) {
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) bits |= static_cast<uint32_t>(results[i] != 0.0f) << i;
  return bits;
}

enum class Residual { kNone, kPlain, kNormalized };

// Elements for each thread, and rows that it loads before it computes with any of them. Four, for 8 of each of the
// vectors that go with the channels would not leave registers for 1,024 threads.
constexpr int kApplyCount = 4;
template <typename T>
constexpr int kApplyRows = sizeof(T) == sizeof(float) ? 2 : 4;

// out = act(norm(x) + residual), the residual normalised by `norm2` or not. Reads 1T or 2T, writes 1T, and T / 16 (of
// 16-bit elements) for the mask, if `mask.bits` is not null. Tiles are taken from the end of the matrix.
template <typename T, int kCount, Residual kResidual>
__global__ __launch_bounds__(kThreads,
                             kBlocksPerMultiprocessor) void bn_apply_kernel(const T* __restrict__ x, Norm norm,
                                                                            const T* __restrict__ residual, Norm norm2,
                                                                            Rows shape, bool relu, T* __restrict__ out,
                                                                            BitMask mask) {
  wait_for_previous_grid();
  const Position<kCount> place(shape);
  const int channel = place.inside ? place.channel : 0;
  float bias[kCount] = {};
  const Normalization<kCount> first(norm, channel, bias);
  const Normalization<kCount> second(kResidual == Residual::kNormalized ? norm2 : Norm{}, channel, bias);
  constexpr int kRows = kApplyRows<T>;
  const int layer = shape.layer * shape.channels;
  const int64_t tiles = (shape.rows + shape.layer * kRows - 1) / (shape.layer * kRows);
  const float floor = relu ? 0.0f : __uint_as_float(0x7fffffffu);  // nothing is <= NaN
  const auto apply = [&](auto count, int64_t row, bool inside) {
    constexpr int kTaken = decltype(count)::value;
    const int64_t offset = row * shape.channels + channel;
    Vector<T, kCount> loaded[kTaken] = {};
    [[maybe_unused]] Vector<T, kCount> added[kTaken] = {};
#pragma unroll
    for (int k = 0; k < kTaken; ++k) {
      if (!inside) continue;
      loaded[k] = load_vector<kCount, Reuse::kOnce>(x + offset + k * layer);
      if constexpr (kResidual != Residual::kNone) {
        added[k] = load_vector<kCount, Reuse::kOnce>(residual + offset + k * layer);
      }
    }
#pragma unroll
    for (int k = 0; k < kTaken; ++k) {
      float z[kCount];
      [[maybe_unused]] float r[kCount];
      loaded[k].unpack(z);
      if constexpr (kResidual != Residual::kNone) added[k].unpack(r);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        z[i] = (z[i] - first.mean[i]) * first.scale[i] + bias[i];
        if constexpr (kResidual == Residual::kPlain) z[i] += r[i];
        if constexpr (kResidual == Residual::kNormalized) z[i] += (r[i] - second.mean[i]) * second.scale[i];
        z[i] = z[i] <= floor ? 0.0f : z[i];
      }
      if (inside) store_vector(out + offset + k * layer, Vector<T, kCount>::pack(z));
      if (mask.bits != nullptr) mask.store<kCount>(row + k * shape.layer, place.channel, inside, bits_of(z));
    }
  };
  for (int64_t tile = tiles - 1 - blockIdx.y; tile >= 0; tile -= gridDim.y) {
    take_tile<kRows>(shape, place, tile, apply);
  }
}

}  // namespace fused_resnet
