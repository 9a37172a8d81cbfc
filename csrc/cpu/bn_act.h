// BatchNorm + residual add + ReLU on the CPU: what the kernels take and what they promise.
//
// Everything is raw addresses and sizes: the tensors were checked above, in fused_resnet/ops/backends/native/norm.py.
// An activation is images x channels x pixels elements, dense, either NHWC (channels innermost) or NCHW (pixels
// innermost). Statistics and parameters are float32 vectors of `channels`. Sums are combined in an order that depends
// on the shape alone, so a result is bitwise the same whatever the number of threads.
#pragma once

#include <cstdint>

#include "norm.h"

namespace fused_resnet {

struct Activation {
  int64_t images;
  int64_t channels;
  int64_t pixels;
  bool channels_last;
  DType dtype;
  int threads;

  int64_t count() const { return images * pixels; }  // values per channel
};

struct BnActKernels {
  // Biased variance, in float64: that of numbers above 2e19 is none in float32. Reads 1T; where a sum overflows, again.
  void (*stats)(const Activation& shape, const void* x, float* mean, double* variance);
  // out = act(z + residual); residual may be null. Reads 1T or 2T, writes 1T.
  void (*apply)(const Activation& shape, const void* x, const Norm& norm, const void* residual, bool relu, void* out);
  // out = act(z + z2). Reads 2T, writes 1T.
  void (*apply_dual)(const Activation& shape, const void* x, const Norm& norm, const void* x2, const Norm& norm2,
                     bool relu, void* out);
  // dz = grad_out where the ReLU let it pass: by the sign of `out` or, when it is null, of the recomputed z.
  // Reads 2T; with `out` reads 3T and writes dz, 1T.
  void (*grad_stats)(const Activation& shape, const void* grad_out, const void* x, const void* out, void* dz,
                     const Norm& norm, bool relu, float* sum_dz, float* sum_dz_xhat);
  // grad_x = weight * invstd * (dz - sum_dz / count - xhat * sum_dz_xhat / count); null sums: constant statistics.
  // With `relu` dz is grad_out masked by the recomputed z, else grad_out. Reads 2T, writes 1T.
  void (*grad_apply)(const Activation& shape, const void* grad_out, const void* x, const Norm& norm,
                     const float* sum_dz, const float* sum_dz_xhat, bool relu, void* grad_x);
};

// The kernels built for the widest vectors that this processor has.
const BnActKernels& bn_act_kernels();

// 1/sqrt(variance + eps); moves the running statistics, each of which may be null, by `momentum` towards the mean and
// the unbiased variance.
void bn_finalize(int64_t channels, int64_t count, double momentum, double eps, const float* mean,
                 const double* variance, float* invstd, float* running_mean, float* running_var);

}  // namespace fused_resnet
