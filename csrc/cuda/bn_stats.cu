// Launches of the statistics, alone or with what is made of them.
#include "bn_stats.cuh"

#include <algorithm>
#include <stdexcept>

#include "bn_stats_apply.cuh"
#include "rows.h"

namespace fused_resnet {
namespace cuda {
namespace {

// Partial means (double), then M2 (float): (parts, channels) each.
struct Partials {
  double* means;
  float* m2s;

  Partials(void* workspace, int parts, int channels)
      : means(static_cast<double*>(workspace)), m2s(reinterpret_cast<float*>(means + int64_t{parts} * channels)) {}
};

// The cover of bn_stats_apply: `layers` of rows stay in the shared memory of the block that has most.
struct Residence {
  Cover cover;
  int64_t layers;
  std::size_t shared_bytes;
};

template <int kCount>
Residence residence(const Matrix& shape, bool mask, int device) {
  const DeviceProperties& properties = properties_of(device);
  const int lanes = kCount == 1 && mask ? 32 : lanes_of(shape.channels, kCount);
  const int layer = kResidentThreads / lanes;
  const int64_t slices = ceil_div(shape.channels, int64_t{lanes} * kCount);
  const int64_t all_layers = ceil_div(shape.rows, layer);
  const int64_t parts = std::clamp<int64_t>(properties.multiprocessors / slices, 1, all_layers);
  const int64_t layers = ceil_div(all_layers, parts);
  const std::size_t vector = std::size_t{kCount} * element_size(shape.dtype);
  return {{{shape.rows, shape.channels, lanes, layer}, static_cast<int>(slices), static_cast<int>(parts)},
          layers,
          sizeof(Resident<kCount>) + layers * kResidentThreads * vector};
}

bool fits(const Residence& chosen, int device) {
  const DeviceProperties& properties = properties_of(device);
  return chosen.shared_bytes <= static_cast<std::size_t>(properties.shared_memory) &&
         int64_t{chosen.cover.slices} * chosen.cover.parts <= properties.multiprocessors;
}

}  // namespace

std::size_t bn_workspace_bytes(const Matrix& shape, int device) {
  // Whatever the vectors, the rows of a tile and the waves of a pass, it has no more parts than these.
  const int64_t blocks = int64_t{properties_of(device).multiprocessors} * kBlocksPerMultiprocessor;
  const int64_t vector = 16 / element_size(shape.dtype);
  const int64_t slices = ceil_div(shape.channels, 32 * vector);
  const int64_t parts = std::clamp<int64_t>(blocks / slices, 1, shape.rows);
  return static_cast<std::size_t>(parts) * shape.channels * (sizeof(double) + sizeof(float));
}

void bn_stats(const Call& call, const Matrix& shape, const void* x, float* mean, float* invstd, float* running_mean,
              float* running_var, double momentum, double eps, void* workspace) {
  const DeviceGuard guard(call);
  with_vector<kStatsCount>(
      shape.dtype, vectors_fit(shape, 16 / element_size(shape.dtype), {x}), [&](auto type, auto vector) {
        using T = typename decltype(type)::Element;
        constexpr int kCount = decltype(vector)::value;
        const Cover chosen = cover(shape, kCount, kStatsRows, 1, call.place.device);
        const Partials partials(workspace, chosen.parts, shape.channels);
        launch(call, {dim3(chosen.slices, chosen.parts), kThreads, sizeof(MomentsOfWarps<kCount, kThreads / 32>)},
               bn_stats_kernel<T, kCount>, static_cast<const T*>(x), chosen.rows, partials.means, partials.m2s);
        launch(call, {dim3(ceil_div(shape.channels, kMergeChannels)), kThreads, sizeof(double) * kThreads},
               bn_finalize_kernel<T>, static_cast<const T*>(x), partials.means, partials.m2s, shape.channels,
               Deal::of(shape.rows, chosen.rows.layer * kStatsRows, chosen.parts), shape.rows,
               Statistics{mean, invstd, running_mean, running_var, momentum, eps});
      });
}

bool fits_on_chip(const Matrix& shape, int device) {
  bool answer = true;
  for (const bool mask : {false, true}) {  // they differ in their vectors, and so in slices and parts
    const int elements = mask ? 8 : 16 / element_size(shape.dtype);
    with_vector<kStatsCount>(shape.dtype, vectors_fit(shape, elements, {}), [&](auto, auto vector) {
      answer = answer && fits(residence<decltype(vector)::value>(shape, mask, device), device);
    });
  }
  return answer;
}

void bn_stats_apply(const Call& call, const Matrix& shape, const void* x, const void* residual, const float* weight,
                    const float* bias, float* mean, float* invstd, float* running_mean, float* running_var,
                    double momentum, double eps, bool relu, void* out, uint8_t* mask, void* workspace) {
  const DeviceGuard guard(call);
  bool launched = false;
  const bool vectors = vectors_fit(shape, mask == nullptr ? 16 / element_size(shape.dtype) : 8,
                                   {x, residual, out, weight, bias, mean, invstd});
  with_vector<kStatsCount>(shape.dtype, vectors, [&](auto type, auto vector) {
    using T = typename decltype(type)::Element;
    constexpr int kCount = decltype(vector)::value;
    const Residence chosen = residence<kCount>(shape, mask != nullptr, call.place.device);
    if (!fits(chosen, call.place.device)) {
      throw std::runtime_error(described(call) + " does not fit in the device's shared memory");
    }
    const Partials partials(workspace, chosen.cover.parts, shape.channels);
    launched = launch_if_it_fits(
        call,
        {dim3(chosen.cover.slices, chosen.cover.parts), kResidentThreads, chosen.shared_bytes, /*cooperative=*/true},
        bn_stats_apply_kernel<T, kCount>, static_cast<const T*>(x), static_cast<const T*>(residual), weight, bias,
        chosen.cover.rows, Deal::of(shape.rows, chosen.cover.rows.layer, chosen.cover.parts),
        static_cast<int>(chosen.layers), partials.means, partials.m2s,
        Statistics{mean, invstd, running_mean, running_var, momentum, eps}, relu, static_cast<T*>(out),
        BitMask{mask, shape.channels});
  });
  if (launched) return;
  bn_stats(call, shape, x, mean, invstd, running_mean, running_var, momentum, eps, workspace);
  bn_apply(call, shape, x, Norm{mean, invstd, weight, bias}, residual, relu, out, mask);
}

}  // namespace cuda
}  // namespace fused_resnet
