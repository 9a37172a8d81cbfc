// A convolution in training and its two gradients, its weights laid out anew in every call, since every step changes
// them. Of float32, NHWC, without groups.
#pragma once

#include "conv.h"

namespace fused_resnet {

// All of `conv` is set, images, sizes and threads included. out = conv(input); weight lies anywhere.
void conv_forward(const CpuConv& conv, ConvMethod method, const ConvInput& input, const ConvWeight& weight, void* out);

// The gradient of the convolution's input, plus `residual` (or null), for grad_out, that of its output. Strides other
// than 1 are taken where dilation is 1, by gemm whatever the method; padding at most dilation * (kernel - 1).
void conv_grad_input(const CpuConv& conv, ConvMethod method, const void* grad_out, const ConvWeight& weight,
                     const void* residual, void* grad_input);

// Whether conv_grad_input takes it.
bool grad_input_takes(const CpuConv& conv);

// `conv` as the gradient of its input sees it: which method may do that.
CpuConv grad_input_conv(const CpuConv& conv);

}  // namespace fused_resnet
