// Which of the builds of csrc/cpu this processor runs.
#pragma once

namespace fused_resnet {

enum class CpuCapability { baseline, avx2, avx512, avx512_bf16 };

// The widest that was built and that the processor has.
CpuCapability cpu_capability();
const char* cpu_capability_name();

}  // namespace fused_resnet
