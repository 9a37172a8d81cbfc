// Launches of the forward pass.
#include "bn_apply.cuh"

#include "rows.h"

namespace fused_resnet {
namespace cuda {
namespace {

constexpr int kApplyWaves = 2;

template <Residual kResidual>
void apply(const Call& call, const Matrix& shape, const void* x, const Norm& norm, const void* residual,
           const Norm& norm2, bool relu, void* out, uint8_t* mask) {
  const DeviceGuard guard(call);
  const bool vectors = vectors_fit(shape, mask == nullptr ? kApplyCount : 8,
                                   {x, residual, out, norm.mean, norm.invstd, norm.weight, norm.bias}) &&
                       aligned({norm2.mean, norm2.invstd, norm2.weight, norm2.bias});
  with_vector<kApplyCount>(shape.dtype, vectors, [&](auto type, auto vector) {
    using T = typename decltype(type)::Element;
    constexpr int kCount = decltype(vector)::value;
    const bool whole_warps = kCount == 1 && mask != nullptr;
    const Cover chosen = cover(shape, kCount, kApplyRows<T>, kApplyWaves, call.place.device, whole_warps);
    launch(call, {dim3(chosen.slices, chosen.parts), kThreads}, bn_apply_kernel<T, kCount, kResidual>,
           static_cast<const T*>(x), norm, static_cast<const T*>(residual), norm2, chosen.rows, relu,
           static_cast<T*>(out), BitMask{mask, shape.channels});
  });
}

}  // namespace

int64_t mask_stride(int channels) { return BitMask{nullptr, channels}.stride(); }

void bn_apply(const Call& call, const Matrix& shape, const void* x, const Norm& norm, const void* residual, bool relu,
              void* out, uint8_t* mask) {
  if (residual == nullptr) {
    apply<Residual::kNone>(call, shape, x, norm, residual, Norm{}, relu, out, mask);
  } else {
    apply<Residual::kPlain>(call, shape, x, norm, residual, Norm{}, relu, out, mask);
  }
}

void bn_apply_dual(const Call& call, const Matrix& shape, const void* x, const Norm& norm, const void* x2,
                   const Norm& norm2, bool relu, void* out, uint8_t* mask) {
  apply<Residual::kNormalized>(call, shape, x, norm, x2, norm2, relu, out, mask);
}

}  // namespace cuda
}  // namespace fused_resnet
