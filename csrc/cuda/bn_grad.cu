// Launches of the backward passes.
#include "bn_grad.cuh"

#include "rows.h"

namespace fused_resnet {
namespace cuda {
namespace {

constexpr int kGradApplyWaves = 2;

template <Mask kMask>
void grad_stats(const Call& call, const Matrix& shape, const void* grad_out, const void* x, const void* out,
                const uint8_t* mask, const Norm& norm, void* dz, float* sum_dz, float* sum_dz_xhat, void* workspace) {
  const DeviceGuard guard(call);
  const bool vectors = vectors_fit(shape, mask == nullptr ? kApplyCount : 8,
                                   {grad_out, x, out, dz, norm.mean, norm.invstd, norm.weight, norm.bias});
  with_vector<kApplyCount>(shape.dtype, vectors, [&](auto type, auto vector) {
    using T = typename decltype(type)::Element;
    constexpr int kCount = decltype(vector)::value;
    const Cover chosen = cover(shape, kCount, kApplyRows<T>, 1, call.place.device);
    float* const partial_sums = static_cast<float*>(workspace);
    const std::size_t shared_bytes = sizeof(float) * 2 * (kThreads / 32) * 32 * kCount;
    launch(call, {dim3(chosen.slices, chosen.parts), kThreads, shared_bytes}, bn_grad_stats_kernel<T, kCount, kMask>,
           static_cast<const T*>(grad_out), static_cast<const T*>(x), static_cast<const T*>(out),
           BitMask{const_cast<uint8_t*>(mask), shape.channels}, norm, chosen.rows, static_cast<T*>(dz), partial_sums);
    launch(call, {dim3(ceil_div(shape.channels, kMergeChannels), 2), kThreads, sizeof(double) * kThreads},
           bn_finalize_sums_kernel, partial_sums, shape.channels, chosen.parts, sum_dz, sum_dz_xhat);
  });
}

template <Mask kMask>
void grad_apply(const Call& call, const Matrix& shape, const void* grad_out, const void* x, const uint8_t* mask,
                const Norm& norm, const float* sum_dz, const float* sum_dz_xhat, void* dz, void* grad_x) {
  const DeviceGuard guard(call);
  const bool vectors =
      vectors_fit(shape, mask == nullptr ? kApplyCount : 8, {grad_out, x, dz, grad_x, norm.mean, norm.invstd}) &&
      aligned({norm.weight, norm.bias, sum_dz, sum_dz_xhat});
  with_vector<kApplyCount>(shape.dtype, vectors, [&](auto type, auto vector) {
    using T = typename decltype(type)::Element;
    constexpr int kCount = decltype(vector)::value;
    const Cover chosen = cover(shape, kCount, kApplyRows<T>, kGradApplyWaves, call.place.device);
    launch(call, {dim3(chosen.slices, chosen.parts), kThreads}, bn_grad_apply_kernel<T, kCount, kMask>,
           static_cast<const T*>(grad_out), static_cast<const T*>(x),
           BitMask{const_cast<uint8_t*>(mask), shape.channels}, norm, sum_dz, sum_dz_xhat, chosen.rows,
           static_cast<T*>(dz), static_cast<T*>(grad_x));
  });
}

}  // namespace

void bn_grad_stats(const Call& call, const Matrix& shape, const void* grad_out, const void* x, const void* out,
                   const uint8_t* mask, const Norm& norm, bool relu, void* dz, float* sum_dz, float* sum_dz_xhat,
                   void* workspace) {
  const auto of_mask = [&](auto pass) {
    pass(call, shape, grad_out, x, out, mask, norm, dz, sum_dz, sum_dz_xhat, workspace);
  };
  if (mask != nullptr) return of_mask(grad_stats<Mask::kBits>);
  if (!relu) return of_mask(grad_stats<Mask::kNone>);
  if (out != nullptr) return of_mask(grad_stats<Mask::kOfOut>);
  of_mask(grad_stats<Mask::kOfX>);
}

void bn_grad_apply(const Call& call, const Matrix& shape, const void* grad_out, const void* x, const uint8_t* mask,
                   const Norm& norm, const float* sum_dz, const float* sum_dz_xhat, bool relu, void* dz, void* grad_x) {
  const auto of_mask = [&](auto pass) { pass(call, shape, grad_out, x, mask, norm, sum_dz, sum_dz_xhat, dz, grad_x); };
  if (mask != nullptr) return of_mask(grad_apply<Mask::kBits>);
  if (relu) return of_mask(grad_apply<Mask::kOfX>);
  of_mask(grad_apply<Mask::kNone>);
}

}  // namespace cuda
}  // namespace fused_resnet
