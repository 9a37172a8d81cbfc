// Backward passes: the two sums of each channel, and the gradients of the input and the residual.
// Compiled once per CPU_CAPABILITY (see setup.py).
#include "bn_act.h"
#include "traverse.h"

namespace fused_resnet {
namespace CPU_CAPABILITY {
namespace {

// Where the mask of the ReLU comes from.
enum class Mask { none, output, recomputed };

struct MaskedChannel {
  float mean, scale, bias;
};

// grad_out where `z` let it pass. `<= 0` is false for NaN, so a NaN lets the gradient pass, as in torch.
inline float masked(float grad_out, float z) { return z <= 0.0f ? 0.0f : grad_out; }

template <typename T, Mask mask>
struct GradSums {
  const typename T::Storage *grad_out, *x, *out;
  typename T::Storage* written_dz;
  const float *mean, *scale, *bias;

  void begin_tile(int64_t, int64_t, int64_t, int64_t, int64_t) const {}
  MaskedChannel channel(int64_t c) const { return {mean[c], scale[c], bias[c]}; }
  Sums value(int64_t i, MaskedChannel of) const {
    const float deviation = T::load(x[i]) - of.mean;
    float dz = T::load(grad_out[i]);
    if constexpr (mask == Mask::recomputed) dz = masked(dz, deviation * of.scale + of.bias);
    if constexpr (mask == Mask::output) {
      dz = masked(dz, T::load(out[i]));
      written_dz[i] = T::store(dz);
    }
    return {dz, dz * deviation};
  }
  void end_tile(int64_t c_begin, int64_t c_end, const float* first, const float* second, int64_t, int64_t,
                double* total_first, double* total_second) const {
    for (int64_t k = 0; k < c_end - c_begin; ++k) {
      total_first[k] += first[k];
      total_second[k] += second[k];
    }
  }
  static void merge(int64_t channels, const double* first, const double* second, int64_t, int64_t, double* total_first,
                    double* total_second) {
    for (int64_t k = 0; k < channels; ++k) {
      total_first[k] += first[k];
      total_second[k] += second[k];
    }
  }
};

}  // namespace

void bn_grad_stats(const Activation& shape, const void* grad_out, const void* x, const void* out, void* dz,
                   const Norm& norm, bool relu, float* sum_dz, float* sum_dz_xhat) {
  const ChannelVectors vectors(norm, shape.channels);
  with_element(shape.dtype, [&](auto element) {
    using T = decltype(element);
    using Storage = typename T::Storage;
    const auto reduce = [&](auto mask) {
      using Reduction = GradSums<T, decltype(mask)::value>;
      const Reduction sums{static_cast<const Storage*>(grad_out),
                           static_cast<const Storage*>(x),
                           static_cast<const Storage*>(out),
                           static_cast<Storage*>(dz),
                           vectors.mean,
                           vectors.scale.data(),
                           vectors.bias.data()};
      reduce_channels(shape, sums, [&](int64_t c, double total_dz, double total_dz_deviation) {
        sum_dz[c] = static_cast<float>(total_dz);
        sum_dz_xhat[c] = static_cast<float>(total_dz_deviation * norm.invstd[c]);
      });
    };
    if (!relu) {
      reduce(std::integral_constant<Mask, Mask::none>{});
    } else if (out == nullptr) {
      reduce(std::integral_constant<Mask, Mask::recomputed>{});
    } else {
      reduce(std::integral_constant<Mask, Mask::output>{});
    }
  });
}

void bn_grad_apply(const Activation& shape, const void* grad_out, const void* x, const Norm& norm, const float* sum_dz,
                   const float* sum_dz_xhat, bool relu, void* grad_x) {
  const int64_t channels = shape.channels;
  const ChannelVectors vectors(norm, channels);
  const bool live_statistics = sum_dz != nullptr && sum_dz_xhat != nullptr;
  std::vector<float> mean_dz(channels), slope(channels);  // slope = invstd * mean of dz * xhat
  if (live_statistics) {
    const double count = static_cast<double>(shape.count());
    for (int64_t c = 0; c < channels; ++c) {
      mean_dz[c] = static_cast<float>(sum_dz[c] / count);
      slope[c] = static_cast<float>(sum_dz_xhat[c] / count * norm.invstd[c]);
    }
  }
  struct GradChannel {
    float mean, scale, bias, mean_dz, slope;
  };
  const float *mean = vectors.mean, *scale = vectors.scale.data(), *bias = vectors.bias.data();
  const float *offsets = mean_dz.data(), *slopes = slope.data();
  const auto channel = [=](int64_t c) { return GradChannel{mean[c], scale[c], bias[c], offsets[c], slopes[c]}; };
  with_element(shape.dtype, [&](auto element) {
    using T = decltype(element);
    using Storage = typename T::Storage;
    const auto* gradients = static_cast<const Storage*>(grad_out);
    const auto* values = static_cast<const Storage*>(x);
    auto* to = static_cast<Storage*>(grad_x);
    with_bool(relu, [&](auto with_relu) {
      with_bool(live_statistics, [&](auto live) {
        for_each_element(shape, to, channel, [=](int64_t i, GradChannel of) {
          const float deviation = T::load(values[i]) - of.mean;
          float dz = T::load(gradients[i]);
          if constexpr (decltype(with_relu)::value) dz = masked(dz, deviation * of.scale + of.bias);
          if constexpr (decltype(live)::value) dz -= of.mean_dz + deviation * of.slope;
          return T::store(dz * of.scale);
        });
      });
    });
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace fused_resnet
