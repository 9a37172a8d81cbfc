// The CUDA kernels as functions on addresses: what each reads, writes and returns.
// fused_resnet/ops/backends/cuda/__init__.py checks and allocates the tensors; here, sizes and the limits of the
// machine. Activations are NHWC; per-channel vectors float32. T is the bytes of one activation. Every function throws
// std::runtime_error with the op and the shape in its message.
#pragma once

#include <cstddef>
#include <cstdint>

#include "conv_shape.h"
#include "norm.h"

namespace fused_resnet {
namespace cuda {

// An activation on a device, and the cudaStream_t there that works on it.
struct Place {
  int64_t images, channels, height, width;
  DType dtype;
  int device;
  void* stream;
};

// What an error names: the op, and the activation it was called with.
struct Call {
  const char* op;
  Place place;
};

// An activation as a matrix: rows = images * height * width.
struct Matrix {
  int64_t rows;
  int channels;
  DType dtype;
};

// Bytes that bn_stats, bn_grad_stats and bn_stats_apply need for partial results.
std::size_t bn_workspace_bytes(const Matrix& shape, int device);

// Mean, 1/sqrt(biased variance + eps), and the running statistics, each of which may be null. Reads 1T. Two launches.
void bn_stats(const Call& call, const Matrix& shape, const void* x, float* mean, float* invstd, float* running_mean,
              float* running_var, double momentum, double eps, void* workspace);

// Bytes of a row of the bit mask of a ReLU.
int64_t mask_stride(int channels);

// out = act(norm(x) + residual); residual and mask may be null. Reads 1T or 2T, writes 1T and a bit an element.
void bn_apply(const Call& call, const Matrix& shape, const void* x, const Norm& norm, const void* residual, bool relu,
              void* out, uint8_t* mask);
// out = act(norm(x) + norm2(x2)). Reads 2T, writes 1T and a bit an element.
void bn_apply_dual(const Call& call, const Matrix& shape, const void* x, const Norm& norm, const void* x2,
                   const Norm& norm2, bool relu, void* out, uint8_t* mask);

// Whether bn_stats_apply takes this shape, with a mask or without, at addresses in multiples of 16 bytes: it must fit
// in the shared memory of the device.
bool fits_on_chip(const Matrix& shape, int device);
// bn_stats and bn_apply in one cooperative launch; in three where the driver refuses it, since this process may use
// only a part of the device. Reads 1T (2T with a residual), writes 1T and a bit an element.
void bn_stats_apply(const Call& call, const Matrix& shape, const void* x, const void* residual, const float* weight,
                    const float* bias, float* mean, float* invstd, float* running_mean, float* running_var,
                    double momentum, double eps, bool relu, void* out, uint8_t* mask, void* workspace);

// Sums of dz and dz * xhat. The ReLU's mask is `mask`, else the sign of `out`, else, with relu, recomputed of x. dz may
// be null. Reads 2T (3T with out), writes 1T of dz. Two launches.
void bn_grad_stats(const Call& call, const Matrix& shape, const void* grad_out, const void* x, const void* out,
                   const uint8_t* mask, const Norm& norm, bool relu, void* dz, float* sum_dz, float* sum_dz_xhat,
                   void* workspace);
// grad_x; null sums mean constant statistics. dz may be null. The mask is `mask`, else, with relu, recomputed of x.
// Reads 2T, writes 1T, and 1T of dz.
void bn_grad_apply(const Call& call, const Matrix& shape, const void* grad_out, const void* x, const uint8_t* mask,
                   const Norm& norm, const float* sum_dz, const float* sum_dz_xhat, bool relu, void* dz, void* grad_x);

// A tile (by its number) and the shares into which the sum over taps and channels is split.
struct ConvChoice {
  int tile;
  int splits;
};

int conv_tiles();                        // how many there are
int conv_steps(const ConvShape& shape);  // the most splits that there can be
// The choice that a model of the device predicts to be fastest.
ConvChoice choose_conv(const ConvShape& shape, int device);
std::size_t conv_workspace_bytes(const ConvShape& shape, const ConvChoice& choice);

// out = act(conv(x, weight) * scale + shift + residual); scale, shift and residual may be null. float16 or bfloat16,
// sums in float32; channels and filters are multiples of 8, every address of 16 bytes; weight is (filters, R, S,
// channels). Reads x, weight and residual, writes out; one launch, or two where the sum is split.
void conv_bn_act(const Call& call, const ConvShape& shape, DType dtype, const ConvChoice& choice, const void* x,
                 const void* weight, const float* scale, const float* shift, const void* residual, bool relu, void* out,
                 void* workspace);

// The first layers of a ResNet: out = max_pool(relu(conv(x, weight) * scale + shift)), 7x7 of stride 2 and padding 3,
// then 3x3 of stride 2 and padding 1. float16 or bfloat16; weight is (filters, 7, 7, 3), filters a multiple of 64. x
// has any strides; with a `pixel_scale` it is bytes. out is NHWC. Reads x and weight, writes out.
void stem(const Call& call, const StemShape& shape, DType dtype, const void* x, const PixelScale* pixel_scale,
          const void* weight, const float* scale, const float* shift, void* out);

// The mean of each channel over the rows / images rows of an image. Reads 1T, writes (images, channels).
void avgpool(const Call& call, const Matrix& shape, int64_t images, const void* x, void* out);

}  // namespace cuda
}  // namespace fused_resnet
