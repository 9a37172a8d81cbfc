#include "dispatch.h"

#include "bn_act.h"
#include "conv.h"

#define CPU_CAPABILITY baseline
#include "cpu/conv/conv.h"
#include "cpu/norm/bn_act.h"
#undef CPU_CAPABILITY
#ifdef FUSED_RESNET_X86_DISPATCH
#define CPU_CAPABILITY avx2
#include "cpu/conv/conv.h"
#include "cpu/norm/bn_act.h"
#undef CPU_CAPABILITY
#define CPU_CAPABILITY avx512
#include "cpu/conv/conv.h"
#include "cpu/norm/bn_act.h"
#undef CPU_CAPABILITY
#define CPU_CAPABILITY avx512_bf16
#include "cpu/conv/conv.h"
#include "cpu/norm/bn_act.h"
#undef CPU_CAPABILITY
#endif

namespace fused_resnet {
namespace {

struct Build {
  CpuCapability capability;
  const char* name;
  const BnActKernels* bn_act;
  const ConvKernels* conv;
};

#define FUSED_RESNET_BUILD_OF(capability) \
  Build { CpuCapability::capability, #capability, &capability::kBnActKernels, &capability::kConvKernels }

Build widest_build() {
#ifdef FUSED_RESNET_X86_DISPATCH
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    if (__builtin_cpu_supports("avx512bf16")) return FUSED_RESNET_BUILD_OF(avx512_bf16);
    return FUSED_RESNET_BUILD_OF(avx512);
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return FUSED_RESNET_BUILD_OF(avx2);
#endif
  return FUSED_RESNET_BUILD_OF(baseline);
}

const Build& build() {
  static const Build chosen = widest_build();
  return chosen;
}

}  // namespace

CpuCapability cpu_capability() { return build().capability; }
const char* cpu_capability_name() { return build().name; }
const BnActKernels& bn_act_kernels() { return *build().bn_act; }
const ConvKernels& conv_kernels() { return *build().conv; }

}  // namespace fused_resnet
