// Forward passes: statistics, and normalise-add-ReLU. Compiled once per CPU_CAPABILITY (see setup.py).
#include "bn_act.h"

#include <cmath>

#include "traverse.h"

namespace fused_resnet {
namespace CPU_CAPABILITY {
namespace {

// Mean and squared deviations. A tile's values are summed as deviations from a shift, the mean of a few of its values
// far apart, and tiles are merged by Chan's formula: no digits are lost when |mean| >> std. Whatever the data, the
// shift lies within sqrt(tile size / kShiftValues), at most 8, standard deviations of the tile's mean, since its values
// are part of the tile: second - first^2 / count cancels 6 bits at most, and hardly ever one.
template <typename T>
struct Moments {
  static constexpr int64_t kShiftValues = 8;
  const typename T::Storage* x;
  std::vector<float> shift;

  void begin_tile(int64_t c_begin, int64_t c_end, int64_t offset, int64_t stride, int64_t count) {
    const int64_t values = std::min(count, kShiftValues);
    const int64_t step = count / values * stride;
    for (int64_t c = c_begin; c < c_end; ++c) shift[c] = 0.0f;
    for (int64_t k = 0; k < values; ++k) {
      for (int64_t c = c_begin; c < c_end; ++c) shift[c] += T::load(x[offset + k * step + c - c_begin]);
    }
    const float inverse = 1.0f / static_cast<float>(values);
    for (int64_t c = c_begin; c < c_end; ++c) shift[c] *= inverse;
  }
  float channel(int64_t c) const { return shift[c]; }
  Sums value(int64_t i, float channel_shift) const {
    const float deviation = T::load(x[i]) - channel_shift;
    return {deviation, deviation * deviation};
  }
  void end_tile(int64_t c_begin, int64_t c_end, const float* first, const float* second, int64_t count,
                int64_t total_count, double* total_mean, double* total_m2) const {
    const double inverse = 1.0 / static_cast<double>(count);
    const double share = static_cast<double>(count) / static_cast<double>(total_count + count);
    const double weight = share * static_cast<double>(total_count);
    const float* const shifts = shift.data() + c_begin;
#pragma GCC ivdep
    for (int64_t k = 0; k < c_end - c_begin; ++k) {
      const double drift = first[k] * inverse;
      const double m2 = second[k] - drift * first[k];
      const double delta = shifts[k] + drift - total_mean[k];
      total_mean[k] += delta * share;
      total_m2[k] += (m2 < 0.0 ? 0.0 : m2) + delta * delta * weight;
    }
  }
  static void merge(int64_t channels, const double* mean, const double* m2, int64_t count, int64_t total_count,
                    double* total_mean, double* total_m2) {
    const double share = static_cast<double>(count) / static_cast<double>(total_count + count);
    const double weight = share * static_cast<double>(total_count);
#pragma GCC ivdep
    for (int64_t k = 0; k < channels; ++k) {
      const double delta = mean[k] - total_mean[k];
      total_mean[k] += delta * share;
      total_m2[k] += m2[k] + delta * delta * weight;
    }
  }
};

// The moments of one channel in float64, by two passes: what numbers near the largest float32 leave of sums in float32.
template <typename Storage, typename Load>
void moments_of_channel(const Activation& shape, const Storage* x, int64_t c, const Load& load, double* mean,
                        double* m2) {
  const int64_t step = shape.channels_last ? shape.channels : 1;
  const auto for_each = [&](const auto& visit) {
    for (int64_t image = 0; image < shape.images; ++image) {
      const int64_t first = image * shape.channels * shape.pixels + (shape.channels_last ? c : c * shape.pixels);
      for (int64_t p = 0; p < shape.pixels; ++p) visit(static_cast<double>(load(x[first + p * step])));
    }
  };
  double sum = 0.0, squares = 0.0;
  for_each([&](double value) { sum += value; });
  const double found = sum / static_cast<double>(shape.count());
  for_each([&](double value) { squares += (value - found) * (value - found); });
  *mean = found;
  *m2 = squares;
}

struct AffineChannel {
  float mean, scale, bias;
  float operator()(float value) const { return (value - mean) * scale + bias; }
};

}  // namespace

void bn_stats(const Activation& shape, const void* x, float* mean, double* variance) {
  with_element(shape.dtype, [&](auto element) {
    using T = decltype(element);
    const auto* from = static_cast<const typename T::Storage*>(x);
    const Moments<T> moments{from, std::vector<float>(shape.channels)};
    const double inverse = 1.0 / static_cast<double>(shape.count());
    reduce_channels(shape, moments, [&](int64_t c, double total_mean, double total_m2) {
      if (!std::isfinite(total_m2)) moments_of_channel(shape, from, c, T::load, &total_mean, &total_m2);
      mean[c] = static_cast<float>(total_mean);
      variance[c] = total_m2 * inverse;
    });
  });
}

void bn_apply(const Activation& shape, const void* x, const Norm& norm, const void* residual, bool relu, void* out) {
  const ChannelVectors vectors(norm, shape.channels);
  const float *mean = vectors.mean, *scale = vectors.scale.data(), *bias = vectors.bias.data();
  const auto channel = [=](int64_t c) { return AffineChannel{mean[c], scale[c], bias[c]}; };
  with_element(shape.dtype, [&](auto element) {
    using T = decltype(element);
    using Storage = typename T::Storage;
    const auto* from = static_cast<const Storage*>(x);
    const auto* added = static_cast<const Storage*>(residual);
    auto* to = static_cast<Storage*>(out);
    with_bool(relu, [&](auto with_relu) {
      with_bool(residual != nullptr, [&](auto with_residual) {
        for_each_element(shape, to, channel, [=](int64_t i, AffineChannel affine) {
          float z = affine(T::load(from[i]));
          if constexpr (decltype(with_residual)::value) z += T::load(added[i]);
          return T::store(decltype(with_relu)::value ? relu_of(z) : z);
        });
      });
    });
  });
}

void bn_apply_dual(const Activation& shape, const void* x, const Norm& norm, const void* x2, const Norm& norm2,
                   bool relu, void* out) {
  const ChannelVectors vectors(norm, shape.channels), vectors2(norm2, shape.channels);
  const float *mean = vectors.mean, *scale = vectors.scale.data(), *bias = vectors.bias.data();
  const float *mean2 = vectors2.mean, *scale2 = vectors2.scale.data(), *bias2 = vectors2.bias.data();
  struct Both {
    AffineChannel one, two;
  };
  const auto channel = [=](int64_t c) { return Both{{mean[c], scale[c], bias[c]}, {mean2[c], scale2[c], bias2[c]}}; };
  with_element(shape.dtype, [&](auto element) {
    using T = decltype(element);
    using Storage = typename T::Storage;
    const auto* from = static_cast<const Storage*>(x);
    const auto* from2 = static_cast<const Storage*>(x2);
    auto* to = static_cast<Storage*>(out);
    with_bool(relu, [&](auto with_relu) {
      for_each_element(shape, to, channel, [=](int64_t i, Both affine) {
        const float z = affine.one(T::load(from[i])) + affine.two(T::load(from2[i]));
        return T::store(decltype(with_relu)::value ? relu_of(z) : z);
      });
    });
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace fused_resnet
