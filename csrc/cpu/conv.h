// Convolutions on the CPU with bias, add and ReLU in the epilogue, a batch norm and ReLU in front of them, and the
// gradient of their weights: what the kernels take and promise.
//
// Everything is raw addresses and sizes, checked above in fused_resnet/ops/backends/native/conv.py and
// native_training.py. Activations are dense NHWC of float32 or bfloat16, sums float32. Every output is a sum in an
// order that depends on the convolution alone, so a result is bitwise the same whatever the number of threads, and an
// image's outputs whatever else is in the batch.
#pragma once

#include <cstdint>

#include "norm.h"

namespace fused_resnet {

struct CpuConv {
  int64_t images;
  int height, width, channels;
  int out_height, out_width, filters;
  int kernel_height, kernel_width;
  int stride_height, stride_width, padding_height, padding_width, dilation_height, dilation_width;
  int groups;
  DType dtype;
  int threads;

  int64_t pixels() const { return images * out_height * out_width; }
  int group_channels() const { return channels / groups; }
  int group_filters() const { return filters / groups; }
};

// gemm:     rows of pixels are gathered tile by tile, never the whole im2col matrix; multiplied by panels of filters.
//           Any kernel size, stride, padding and dilation; groups one after the other.
// winograd: Lavin and Gray (2015), for 3x3 of stride 1 without groups: F(2x2, 3x3) in float32, with 16 products for 2x2
//           outputs where gemm has 36; for bfloat16 F(4x4, 3x3) in float32, with 36 where gemm has 144 of half the
//           price.
// grouped:  3x3 of 4, 8 or 16 channels a group, in vectors that hold the filters of several groups or of a part of one;
//           with AVX2, float32 and 32 channels a group or more, tiles of a group whose inputs are copied once.
enum class ConvMethod { gemm, winograd, grouped };

// A kernel's weights of the dtype, wherever they lie: how many elements it is to the next filter, row and column of the
// kernel, and channel. Negative where the gradient of the input wants the kernel turned around.
struct ConvWeight {
  const void* data;
  int64_t filter, row, column, channel;

  int64_t at(int64_t of_filter, int64_t of_row, int64_t of_column, int64_t of_channel) const {
    return of_filter * filter + of_row * row + of_column * column + of_channel * channel;
  }
};

// What is convolved: x, or where `mean` is not null relu((x - mean) * scale + bias), of each channel. Padding is 0.
struct ConvInput {
  const void* x;
  const float *mean = nullptr, *scale = nullptr, *bias = nullptr;
};

// What is added behind the sums: out = act(sum + bias + residual). Either may be null (grouped wants a bias); residual
// may be `out` itself.
struct ConvEpilogue {
  const float* bias;
  const void* residual;
  bool relu;
  void* out;
};

// Some pixels of a convolution's image: every so many as its stride, from a first one on.
struct Lattice {
  int first_row, rows, first_column, columns;
};

struct ConvKernels {
  // Whether `method` can do this convolution in this build.
  bool (*takes)(const CpuConv& conv, ConvMethod method);
  // Bytes of the weights as `method` wants them, and they themselves. They do not depend on images, height and width.
  int64_t (*packed_bytes)(const CpuConv& conv, ConvMethod method);
  void (*pack)(const CpuConv& conv, ConvMethod method, const ConvWeight& weight, void* packed);
  // out_height and out_width may be any: what is beyond the image is 0. Grouped takes x itself only.
  // `weight` is what was packed, and read again where Winograd's sums of inputs are not finite.
  void (*run)(const CpuConv& conv, ConvMethod method, const ConvInput& input, const ConvWeight& weight,
              const void* packed, const ConvEpilogue& epilogue);
  // The gradient of the weights, float32 in the order (filters, kernel_height, kernel_width, channels), for grad_out,
  // that of the output. Of float32 without groups; gemm or winograd.
  void (*grad_weight)(const CpuConv& conv, ConvMethod method, const ConvInput& input, const void* grad_out,
                      float* grad_weight);
  // Of the lattice's pixels: to = from + residual, where `from` is dense, and 0 if null, as residual is.
  void (*scatter)(const CpuConv& conv, const Lattice& lattice, const float* from, const float* residual, float* to);
  // As torch.max_pool2d: a NaN wins.
  void (*max_pool)(const CpuConv& pool, const void* x, void* out);
  // The mean of each channel of each image, summed in float32; out is (images, channels).
  void (*average)(const CpuConv& images, const void* x, void* out);
};

// The kernels built for the widest vectors that this processor has.
const ConvKernels& conv_kernels();

}  // namespace fused_resnet
