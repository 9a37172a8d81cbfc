// The convolutions of one CPU_CAPABILITY; ../conv.h says what each does. No include guard: the dispatcher includes this
// once for every capability that was built.
#include "cpu/conv.h"

namespace fused_resnet {
namespace CPU_CAPABILITY {

bool conv_takes(const CpuConv& conv, ConvMethod method);
int64_t conv_packed_bytes(const CpuConv& conv, ConvMethod method);
void conv_pack(const CpuConv& conv, ConvMethod method, const ConvWeight& weight, void* packed);
void conv_run(const CpuConv& conv, ConvMethod method, const ConvInput& input, const ConvWeight& weight,
              const void* packed, const ConvEpilogue& epilogue);
void conv_grad_weight(const CpuConv& conv, ConvMethod method, const ConvInput& input, const void* grad_out,
                      float* grad_weight);
void scatter(const CpuConv& conv, const Lattice& lattice, const float* from, const float* residual, float* to);
void max_pool(const CpuConv& pool, const void* x, void* out);
void average(const CpuConv& images, const void* x, void* out);

constexpr ConvKernels kConvKernels{conv_takes,       conv_packed_bytes, conv_pack, conv_run,
                                   conv_grad_weight, scatter,           max_pool,  average};

}  // namespace CPU_CAPABILITY
}  // namespace fused_resnet
