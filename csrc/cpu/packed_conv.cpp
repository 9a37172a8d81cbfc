#include "packed_conv.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

namespace fused_resnet {
namespace {

int output_size(int size, int kernel, int stride, int padding, int dilation) {
  return (size + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1;
}

int64_t row_of(const CpuConv& conv) { return int64_t{conv.kernel_width} * conv.group_channels(); }

int64_t checked_bytes(ConvMethod method, const CpuConv& conv) {
  if (!conv_kernels().takes(conv, method)) {
    throw std::invalid_argument("this method cannot do this convolution on this processor: ask conv_takes first");
  }
  return conv_kernels().packed_bytes(conv, method);
}

}  // namespace

CpuConv on_images(CpuConv conv, int64_t images, int height, int width, int threads) {
  conv.images = images;
  conv.height = height;
  conv.width = width;
  conv.threads = threads;
  conv.out_height = conv.out_width = 0;
  if (height + 2 * conv.padding_height > conv.dilation_height * (conv.kernel_height - 1) &&
      width + 2 * conv.padding_width > conv.dilation_width * (conv.kernel_width - 1)) {
    conv.out_height =
        output_size(height, conv.kernel_height, conv.stride_height, conv.padding_height, conv.dilation_height);
    conv.out_width = output_size(width, conv.kernel_width, conv.stride_width, conv.padding_width, conv.dilation_width);
  }
  if (images < 1 || height < 1 || width < 1 || threads < 1 || conv.out_height < 1 || conv.out_width < 1) {
    throw std::invalid_argument("images, height, width and threads must be positive, and so must the output's sizes");
  }
  return conv;
}

PackedConv::PackedConv(ConvMethod method, const void* weight, const float* bias, const CpuConv& conv)
    : method_(method),
      conv_(conv),
      weight_{weight, conv.kernel_height * row_of(conv), row_of(conv), conv.group_channels(), 1},
      packed_(checked_bytes(method, conv)),
      bias_(conv.filters * static_cast<int64_t>(sizeof(float))) {
  conv_kernels().pack(conv_, method_, weight_, packed_.data());
  std::copy_n(bias, conv.filters, static_cast<float*>(bias_.data()));
}

void PackedConv::run(const CpuConv& conv, const void* x, const void* residual, bool relu, void* out) const {
  conv_kernels().run(conv, method_, {x}, weight_, packed_.data(),
                     {static_cast<const float*>(bias_.data()), residual, relu, out});
}

ConvChain::Place ConvChain::place(int activation, int64_t bytes) const {
  if (activation < 0 || activation >= static_cast<int>(offsets_.size()) + 2) {
    throw std::invalid_argument("there is no activation " + std::to_string(activation));
  }
  if (activation < 2) return {0, 0};
  const int64_t offset = offsets_[activation - 2];
  if (offset < 0 || bytes > bytes_ - offset) {
    throw std::invalid_argument("activation " + std::to_string(activation) + " must lie inside the chain's memory");
  }
  return {offset, offset + bytes};
}

void ConvChain::add_step(Step step) {
  const CpuConv& conv = step.conv;
  const bool is_conv = step.kind == Kind::conv;
  const int64_t x_bytes = conv.images * conv.height * conv.width * conv.channels * bytes_of(conv.dtype);
  const int64_t out_pixels = step.kind == Kind::average ? conv.images : conv.pixels();
  const int64_t out_bytes = out_pixels * (is_conv ? conv.filters : conv.channels) * bytes_of(conv.dtype);
  const Place x = place(step.x, x_bytes), out = place(step.out, out_bytes);
  const Place residual = step.residual == -1 ? Place{0, 0} : place(step.residual, out_bytes);
  const auto overlaps = [&out](const Place& other) { return out.begin < other.end && other.begin < out.end; };
  if (step.out == 0 || step.out == step.x || overlaps(x)) {
    throw std::invalid_argument("out must be neither the chain's input nor the step's");
  }
  if (step.residual != step.out && overlaps(residual)) {
    throw std::invalid_argument("out may be the residual, but not a part of it");
  }
  steps_.push_back(std::move(step));
}

void ConvChain::add(std::shared_ptr<const PackedConv> packed, int64_t images, int height, int width, int threads, int x,
                    int residual, bool relu, int out) {
  const CpuConv conv = on_images(packed->conv(), images, height, width, threads);
  add_step({Kind::conv, std::move(packed), conv, x, residual, relu, out});
}

void ConvChain::add_max_pool(const CpuConv& window, int64_t images, int height, int width, int threads, int x,
                             int out) {
  add_step({Kind::max_pool, nullptr, on_images(window, images, height, width, threads), x, -1, false, out});
}

void ConvChain::add_average(const CpuConv& pixel, int64_t images, int height, int width, int threads, int x, int out) {
  add_step({Kind::average, nullptr, on_images(pixel, images, height, width, threads), x, -1, false, out});
}

void ConvChain::run(const void* x, void* out) const {
  const Buffer memory(std::max<int64_t>(bytes_, 1));
  std::vector<void*> activations{const_cast<void*>(x), out};
  for (const int64_t offset : offsets_) activations.push_back(static_cast<char*>(memory.data()) + offset);
  for (const Step& step : steps_) {
    const void* const from = activations[step.x];
    void* const to = activations[step.out];
    switch (step.kind) {
      case Kind::conv: {
        const void* const residual = step.residual < 0 ? nullptr : activations[step.residual];
        step.packed->run(step.conv, from, residual, step.relu, to);
        break;
      }
      case Kind::max_pool:
        conv_kernels().max_pool(step.conv, from, to);
        break;
      case Kind::average:
        conv_kernels().average(step.conv, from, to);
        break;
    }
  }
}

}  // namespace fused_resnet
