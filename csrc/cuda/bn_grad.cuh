// Backward through activation and batch norm: two sums for each channel, then the gradient of x.
//
// dz is the gradient in front of the ReLU, distance = x - mean, xhat = distance * invstd.
#pragma once

#include "bn_apply.cuh"
#include "merge.cuh"

namespace fused_resnet {

// How dz is made of the gradient of the output.
enum class Mask {
  kNone,   // no activation: dz is grad_out
  kOfX,    // by the sign of the recomputed xhat * weight + bias
  kOfOut,  // by the sign of the output
  kBits    // by the bits that forward wrote
};

// sum(dz) and sum(dz * xhat): row blockIdx.y of the two matrices of partial sums, for the block's channels. Reads 2T
// (kOfOut: 3T; kBits: 2T and a bit an element), and writes dz, 1T, if it is not null.
template <typename T, int kCount, Mask kMask>
__global__ __launch_bounds__(kThreads, kBlocksPerMultiprocessor) void bn_grad_stats_kernel(
    const T* __restrict__ grad_out, const T* __restrict__ x, const T* __restrict__ out, BitMask mask, Norm norm,
    Rows shape, T* __restrict__ dz, float* __restrict__ partial_sums) {
  constexpr int kRows = kApplyRows<T>, kWarps = kThreads / 32;
  wait_for_previous_grid();
  const Position<kCount> place(shape);
  const int channel = place.inside ? place.channel : 0;
  float bias[kCount] = {};
  const Normalization<kCount> normalization(norm, channel, bias);
  const int layer = shape.layer * shape.channels;
  const int64_t tiles = (shape.rows + shape.layer * kRows - 1) / (shape.layer * kRows);
  float sum_dz[kCount] = {}, sum_dz_distance[kCount] = {};
  const auto add = [&](auto count, int64_t row, bool inside) {
    if (!inside) return;
    constexpr int kTaken = decltype(count)::value;
    const int64_t offset = row * shape.channels + channel;
    Vector<T, kCount> grads[kTaken], values[kTaken];
    [[maybe_unused]] Vector<T, kCount> outs[kTaken];
    [[maybe_unused]] uint32_t bits[kTaken];
#pragma unroll
    for (int k = 0; k < kTaken; ++k) {
      grads[k] = load_vector<kCount>(grad_out + offset + k * layer);
      values[k] = load_vector<kCount>(x + offset + k * layer);
      if constexpr (kMask == Mask::kOfOut) outs[k] = load_vector<kCount, Reuse::kOnce>(out + offset + k * layer);
      if constexpr (kMask == Mask::kBits) bits[k] = mask.load<kCount>(row + k * shape.layer, channel);
    }
#pragma unroll
    for (int k = 0; k < kTaken; ++k) {
      float grad[kCount], value[kCount];
      [[maybe_unused]] float sign[kCount];
      grads[k].unpack(grad);
      values[k].unpack(value);
      if constexpr (kMask == Mask::kOfOut) outs[k].unpack(sign);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const float distance = value[i] - normalization.mean[i];
        if constexpr (kMask == Mask::kOfX) sign[i] = distance * normalization.scale[i] + bias[i];
        if constexpr (kMask == Mask::kOfX || kMask == Mask::kOfOut) grad[i] = sign[i] <= 0.0f ? 0.0f : grad[i];
        if constexpr (kMask == Mask::kBits) grad[i] = (bits[k] >> i & 1) != 0 ? grad[i] : 0.0f;
        sum_dz[i] += grad[i];
        sum_dz_distance[i] += grad[i] * distance;
      }
      if (dz != nullptr) store_vector(dz + offset + k * layer, Vector<T, kCount>::pack(grad));
    }
  };
  for (int64_t tile = blockIdx.y; tile < tiles; tile += gridDim.y) take_tile<kRows>(shape, place, tile, add);
  allow_next_grid();
  for (int apart = shape.lanes; apart < 32; apart *= 2) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      sum_dz[i] += __shfl_xor_sync(~0u, sum_dz[i], apart);
      sum_dz_distance[i] += __shfl_xor_sync(~0u, sum_dz_distance[i], apart);
    }
  }
  auto& shared = *static_cast<float (*)[2][kWarps][32 * kCount]>(dynamic_shared_memory());
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (lane < shape.lanes) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      shared[0][warp][lane * kCount + i] = sum_dz[i];
      shared[1][warp][lane * kCount + i] = sum_dz_distance[i];
    }
  }
  __syncthreads();
  const int own = blockIdx.x * shape.lanes * kCount + threadIdx.x;
  if (threadIdx.x < static_cast<unsigned>(shape.lanes * kCount) && own < shape.channels) {
    float first = 0.0f, second = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      first += shared[0][w][threadIdx.x];
      second += shared[1][w][threadIdx.x];
    }
    partial_sums[int64_t{blockIdx.y} * shape.channels + own] = first;
    partial_sums[(int64_t{gridDim.y} + blockIdx.y) * shape.channels + own] = second * norm.invstd[own];
  }
}

// Adds (2, parts, channels) partial sums over the parts; blockIdx.y is the kind of sum.
__global__ __launch_bounds__(kThreads) void bn_finalize_sums_kernel(const float* partial_sums, int channels, int parts,
                                                                    float* __restrict__ sum_dz,
                                                                    float* __restrict__ sum_dz_xhat) {
  wait_for_previous_grid();
  double* const shared = static_cast<double*>(dynamic_shared_memory());
  const int channel = blockIdx.x * kMergeChannels + threadIdx.x % kMergeChannels;
  const int lane = threadIdx.x / kMergeChannels;
  const float* const from = partial_sums + int64_t{blockIdx.y} * parts * channels;
  double sum = 0.0;
  for (int part = lane; channel < channels && part < parts; part += kMergeLanes) {
    sum += from[int64_t{part} * channels + channel];
  }
  allow_next_grid();
  sum = sum_modulo<kThreads>(kMergeChannels, sum, shared);
  if (lane == 0 && channel < channels) (blockIdx.y == 0 ? sum_dz : sum_dz_xhat)[channel] = static_cast<float>(sum);
}

// grad_x = a * dz + b * (x - mean) + c of the two sums; of constant statistics, whose sums are null, a * dz. Writes dz
// too, if it is not null. Reads 2T, or 1T of constant statistics whose mask is not recomputed, and writes 1T or 2T.
// Tiles are taken from the end of the matrix.
template <typename T, int kCount, Mask kMask>
__global__ __launch_bounds__(kThreads, kBlocksPerMultiprocessor) void bn_grad_apply_kernel(
    const T* __restrict__ grad_out, const T* __restrict__ x, BitMask mask, Norm norm, const float* __restrict__ sum_dz,
    const float* __restrict__ sum_dz_xhat, Rows shape, T* __restrict__ dz, T* __restrict__ grad_x) {
  constexpr int kRows = kApplyRows<T>;
  wait_for_previous_grid();
  const Position<kCount> place(shape);
  if (!place.inside) return;
  float bias[kCount] = {}, b[kCount], c[kCount];
  const Normalization<kCount> normalization(norm, place.channel, bias);
  const bool constant = sum_dz == nullptr;
  load_channels<kCount>(sum_dz, place.channel, 0.0f, c);
  load_channels<kCount>(sum_dz_xhat, place.channel, 0.0f, b);
  {
    float invstd[kCount];
    load_channels<kCount>(norm.invstd, place.channel, 1.0f, invstd);
    const float inverse = 1.0f / static_cast<float>(shape.rows);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      b[i] *= -normalization.scale[i] * invstd[i] * inverse;
      c[i] *= -normalization.scale[i] * inverse;
    }
  }
  const bool reads_x = !constant || kMask == Mask::kOfX;
  const int layer = shape.layer * shape.channels;
  const int64_t tiles = (shape.rows + shape.layer * kRows - 1) / (shape.layer * kRows);
  const auto apply = [&](auto count, int64_t row, bool inside) {
    if (!inside) return;
    constexpr int kTaken = decltype(count)::value;
    const int64_t offset = row * shape.channels + place.channel;
    Vector<T, kCount> grads[kTaken], values[kTaken] = {};
    [[maybe_unused]] uint32_t bits[kTaken];
#pragma unroll
    for (int k = 0; k < kTaken; ++k) {
      grads[k] = load_vector<kCount, Reuse::kOnce>(grad_out + offset + k * layer);
      if (reads_x) values[k] = load_vector<kCount, Reuse::kOnce>(x + offset + k * layer);
      if constexpr (kMask == Mask::kBits) bits[k] = mask.load<kCount>(row + k * shape.layer, place.channel);
    }
#pragma unroll
    for (int k = 0; k < kTaken; ++k) {
      float grad[kCount], value[kCount];
      grads[k].unpack(grad);
      values[k].unpack(value);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const float distance = value[i] - normalization.mean[i];
        if constexpr (kMask == Mask::kOfX) {
          grad[i] = distance * normalization.scale[i] + bias[i] <= 0.0f ? 0.0f : grad[i];
        }
        if constexpr (kMask == Mask::kBits) grad[i] = (bits[k] >> i & 1) != 0 ? grad[i] : 0.0f;
        value[i] = normalization.scale[i] * grad[i];
        if (!constant) value[i] += b[i] * distance + c[i];
      }
      if (dz != nullptr) store_vector(dz + offset + k * layer, Vector<T, kCount>::pack(grad));
      store_vector(grad_x + offset + k * layer, Vector<T, kCount>::pack(value));
    }
  };
  for (int64_t tile = tiles - 1 - blockIdx.y; tile >= 0; tile -= gridDim.y) {
    take_tile<kRows>(shape, place, tile, apply);
  }
}

}  // namespace fused_resnet
