// The first layers of a ResNet for inference in one kernel: 7x7 convolution of stride 2, scale, shift, ReLU, and 3x3
// max pooling of stride 2. The activation between them, a quarter of all that an eager stem moves, is never written.
//
// A block makes tiles of 7x8 pooled pixels, for 64 filters. Of the image it keeps, in 16 bits, the pixels that a tile
// sees, 3 channels padded to 4. The taps of one row of a filter then are 7 * 4 neighbouring elements, padded to 8 * 4:
// a row of the matrix of patches is read straight out of the image, at 16 bytes for each step to the right, and patches
// are nowhere laid out.
#pragma once

#include "conv_shape.h"
#include "vector.cuh"

namespace fused_resnet {

namespace stem {

constexpr int kThreads = 256;
constexpr int kFilters = 64, kTaps = 7;
constexpr int kOutRows = 7, kOutColumns = 8;                                     // of a tile
constexpr int kConvRows = 2 * kOutRows + 1, kConvColumns = 2 * kOutColumns + 1;  // 15 x 17: 255 pixels, 16 x 16
constexpr int kConvPixels = kConvRows * kConvColumns;
constexpr int kRows = 2 * (kConvRows - 1) + kTaps;  // of the image
constexpr int kColumns = 2 * (kConvColumns - 1) + kTaps + 1;
constexpr int kRowDepth = (kTaps + 1) * 4;  // of the sum: a row of a filter
static_assert(kConvPixels <= kThreads / 32 * 32, "each of 8 warps multiplies 32 patches");

struct Pixel {
  uint32_t words[2];  // channels 0, 1 and 2, 0
};

struct Shared {
  Pixel image[kRows][kColumns];
  // 8 more elements: 8 filters, which one matrix instruction reads, lie in different banks. So do 8 pixels.
  uint16_t filters[kFilters][kTaps * kRowDepth + 8];
  uint16_t conv[kConvPixels][kFilters + 8];
};

// Channels as they lie in shared memory, of 16-bit elements.
template <typename T>
__device__ __forceinline__ Pixel pixel_of(T first, T second, T third) {
  return {{first.bits | uint32_t{second.bits} << 16, third.bits}};
}

}  // namespace stem

// `weight` is (filters, 7, 7, 3), scale and shift are null or of `filters`. x is (images, 3, height, width) with any
// strides, of T or of bytes, which `pixel_scale` maps to numbers; the padding is 0 after that. out is NHWC. Blocks (i,
// j) take tiles i, i + gridDim.x, ... for filters 64 * j and so on. Reads x and the weights, writes out.
template <typename T, typename Input>
__global__ __launch_bounds__(stem::kThreads, 2) void stem_kernel(const Input* __restrict__ x, PixelScale pixel_scale,
                                                                 const T* __restrict__ weight,
                                                                 const float* __restrict__ scale,
                                                                 const float* __restrict__ shift, StemShape shape,
                                                                 T* __restrict__ out) {
  using namespace stem;
  auto& shared = *static_cast<Shared*>(dynamic_shared_memory());
  const int first_filter = blockIdx.y * kFilters;
  wait_for_previous_grid();
  for (int index = threadIdx.x; index < kFilters * kTaps * (kTaps + 1); index += kThreads) {
    const int filter = index / (kTaps * (kTaps + 1)), tap = index % (kTaps * (kTaps + 1));
    const int row = tap / (kTaps + 1), column = tap % (kTaps + 1);
    Pixel pixel{};
    if (column < kTaps) {
      const T* const from = weight + ((int64_t{first_filter + filter} * kTaps + row) * kTaps + column) * 3;
      pixel = pixel_of(from[0], from[1], from[2]);
    }
    *reinterpret_cast<Pixel*>(&shared.filters[filter][tap * 4]) = pixel;
  }

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int tiles_across = (shape.out_width + kOutColumns - 1) / kOutColumns;
  const int tiles_down = (shape.out_height + kOutRows - 1) / kOutRows;
  const int64_t tiles = int64_t{shape.images} * tiles_down * tiles_across;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int out_column = static_cast<int>(tile % tiles_across) * kOutColumns;
    const int out_row = static_cast<int>(tile / tiles_across % tiles_down) * kOutRows;
    const int64_t image = tile / tiles_across / tiles_down;
    const int conv_row = 2 * out_row - 1, conv_column = 2 * out_column - 1;  // the pooling's padding is 1,
    const int row = 2 * conv_row - 3, column = 2 * conv_column - 3;          // the convolution's 3

    const Input* const from = x + image * shape.strides[0];
    for (int index = threadIdx.x; index < kRows * kColumns; index += kThreads) {
      const int down = row + index / kColumns, right = column + index % kColumns;
      Pixel pixel{};
      if (static_cast<unsigned>(down) < static_cast<unsigned>(shape.height) &&
          static_cast<unsigned>(right) < static_cast<unsigned>(shape.width)) {
        const Input* const address = from + down * shape.strides[2] + right * shape.strides[3];
        const Input first = address[0], second = address[shape.strides[1]], third = address[2 * shape.strides[1]];
        if constexpr (sizeof(Input) == 1) {
          pixel = pixel_of(narrow<T>(first * pixel_scale.scale[0] + pixel_scale.shift[0]),
                           narrow<T>(second * pixel_scale.scale[1] + pixel_scale.shift[1]),
                           narrow<T>(third * pixel_scale.scale[2] + pixel_scale.shift[2]));
        } else {
          pixel = pixel_of(first, second, third);
        }
      }
      shared.image[index / kColumns][index % kColumns] = pixel;
    }
    __syncthreads();

    // 32 patches of a warp, of which each lane names one row of 16 and 16.
    const Pixel* patches[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int patch = min(warp * 32 + i * 16 + lane % 16, kConvPixels - 1);
      patches[i] = &shared.image[2 * (patch / kConvColumns)][2 * (patch % kConvColumns) + lane / 16 * 2];
    }
    const uint16_t* const filters = &shared.filters[lane / 16 * 8 + lane % 8][lane / 8 % 2 * 8];
    float sums[2][kFilters / 8][4] = {};
#pragma unroll
    for (int k = 0; k < kTaps * 2; ++k) {  // 4 taps each
      uint32_t a[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        load_matrix_x4(a[i], patches[i] + k / 2 * kColumns + k % 2 * 4);
        // The eighth tap is a pixel of the image, perhaps infinite: its weight of 0 alone would not silence it.
        if (k % 2 == 1 && lane % 4 >= 2) a[i][2] = a[i][3] = 0;
      }
#pragma unroll
      for (int j = 0; j < kFilters / 8; j += 2) {
        uint32_t b[4];
        load_matrix_x4(b, filters + j * 8 * (kTaps * kRowDepth + 8) + k * 16);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          multiply_accumulate<T>(sums[i][j], a[i], b[0], b[1]);
          multiply_accumulate<T>(sums[i][j + 1], a[i], b[2], b[3]);
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kFilters / 8; ++j) {
      const int filter = j * 8 + lane % 4 * 2;
      const float scales[2] = {scale == nullptr ? 1.0f : scale[first_filter + filter],
                               scale == nullptr ? 1.0f : scale[first_filter + filter + 1]};
      const float shifts[2] = {shift == nullptr ? 0.0f : shift[first_filter + filter],
                               shift == nullptr ? 0.0f : shift[first_filter + filter + 1]};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int patch = warp * 32 + i * 8 + lane / 4;
        if (patch >= kConvPixels) continue;
        const int down = conv_row + patch / kConvColumns, right = conv_column + patch % kConvColumns;
        const bool inside = static_cast<unsigned>(down) < static_cast<unsigned>(shape.conv_height) &&
                            static_cast<unsigned>(right) < static_cast<unsigned>(shape.conv_width);
        const float* const pair = &sums[i / 2][j][i % 2 * 2];
        const uint32_t stored =
            narrow_2<T>(relu_of(pair[0] * scales[0] + shifts[0]), relu_of(pair[1] * scales[1] + shifts[1]));
        *reinterpret_cast<uint32_t*>(&shared.conv[patch][filter]) = inside ? stored : 0u;
      }
    }
    __syncthreads();

    // Not negative, these numbers are ordered as their bits are, below every NaN.
    for (int index = threadIdx.x; index < kOutRows * kOutColumns * (kFilters / 8); index += kThreads) {
      const int filter = index % (kFilters / 8) * 8, pixel = index / (kFilters / 8);
      const int down = pixel / kOutColumns, right = pixel % kOutColumns;
      if (out_row + down >= shape.out_height || out_column + right >= shape.out_width) continue;
      Vector<T, 8> largest{};
#pragma unroll
      for (int tap = 0; tap < 9; ++tap) {
        const int patch = (2 * down + tap / 3) * kConvColumns + 2 * right + tap % 3;
        const uint4 taken = *reinterpret_cast<const uint4*>(&shared.conv[patch][filter]);
        largest.words[0] = max_u16x2(largest.words[0], taken.x);
        largest.words[1] = max_u16x2(largest.words[1], taken.y);
        largest.words[2] = max_u16x2(largest.words[2], taken.z);
        largest.words[3] = max_u16x2(largest.words[3], taken.w);
      }
      const int64_t place = (image * shape.out_height + out_row + down) * shape.out_width + out_column + right;
      store_vector(out + place * shape.filters + first_filter + filter, largest);
    }
  }
  allow_next_grid();
}

}  // namespace fused_resnet
