// The launch of the stem.
#include "stem.cuh"

#include <algorithm>
#include <stdexcept>

#include "launch.h"

namespace fused_resnet {
namespace cuda {
namespace {

template <typename T, typename Input>
void run(const Call& call, const StemShape& shape, const void* x, const PixelScale& pixel_scale, const void* weight,
         const float* scale, const float* shift, void* out) {
  const DeviceGuard guard(call);
  const DeviceProperties& properties = properties_of(call.place.device);
  const int64_t tiles =
      int64_t{shape.images} * ceil_div(shape.out_height, stem::kOutRows) * ceil_div(shape.out_width, stem::kOutColumns);
  const int64_t resident = std::clamp<int64_t>(properties.shared_memory / sizeof(stem::Shared), 1, 2);
  const int64_t blocks = std::min<int64_t>(tiles, resident * properties.multiprocessors);
  launch(call,
         {dim3(static_cast<unsigned>(blocks), shape.filters / stem::kFilters), stem::kThreads, sizeof(stem::Shared)},
         stem_kernel<T, Input>, static_cast<const Input*>(x), pixel_scale, static_cast<const T*>(weight), scale, shift,
         shape, static_cast<T*>(out));
}

}  // namespace

void stem(const Call& call, const StemShape& shape, DType dtype, const void* x, const PixelScale* pixel_scale,
          const void* weight, const float* scale, const float* shift, void* out) {
  const auto of_type = [&](auto pass) {
    pass(call, shape, x, pixel_scale == nullptr ? PixelScale{} : *pixel_scale, weight, scale, shift, out);
  };
  if (dtype == DType::float16) return of_type(pixel_scale == nullptr ? run<Half, Half> : run<Half, uint8_t>);
  if (dtype == DType::bfloat16)
    return of_type(pixel_scale == nullptr ? run<BFloat16, BFloat16> : run<BFloat16, uint8_t>);
  throw std::runtime_error("stem takes float16 and bfloat16");
}

}  // namespace cuda
}  // namespace fused_resnet
