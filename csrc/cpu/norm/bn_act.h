// The kernels of one CPU_CAPABILITY; ../bn_act.h says what each does. No include guard: the dispatcher includes this
// once for every capability that was built.
#include "cpu/bn_act.h"

namespace fused_resnet {
namespace CPU_CAPABILITY {

void bn_stats(const Activation& shape, const void* x, float* mean, double* variance);
void bn_apply(const Activation& shape, const void* x, const Norm& norm, const void* residual, bool relu, void* out);
void bn_apply_dual(const Activation& shape, const void* x, const Norm& norm, const void* x2, const Norm& norm2,
                   bool relu, void* out);
void bn_grad_stats(const Activation& shape, const void* grad_out, const void* x, const void* out, void* dz,
                   const Norm& norm, bool relu, float* sum_dz, float* sum_dz_xhat);
void bn_grad_apply(const Activation& shape, const void* grad_out, const void* x, const Norm& norm, const float* sum_dz,
                   const float* sum_dz_xhat, bool relu, void* grad_x);

constexpr BnActKernels kBnActKernels{bn_stats, bn_apply, bn_apply_dual, bn_grad_stats, bn_grad_apply};

}  // namespace CPU_CAPABILITY
}  // namespace fused_resnet
