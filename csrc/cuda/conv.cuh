// Convolution, scale, shift, residual add and ReLU for inference: an implicit matrix product on tensor cores.
//
// The output is a matrix of N*P*Q pixels x filters, the product of the patches of x, (pixels, R*S*C), and the filters,
// (filters, R*S*C) as they lie in memory in channels_last. No patch is ever written: 16 bytes of channels go from x to
// shared memory at a time, and zeros where a patch reaches into the padding.
#pragma once

#include "conv_shape.h"
#include "vector.cuh"

namespace fused_resnet {

// What is done with the sums of products: out = act(sum * scale + shift + residual). scale, shift and residual may be
// null.
template <typename T>
struct Epilogue {
  const float *scale, *shift;
  const T* residual;
  T* out;
  bool relu;

  // Eight channels of one pixel; 16 bytes.
  __device__ __forceinline__ void store(const float (&sums)[8], int64_t pixel, int filter, int filters) const {
    float scales[8], shifts[8], z[8];
    load_channels<8>(scale, filter, 1.0f, scales);
    load_channels<8>(shift, filter, 0.0f, shifts);
    const int64_t offset = pixel * filters + filter;
    float added[8] = {};
    if (residual != nullptr) load_vector<8>(residual + offset).unpack(added);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      z[i] = sums[i] * scales[i] + shifts[i] + added[i];
      if (relu) z[i] = relu_of(z[i]);
    }
    store_vector(out + offset, Vector<T, 8>::pack(z));
  }
};

constexpr int kConvDepth = 64;               // channels of a step of the sum: 128 bytes, all banks once
constexpr int kConvChunks = kConvDepth / 8;  // of 16 bytes

// Where a 16-byte chunk of a row lies in shared memory. The chunks of a row are permuted by its number, so that the 8
// rows that one matrix instruction reads, and that one warp writes, lie in different banks.
__device__ __forceinline__ int swizzled(int row, int chunk) {
  return row * kConvChunks + (chunk ^ (row % kConvChunks));
}

struct Chunk {
  uint32_t words[4];
};

// The upper left corner of a pixel's patch; row and column are negative in the padding.
struct Corner {
  int64_t offset;  // of x
  int row, column;
};

// A tile of kPixels x kFilters of the output, made by kWarpsDown x kWarpsAcross warps from a ring of kStages steps.
template <int kPixelsOfTile, int kFiltersOfTile, int kWarpsDown_, int kWarpsAcross_, int kStages_>
struct ConvTile {
  static constexpr int kPixels = kPixelsOfTile, kFilters = kFiltersOfTile, kStages = kStages_;
  static constexpr int kWarpsDown = kWarpsDown_, kWarpsAcross = kWarpsAcross_;
  static constexpr int kThreads = 32 * kWarpsDown * kWarpsAcross;
  static constexpr int kWarpPixels = kPixels / kWarpsDown, kWarpFilters = kFilters / kWarpsAcross;
  static constexpr int kDown = kWarpPixels / 16, kAcross = kWarpFilters / 8;  // matrix instructions of a warp
  static_assert(kWarpPixels % 16 == 0 && kWarpFilters % 16 == 0 && kThreads % kConvChunks == 0, "");
  static_assert(kPixels % (kThreads / kConvChunks) == 0 && kFilters % (kThreads / kConvChunks) == 0, "");

  struct Ring {
    Chunk patches[kStages][kPixels * kConvChunks];
    Chunk filters[kStages][kFilters * kConvChunks];
  };
  struct Sums {
    float values[kPixels][kFilters + 8];  // 8 more: a warp's fragments fall into different banks
  };
  struct Shared {
    union {
      Ring ring;
      Sums sums;
    };
    Corner corners[kPixels];
  };
};

// Walks the steps of the sum: taps in rows, then the channels of a tap, kConvDepth at a time.
struct Steps {
  int row = 0, column = 0, channel = 0;

  __device__ __forceinline__ Steps(const ConvShape& shape, int first) {
    const int of_tap = (shape.channels + kConvDepth - 1) / kConvDepth;
    const int tap = first / of_tap;
    row = tap / shape.kernel_width;
    column = tap % shape.kernel_width;
    channel = first % of_tap * kConvDepth;
  }
  __device__ __forceinline__ void next(const ConvShape& shape) {
    channel += kConvDepth;
    if (channel < shape.channels) return;
    channel = 0;
    if (++column < shape.kernel_width) return;
    column = 0;
    ++row;
  }
};

// Block x owns a tile, the tiles of one row of pixels side by side so that x comes from the L2 cache; block z owns its
// share of the steps, `steps_of_split`. With several shares the sums go to `partial_sums`, (splits, pixels, filters),
// and conv_finish_kernel makes the output of them; with one, nobody reads `partial_sums`.
template <typename T, typename Tile>
__global__ __launch_bounds__(Tile::kThreads) void conv_bn_act_kernel(const T* __restrict__ x,
                                                                     const T* __restrict__ weight, ConvShape shape,
                                                                     int steps_of_split, Epilogue<T> epilogue,
                                                                     float* __restrict__ partial_sums) {
  auto& shared = *static_cast<typename Tile::Shared*>(dynamic_shared_memory());
  const int filter_tiles = (shape.filters + Tile::kFilters - 1) / Tile::kFilters;
  const int64_t first_pixel = int64_t{blockIdx.x / filter_tiles} * Tile::kPixels;
  const int first_filter = blockIdx.x % filter_tiles * Tile::kFilters;
  const int taps = shape.kernel_height * shape.kernel_width;
  const int all_steps = taps * ((shape.channels + kConvDepth - 1) / kConvDepth);
  const int first_step = blockIdx.z * steps_of_split;
  const int steps = min(steps_of_split, all_steps - first_step);

  // A thread copies one chunk of every kRowsAtOnce-th row.
  constexpr int kRowsAtOnce = Tile::kThreads / kConvChunks;
  const int chunk = threadIdx.x % kConvChunks, copied_row = threadIdx.x / kConvChunks;
  const auto copy_filters = [&](const Steps& step, int stage) {
    const int channel = step.channel + chunk * 8;
    const int64_t from = int64_t{step.row * shape.kernel_width + step.column} * shape.channels + channel;
#pragma unroll
    for (int row = copied_row; row < Tile::kFilters; row += kRowsAtOnce) {
      const bool inside = channel < shape.channels && first_filter + row < shape.filters;
      const T* const address = weight + int64_t{first_filter + row} * taps * shape.channels + from;
      copy_async_16(&shared.ring.filters[stage][swizzled(row, chunk)], inside ? address : weight, inside);
    }
  };
  const auto copy_patches = [&](const Steps& step, int stage) {
    const int channel = step.channel + chunk * 8;
    const int down = step.row * shape.dilation_height, right = step.column * shape.dilation_width;
    const int64_t from = (int64_t{down} * shape.width + right) * shape.channels + channel;
#pragma unroll
    for (int row = copied_row; row < Tile::kPixels; row += kRowsAtOnce) {
      const Corner corner = shared.corners[row];
      const bool inside = static_cast<unsigned>(corner.row + down) < static_cast<unsigned>(shape.height) &&
                          static_cast<unsigned>(corner.column + right) < static_cast<unsigned>(shape.width) &&
                          channel < shape.channels;
      copy_async_16(&shared.ring.patches[stage][swizzled(row, chunk)], inside ? x + corner.offset + from : x, inside);
    }
  };

  // While the launch in front of this one drains, the first filters come as near as the L2 cache. No nearer: it may be
  // what wrote them.
  Steps ahead(shape, first_step), coming = ahead;
  for (int stage = 0; stage < Tile::kStages - 1 && stage < steps; ++stage, coming.next(shape)) {
    const int64_t from = int64_t{coming.row * shape.kernel_width + coming.column} * shape.channels + coming.channel;
    for (int row = threadIdx.x; row < Tile::kFilters && first_filter + row < shape.filters; row += Tile::kThreads) {
      prefetch(weight + int64_t{first_filter + row} * taps * shape.channels + from);
    }
  }
  for (int row = threadIdx.x; row < Tile::kPixels; row += Tile::kThreads) {
    const unsigned pixel = static_cast<unsigned>(first_pixel) + row;  // below 2^31 + 128: divisions of 32 bits
    const unsigned line = pixel / shape.out_width;
    const int top = static_cast<int>(line % shape.out_height) * shape.stride_height - shape.padding_height;
    const int left = static_cast<int>(pixel % shape.out_width) * shape.stride_width - shape.padding_width;
    const int64_t image = line / shape.out_height;
    const bool inside = pixel < shape.pixels;
    // Beside the last pixel: so far above the image that no tap reaches it.
    shared.corners[row] = {((image * shape.height + top) * shape.width + left) * shape.channels,
                           inside ? top : -(1 << 30), left};
  }
  wait_for_previous_grid();
  __syncthreads();
  for (int stage = 0; stage < Tile::kStages - 1; ++stage) {
    if (stage < steps) {
      copy_filters(ahead, stage);
      copy_patches(ahead, stage);
    }
    ahead.next(shape);
    commit_copies();
  }

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_pixel = warp % Tile::kWarpsDown * Tile::kWarpPixels;
  const int warp_filter = warp / Tile::kWarpsDown * Tile::kWarpFilters;
  float sums[Tile::kDown][Tile::kAcross][4] = {};
  for (int step = 0; step < steps; ++step) {
    wait_copies<Tile::kStages - 2>();
    __syncthreads();  // this step is there for all, and all are done with the one before it, which is overwritten now
    if (step + Tile::kStages - 1 < steps) {
      const int stage = (step + Tile::kStages - 1) % Tile::kStages;
      copy_filters(ahead, stage);
      copy_patches(ahead, stage);
      ahead.next(shape);
    }
    commit_copies();
    const Chunk* const patches = shared.ring.patches[step % Tile::kStages];
    const Chunk* const filters = shared.ring.filters[step % Tile::kStages];
#pragma unroll
    for (int k = 0; k < kConvDepth / 16; ++k) {
      uint32_t a[Tile::kDown][4];
#pragma unroll
      for (int i = 0; i < Tile::kDown; ++i) {
        load_matrix_x4(a[i], &patches[swizzled(warp_pixel + i * 16 + lane % 16, 2 * k + lane / 16)]);
      }
#pragma unroll
      for (int j = 0; j < Tile::kAcross; j += 2) {
        uint32_t b[4];  // of 8 filters channels 0-7 and 8-15, of the next 8 the same
        load_matrix_x4(b, &filters[swizzled(warp_filter + j * 8 + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2)]);
#pragma unroll
        for (int i = 0; i < Tile::kDown; ++i) {
          multiply_accumulate<T>(sums[i][j], a[i], b[0], b[1]);
          multiply_accumulate<T>(sums[i][j + 1], a[i], b[2], b[3]);
        }
      }
    }
  }
  allow_next_grid();

  // Through shared memory, so that a thread has 8 channels of a pixel side by side.
  wait_copies<0>();
  __syncthreads();
#pragma unroll
  for (int i = 0; i < Tile::kDown; ++i) {
#pragma unroll
    for (int j = 0; j < Tile::kAcross; ++j) {
      const int row = warp_pixel + i * 16 + lane / 4, column = warp_filter + j * 8 + lane % 4 * 2;
      *reinterpret_cast<float2*>(&shared.sums.values[row][column]) = {sums[i][j][0], sums[i][j][1]};
      *reinterpret_cast<float2*>(&shared.sums.values[row + 8][column]) = {sums[i][j][2], sums[i][j][3]};
    }
  }
  __syncthreads();
  constexpr int kAtOnce = Tile::kFilters / 8;
  const int filter = first_filter + static_cast<int>(threadIdx.x) % kAtOnce * 8;
  for (int row = threadIdx.x / kAtOnce; row < Tile::kPixels; row += Tile::kThreads / kAtOnce) {
    const int64_t pixel = first_pixel + row;
    if (pixel >= shape.pixels || filter >= shape.filters) continue;
    float values[8];
    load_channels<8>(shared.sums.values[row], filter - first_filter, 0.0f, values);
    if (gridDim.z == 1) {
      epilogue.store(values, pixel, filter, shape.filters);
    } else {
      float* const to = partial_sums + (blockIdx.z * shape.pixels + pixel) * shape.filters + filter;
      *reinterpret_cast<float4*>(to) = {values[0], values[1], values[2], values[3]};
      *reinterpret_cast<float4*>(to + 4) = {values[4], values[5], values[6], values[7]};
    }
  }
}

// The sums of all splits, in order, and what is done with them. A thread owns 8 channels of a pixel.
template <typename T>
__global__ __launch_bounds__(256) void conv_finish_kernel(const float* partial_sums, int splits, int64_t pixels,
                                                          int filters, Epilogue<T> epilogue) {
  wait_for_previous_grid();
  const int64_t index = int64_t{blockIdx.x} * 256 + threadIdx.x;
  const int64_t pixel = index / (filters / 8);
  const int filter = static_cast<int>(index % (filters / 8)) * 8;
  if (pixel >= pixels) return;
  float sums[8] = {};
  for (int split = 0; split < splits; ++split) {
    float values[8];
    load_channels<8>(partial_sums + (split * pixels + pixel) * filters, filter, 0.0f, values);
#pragma unroll
    for (int i = 0; i < 8; ++i) sums[i] += values[i];
  }
  allow_next_grid();
  epilogue.store(sums, pixel, filter, filters);
}

}  // namespace fused_resnet
