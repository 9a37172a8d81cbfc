#include "conv_training.h"

#include <algorithm>

#include "buffers.h"

namespace fused_resnet {
namespace {

void run_once(const CpuConv& conv, ConvMethod method, const ConvInput& input, const ConvWeight& weight,
              const ConvEpilogue& epilogue) {
  const ConvKernels& kernels = conv_kernels();
  const Buffer packed(kernels.packed_bytes(conv, method));
  kernels.pack(conv, method, weight, packed.data());
  kernels.run(conv, method, input, weight, packed.data(), epilogue);
}

// One dimension of what the gradient of an input is made of where the convolution has a stride: of the inputs that lie
// `stride` apart from `first` on, each sees `taps` places of the kernel, from `place` on and `stride` apart too. They
// are a convolution of the output's gradient, padded by `padding`.
struct Phase {
  int first, count;
  int place, taps;
  int padding;
};

Phase phase_of(int first, int size, int stride, int kernel, int padding) {
  const int place = (first + padding) % stride;
  const int taps = place < kernel ? (kernel - place + stride - 1) / stride : 0;
  return {first, (size - first + stride - 1) / stride, place, taps, taps - 1 - (first + padding - place) / stride};
}

// Of the kernel the places that two phases see, turned around, filters and channels exchanged.
ConvWeight turned(const ConvWeight& weight, const CpuConv& conv, const Phase& rows, const Phase& columns) {
  const int64_t last_row = rows.place + int64_t{rows.taps - 1} * conv.stride_height;
  const int64_t last_column = columns.place + int64_t{columns.taps - 1} * conv.stride_width;
  const auto* const data = static_cast<const char*>(weight.data);
  return {data + weight.at(0, last_row, last_column, 0) * bytes_of(conv.dtype), weight.channel,
          -weight.row * conv.stride_height, -weight.column * conv.stride_width, weight.filter};
}

}  // namespace

void conv_forward(const CpuConv& conv, ConvMethod method, const ConvInput& input, const ConvWeight& weight, void* out) {
  run_once(conv, method, input, weight, {nullptr, nullptr, false, out});
}

bool grad_input_takes(const CpuConv& conv) {
  const bool dilated = conv.dilation_height > 1 || conv.dilation_width > 1;
  const bool strided = conv.stride_height > 1 || conv.stride_width > 1;
  return conv.groups == 1 && conv.dtype == DType::float32 && !(dilated && strided) &&
         conv.padding_height <= conv.dilation_height * (conv.kernel_height - 1) &&
         conv.padding_width <= conv.dilation_width * (conv.kernel_width - 1);
}

CpuConv grad_input_conv(const CpuConv& conv) {
  CpuConv turned = conv;
  turned.channels = conv.filters;
  turned.filters = conv.channels;
  turned.height = conv.out_height;
  turned.width = conv.out_width;
  turned.out_height = conv.height;
  turned.out_width = conv.width;
  turned.padding_height = conv.dilation_height * (conv.kernel_height - 1) - conv.padding_height;
  turned.padding_width = conv.dilation_width * (conv.kernel_width - 1) - conv.padding_width;
  return turned;
}

void conv_grad_input(const CpuConv& conv, ConvMethod method, const void* grad_out, const ConvWeight& weight,
                     const void* residual, void* grad_input) {
  CpuConv part = grad_input_conv(conv);
  if (conv.stride_height == 1 && conv.stride_width == 1) {
    const Phase rows{0, 0, 0, conv.kernel_height, 0}, columns{0, 0, 0, conv.kernel_width, 0};
    return run_once(part, method, {grad_out}, turned(weight, conv, rows, columns),
                    {nullptr, residual, false, grad_input});
  }
  part.stride_height = part.stride_width = 1;
  const int64_t most_rows = (conv.height + conv.stride_height - 1) / conv.stride_height;
  const int64_t most_columns = (conv.width + conv.stride_width - 1) / conv.stride_width;
  const Buffer dense(conv.images * most_rows * most_columns * conv.channels * static_cast<int64_t>(sizeof(float)));
  for (int i = 0; i < std::min(conv.stride_height, conv.height); ++i) {
    const Phase rows = phase_of(i, conv.height, conv.stride_height, conv.kernel_height, conv.padding_height);
    for (int j = 0; j < std::min(conv.stride_width, conv.width); ++j) {
      const Phase columns = phase_of(j, conv.width, conv.stride_width, conv.kernel_width, conv.padding_width);
      const bool any = rows.taps > 0 && columns.taps > 0;
      if (any) {
        part.out_height = rows.count;
        part.out_width = columns.count;
        part.kernel_height = rows.taps;
        part.kernel_width = columns.taps;
        part.padding_height = rows.padding;
        part.padding_width = columns.padding;
        run_once(part, ConvMethod::gemm, {grad_out}, turned(weight, conv, rows, columns),
                 {nullptr, nullptr, false, dense.data()});
      }
      conv_kernels().scatter(conv, {rows.first, rows.count, columns.first, columns.count},
                             any ? static_cast<const float*>(dense.data()) : nullptr,
                             static_cast<const float*>(residual), static_cast<float*>(grad_input));
    }
  }
}

}  // namespace fused_resnet
