// The choice of the kernels built for this processor, and what happens once per channel.
#include "bn_act.h"

#include <algorithm>
#include <cmath>

#define CPU_CAPABILITY baseline
#include "cpu/bn_act.h"
#undef CPU_CAPABILITY
#ifdef FUSED_RESNET_X86_DISPATCH
#define CPU_CAPABILITY avx2
#include "cpu/bn_act.h"
#undef CPU_CAPABILITY
#define CPU_CAPABILITY avx512
#include "cpu/bn_act.h"
#undef CPU_CAPABILITY
#endif

namespace fused_resnet {
namespace {

struct Build {
  const char* capability;
  const BnActKernels* kernels;
};

Build widest_build() {
#ifdef FUSED_RESNET_X86_DISPATCH
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return {"avx512", &avx512::kBnActKernels};
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return {"avx2", &avx2::kBnActKernels};
#endif
  return {"baseline", &baseline::kBnActKernels};
}

const Build& build() {
  static const Build chosen = widest_build();
  return chosen;
}

}  // namespace

const BnActKernels& bn_act_kernels() { return *build().kernels; }
const char* cpu_capability() { return build().capability; }

void bn_finalize(int64_t channels, int64_t count, double momentum, double eps, const float* mean,
                 float* variance_to_invstd, float* running_mean, float* running_var) {
  const double to_unbiased = static_cast<double>(count) / static_cast<double>(std::max<int64_t>(count - 1, 1));
  for (int64_t c = 0; c < channels; ++c) {
    const double variance = variance_to_invstd[c];
    if (running_mean != nullptr) {
      running_mean[c] = static_cast<float>((1.0 - momentum) * running_mean[c] + momentum * mean[c]);
    }
    if (running_var != nullptr) {
      running_var[c] = static_cast<float>((1.0 - momentum) * running_var[c] + momentum * variance * to_unbiased);
    }
    variance_to_invstd[c] = static_cast<float>(1.0 / std::sqrt(variance + eps));
  }
}

}  // namespace fused_resnet
