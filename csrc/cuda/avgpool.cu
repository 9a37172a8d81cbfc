// The launch of the global average pooling.
#include "avgpool.cuh"

#include <algorithm>

#include "rows.h"

namespace fused_resnet {
namespace cuda {

void avgpool(const Call& call, const Matrix& shape, int64_t images, const void* x, void* out) {
  const DeviceGuard guard(call);
  const bool vectors = vectors_fit(shape, 16 / element_size(shape.dtype), {x, out});
  with_vector<8>(shape.dtype, vectors, [&](auto type, auto vector) {
    using T = typename decltype(type)::Element;
    constexpr int kCount = decltype(vector)::value;
    const int lanes = lanes_of(shape.channels, kCount);
    const Rows rows{shape.rows / images, shape.channels, lanes, kThreads / lanes};
    const int64_t slices = ceil_div(shape.channels, int64_t{lanes} * kCount);
    launch(call,
           {dim3(static_cast<unsigned>(slices), static_cast<unsigned>(std::min<int64_t>(images, 65535))), kThreads,
            sizeof(float) * kThreads * kCount},
           avgpool_kernel<T, kCount>, static_cast<const T*>(x), rows, static_cast<int>(images), static_cast<T*>(out));
  });
}

}  // namespace cuda
}  // namespace fused_resnet
