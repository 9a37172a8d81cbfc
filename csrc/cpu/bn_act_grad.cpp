// Backward passes: the two sums of each channel, and the gradients of the input and the residual.
// Compiled once per CPU_CAPABILITY (see setup.py).
#include "bn_act.h"
#include "traverse.h"

namespace fused_resnet {
namespace CPU_CAPABILITY {
namespace {

// Where the gradient's ReLU mask comes from.
enum class Mask { none, output, recomputed };

struct MaskedChannel {
  float mean, scale, bias;
};

// dz: the gradient in front of the ReLU. `<= 0` is false for NaN, so a NaN lets the gradient pass, as in torch.
template <typename T, Mask mask>
struct GradBeforeRelu {
  const typename T::Storage* grad_out;
  const typename T::Storage* out;

  float operator()(int64_t i, float deviation, MaskedChannel channel) const {
    const float gradient = T::load(grad_out[i]);
    if constexpr (mask == Mask::output) return T::load(out[i]) <= 0.0f ? 0.0f : gradient;
    if constexpr (mask == Mask::recomputed) return deviation * channel.scale + channel.bias <= 0.0f ? 0.0f : gradient;
    return gradient;
  }
};

template <typename T, Mask mask>
struct GradSums {
  struct Total {
    double first = 0.0;
    double second = 0.0;
  };

  GradBeforeRelu<T, mask> grad_before_relu;
  const typename T::Storage* x;
  const float *mean, *scale, *bias;

  void begin_tile(int64_t, int64_t, int64_t, int64_t, int64_t) const {}
  MaskedChannel channel(int64_t c) const { return {mean[c], scale[c], bias[c]}; }
  Sums value(int64_t i, MaskedChannel of) const {
    const float deviation = T::load(x[i]) - of.mean;
    const float dz = grad_before_relu(i, deviation, of);
    return {dz, dz * deviation};
  }
  void end_tile(int64_t, const Sums& sums, int64_t, Total& total) const { merge(total, {sums.first, sums.second}); }
  static void merge(Total& total, const Total& other) {
    total.first += other.first;
    total.second += other.second;
  }
};

template <typename Run>
void with_mask(bool relu, const void* out, const Run& run) {
  if (!relu) return run(std::integral_constant<Mask, Mask::none>{});
  if (out != nullptr) return run(std::integral_constant<Mask, Mask::output>{});
  return run(std::integral_constant<Mask, Mask::recomputed>{});
}

}  // namespace

void bn_grad_stats(const Activation& shape, const void* grad_out, const void* x, const void* out, const Norm& norm,
                   bool relu, float* sum_dz, float* sum_dz_xhat) {
  const ChannelVectors vectors(norm, shape.channels);
  with_element(shape.dtype, [&](auto element) {
    using T = decltype(element);
    const auto storage = [](const void* address) { return static_cast<const typename T::Storage*>(address); };
    with_mask(relu, out, [&](auto mask) {
      using Reduction = GradSums<T, decltype(mask)::value>;
      const Reduction sums{
          {storage(grad_out), storage(out)}, storage(x), vectors.mean, vectors.scale.data(), vectors.bias.data()};
      reduce_channels(shape, sums, [&](int64_t c, const typename Reduction::Total& total) {
        sum_dz[c] = static_cast<float>(total.first);
        sum_dz_xhat[c] = static_cast<float>(total.second * norm.invstd[c]);
      });
    });
  });
}

void bn_grad_apply(const Activation& shape, const void* grad_out, const void* x, const void* out, const Norm& norm,
                   const float* sum_dz, const float* sum_dz_xhat, bool relu, void* grad_x, void* grad_residual) {
  const int64_t channels = shape.channels;
  const ChannelVectors vectors(norm, channels);
  const bool live_statistics = sum_dz != nullptr && sum_dz_xhat != nullptr;
  std::vector<float> mean_dz(channels, 0.0f), slope(channels, 0.0f);  // slope = invstd * mean of dz * xhat
  if (live_statistics) {
    const double count = static_cast<double>(shape.count());
    for (int64_t c = 0; c < channels; ++c) {
      mean_dz[c] = static_cast<float>(sum_dz[c] / count);
      slope[c] = static_cast<float>(sum_dz_xhat[c] / count * norm.invstd[c]);
    }
  }
  struct GradChannel : MaskedChannel {
    float mean_dz, slope;
  };
  const float *mean = vectors.mean, *scale = vectors.scale.data(), *bias = vectors.bias.data();
  const float *offsets = mean_dz.data(), *slopes = slope.data();
  const auto channel = [=](int64_t c) { return GradChannel{{mean[c], scale[c], bias[c]}, offsets[c], slopes[c]}; };
  with_element(shape.dtype, [&](auto element) {
    using T = decltype(element);
    using Storage = typename T::Storage;
    const auto* values = static_cast<const Storage*>(x);
    auto* to = static_cast<Storage*>(grad_x);
    auto* to_residual = static_cast<Storage*>(grad_residual);
    with_mask(relu, out, [&](auto mask) {
      constexpr Mask kMask = decltype(mask)::value;
      const GradBeforeRelu<T, kMask> grad_before_relu{static_cast<const Storage*>(grad_out),
                                                      static_cast<const Storage*>(out)};
      with_bool(live_statistics, [&](auto live) {
        with_bool(grad_residual != nullptr, [&](auto with_residual) {
          for_each_element(shape, channel, [=](int64_t i, GradChannel of) {
            constexpr bool kLive = decltype(live)::value;
            const float deviation = kLive || kMask == Mask::recomputed ? T::load(values[i]) - of.mean : 0.0f;
            const float dz = grad_before_relu(i, deviation, of);
            const float centered = kLive ? dz - of.mean_dz - deviation * of.slope : dz;
            to[i] = T::store(centered * of.scale);
            if constexpr (decltype(with_residual)::value) to_residual[i] = T::store(dz);
          });
        });
      });
    });
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace fused_resnet
