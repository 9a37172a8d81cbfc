// What happens once per channel.
#include "bn_act.h"

#include <algorithm>
#include <cmath>

namespace fused_resnet {

void bn_finalize(int64_t channels, int64_t count, double momentum, double eps, const float* mean,
                 const double* variance, float* invstd, float* running_mean, float* running_var) {
  const double to_unbiased = static_cast<double>(count) / static_cast<double>(std::max<int64_t>(count - 1, 1));
  for (int64_t c = 0; c < channels; ++c) {
    if (running_mean != nullptr) {
      running_mean[c] = static_cast<float>((1.0 - momentum) * running_mean[c] + momentum * mean[c]);
    }
    if (running_var != nullptr) {
      running_var[c] = static_cast<float>((1.0 - momentum) * running_var[c] + momentum * variance[c] * to_unbiased);
    }
    invstd[c] = static_cast<float>(1.0 / std::sqrt(variance[c] + eps));
  }
}

}  // namespace fused_resnet
