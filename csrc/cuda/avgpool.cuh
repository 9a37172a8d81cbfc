// The mean of every channel of an image: what the classifier takes.
#pragma once

#include "rows.cuh"

namespace fused_resnet {

// Row blockIdx.y of out, (images, channels), for the block's channels: the mean over an image's `shape.rows` pixels,
// added up in float32 in an order that the shape alone decides. Reads 1T.
template <typename T, int kCount>
__global__ __launch_bounds__(kThreads, kBlocksPerMultiprocessor) void avgpool_kernel(const T* __restrict__ x,
                                                                                     Rows shape, int images,
                                                                                     T* __restrict__ out) {
  wait_for_previous_grid();
  const Position<kCount> place(shape);
  auto& shared = *static_cast<float (*)[kThreads][kCount]>(dynamic_shared_memory());
  for (int image = blockIdx.y; image < images; image += gridDim.y) {
    float sums[kCount] = {};
    const T* const from = x + int64_t{image} * shape.rows * shape.channels + place.channel;
    for (int64_t row = place.row; place.inside && row < shape.rows; row += shape.layer) {
      float values[kCount];
      load_vector<kCount, Reuse::kOnce>(from + row * shape.channels).unpack(values);
#pragma unroll
      for (int i = 0; i < kCount; ++i) sums[i] += values[i];
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) shared[threadIdx.x][i] = sums[i];
    __syncthreads();
    if (place.row == 0 && place.inside) {
      for (int other = 1; other < shape.layer; ++other) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) sums[i] += shared[other * shape.lanes + place.lane][i];
      }
      const float count = static_cast<float>(shape.rows);
#pragma unroll
      for (int i = 0; i < kCount; ++i) sums[i] /= count;
      store_vector(out + int64_t{image} * shape.channels + place.channel, Vector<T, kCount>::pack(sums));
    }
    __syncthreads();
  }
  allow_next_grid();
}

}  // namespace fused_resnet
