// Forward passes: statistics, and normalise-add-ReLU. Compiled once per CPU_CAPABILITY (see setup.py).
#include "bn_act.h"

#include "traverse.h"

namespace fused_resnet {
namespace CPU_CAPABILITY {
namespace {

// Mean and squared deviations. A tile's values are summed as deviations from a shift, the mean of its first few
// values, and tiles are merged by Chan's formula: no digits are lost when |mean| >> std. The shift lies within
// sqrt(tile size / kShiftValues) standard deviations of the tile's mean whatever the data, since its values are part
// of the tile, so second - first^2 / count cancels a bounded number of bits.
template <typename T>
struct Moments {
  static constexpr int64_t kShiftValues = 8;
  struct Total {
    double mean = 0.0;
    double m2 = 0.0;
    double count = 0.0;
  };

  const typename T::Storage* x;
  std::vector<float> shift;

  void begin_tile(int64_t c_begin, int64_t c_end, int64_t offset, int64_t stride, int64_t count) {
    const int64_t values = std::min(count, kShiftValues);
    for (int64_t c = c_begin; c < c_end; ++c) shift[c] = 0.0f;
    for (int64_t k = 0; k < values; ++k) {
      for (int64_t c = c_begin; c < c_end; ++c) shift[c] += T::load(x[offset + k * stride + c - c_begin]);
    }
    const float inverse = 1.0f / static_cast<float>(values);
    for (int64_t c = c_begin; c < c_end; ++c) shift[c] *= inverse;
  }
  float channel(int64_t c) const { return shift[c]; }
  Sums value(int64_t i, float channel_shift) const {
    const float deviation = T::load(x[i]) - channel_shift;
    return {deviation, deviation * deviation};
  }
  void end_tile(int64_t c, const Sums& sums, int64_t count, Total& total) const {
    const double n = static_cast<double>(count);
    const double drift = sums.first / n;
    merge(total, Total{shift[c] + drift, std::max(sums.second - drift * sums.first, 0.0), n});
  }
  static void merge(Total& total, const Total& other) {
    const double delta = other.mean - total.mean;
    const double count = total.count + other.count;
    total.mean += delta * (other.count / count);
    total.m2 += other.m2 + delta * delta * (total.count * other.count / count);
    total.count = count;
  }
};

struct AffineChannel {
  float mean, scale, bias;
  float operator()(float value) const { return (value - mean) * scale + bias; }
};

}  // namespace

void bn_stats(const Activation& shape, const void* x, float* mean, float* variance) {
  with_element(shape.dtype, [&](auto element) {
    using T = decltype(element);
    const Moments<T> moments{static_cast<const typename T::Storage*>(x), std::vector<float>(shape.channels)};
    reduce_channels(shape, moments, [&](int64_t c, const auto& total) {
      mean[c] = static_cast<float>(total.mean);
      variance[c] = static_cast<float>(total.m2 / total.count);
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
  const auto channel = [=](int64_t c) {
    return Both{{mean[c], scale[c], bias[c]}, {mean2[c], scale2[c], bias2[c]}};
  };
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
