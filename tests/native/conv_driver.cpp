// Runs the CPU convolutions of one CPU_CAPABILITY on memory of exactly their size, against the sum as it is written in
// a textbook, in float64. Prints what is wrong; the exit status is how many were. tests/native/test_conv_driver.py
// builds it with sanitizers.
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <random>
#include <thread>
#include <vector>

#include "cpu/conv/conv.h"
#include "cpu/conv_training.h"
#include "cpu/simd/element.h"

using namespace fused_resnet;

// The kernels' own memory, which can be made to run out.
std::atomic<bool> memory_is_out{false};
constexpr std::size_t kOwnMemory = 256;  // bytes, from which on it is not a list of shares

void* operator new(std::size_t bytes, std::align_val_t alignment) {
  if (memory_is_out && bytes >= kOwnMemory) throw std::bad_alloc();
  const auto unit = static_cast<std::size_t>(alignment);
  return std::aligned_alloc(unit, (bytes + unit - 1) / unit * unit);
}
void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t, std::align_val_t) noexcept { std::free(memory); }

const ConvKernels& fused_resnet::conv_kernels() { return CPU_CAPABILITY::kConvKernels; }

namespace {

struct Case {
  ConvMethod method;
  int images, channels, height, width, filters, kernel_height, kernel_width, stride, padding, dilation, groups;
};

constexpr ConvMethod kGemm = ConvMethod::gemm, kWinograd = ConvMethod::winograd, kGrouped = ConvMethod::grouped;
const Case kCases[] = {
    {kGemm, 2, 64, 9, 7, 96, 1, 1, 1, 0, 1, 1},      {kGemm, 1, 33, 1, 1, 5, 1, 1, 1, 0, 1, 1},
    {kGemm, 2, 3, 19, 22, 64, 7, 7, 2, 3, 1, 1},     {kGemm, 1, 5, 9, 11, 20, 3, 2, 1, 0, 1, 1},
    {kGemm, 1, 300, 7, 7, 40, 3, 3, 2, 1, 1, 1},     {kGemm, 3, 32, 7, 7, 33, 3, 3, 1, 1, 1, 1},
    {kGemm, 1, 17, 4, 4, 31, 3, 3, 2, 4, 1, 1},      {kGemm, 1, 24, 13, 12, 31, 3, 3, 1, 2, 2, 1},
    {kGemm, 1, 128, 5, 5, 128, 3, 3, 1, 1, 1, 4},    {kGemm, 1, 600, 3, 5, 7, 1, 1, 1, 0, 1, 1},
    {kGemm, 2, 300, 9, 6, 1100, 1, 1, 1, 0, 1, 1},   {kGemm, 1, 40, 3, 2, 1100, 1, 1, 1, 0, 1, 1},
    {kGemm, 2, 16, 9, 8, 6, 3, 3, 2, 1, 1, 1},       {kGemm, 1, 16, 11, 13, 24, 2, 2, 3, 1, 1, 1},
    {kGemm, 1, 18, 40, 31, 33, 1, 1, 1, 0, 1, 1},    {kWinograd, 2, 16, 41, 33, 40, 3, 3, 1, 1, 1, 1},
    {kWinograd, 1, 32, 8, 8, 32, 3, 3, 1, 1, 1, 1},  {kWinograd, 2, 16, 11, 7, 37, 3, 3, 1, 1, 1, 1},
    {kWinograd, 1, 272, 5, 6, 8, 3, 3, 1, 0, 1, 1},  {kWinograd, 1, 16, 3, 3, 5, 3, 3, 1, 2, 1, 1},
    {kGrouped, 2, 64, 9, 15, 64, 3, 3, 1, 1, 1, 16}, {kGrouped, 1, 48, 9, 8, 48, 3, 3, 2, 1, 1, 6},
    {kGrouped, 1, 32, 7, 5, 32, 3, 3, 2, 2, 1, 2},   {kGrouped, 2, 128, 9, 15, 128, 3, 3, 1, 1, 1, 4},
    {kGrouped, 1, 66, 8, 7, 80, 3, 3, 2, 1, 1, 2},   {kGrouped, 1, 96, 3, 5, 108, 3, 3, 1, 2, 1, 3},
};

float number(DType dtype, const void* from, int64_t i) {
  if (dtype == DType::float32) return static_cast<const float*>(from)[i];
  return CPU_CAPABILITY::BFloat16::load(static_cast<const uint16_t*>(from)[i]);
}

double off_by(double found, double exact) {
  if (std::isfinite(exact)) return std::fabs(found - exact);
  return found == exact || (std::isnan(found) && std::isnan(exact)) ? 0.0 : INFINITY;
}

// The first of an image's channels infinite at its first pixel, which is all that its neighbours may see of it.
void put_infinity(DType dtype, void* to) {
  if (dtype == DType::float32) {
    *static_cast<float*>(to) = INFINITY;
  } else {
    *static_cast<uint16_t*>(to) = CPU_CAPABILITY::BFloat16::store(INFINITY);
  }
}

// Memory that ends where its last element does, of random numbers.
std::unique_ptr<void, decltype(&std::free)> random_numbers(DType dtype, int64_t count, std::mt19937& generator) {
  std::uniform_real_distribution<float> any(-1.0f, 1.0f);
  const int64_t bytes = dtype == DType::float32 ? 4 : 2;
  std::unique_ptr<void, decltype(&std::free)> memory(std::malloc(count * bytes), &std::free);
  for (int64_t i = 0; i < count; ++i) {
    if (dtype == DType::float32) {
      static_cast<float*>(memory.get())[i] = any(generator);
    } else {
      static_cast<uint16_t*>(memory.get())[i] = CPU_CAPABILITY::BFloat16::store(any(generator));
    }
  }
  return memory;
}

CpuConv conv_of(const Case& c, DType dtype, int threads) {
  const auto size = [&](int pixels, int kernel) {
    return (pixels + 2 * c.padding - c.dilation * (kernel - 1) - 1) / c.stride + 1;
  };
  CpuConv conv{};
  conv.images = c.images;
  conv.height = c.height, conv.width = c.width, conv.channels = c.channels;
  conv.out_height = size(c.height, c.kernel_height), conv.out_width = size(c.width, c.kernel_width);
  conv.filters = c.filters, conv.kernel_height = c.kernel_height, conv.kernel_width = c.kernel_width;
  conv.stride_height = conv.stride_width = c.stride, conv.padding_height = conv.padding_width = c.padding;
  conv.dilation_height = conv.dilation_width = c.dilation;
  conv.groups = c.groups, conv.dtype = dtype, conv.threads = threads;
  return conv;
}

double exactly(const CpuConv& conv, const void* x, const void* weight, int64_t pixel, int filter) {
  const int64_t image = pixel / (conv.out_height * conv.out_width);
  const int row = static_cast<int>(pixel / conv.out_width % conv.out_height);
  const int column = static_cast<int>(pixel % conv.out_width);
  const int group = filter / conv.group_filters();
  double sum = 0.0;
  for (int i = 0; i < conv.kernel_height; ++i) {
    for (int j = 0; j < conv.kernel_width; ++j) {
      const int y = row * conv.stride_height - conv.padding_height + i * conv.dilation_height;
      const int z = column * conv.stride_width - conv.padding_width + j * conv.dilation_width;
      if (y < 0 || z < 0 || y >= conv.height || z >= conv.width) continue;
      for (int c = 0; c < conv.group_channels(); ++c) {
        const int64_t input = ((image * conv.height + y) * conv.width + z) * conv.channels;
        const int64_t place = (int64_t{filter} * conv.kernel_height + i) * conv.kernel_width + j;
        sum += double{number(conv.dtype, x, input + group * conv.group_channels() + c)} *
               number(conv.dtype, weight, place * conv.group_channels() + c);
      }
    }
  }
  return sum;
}

bool is_right(const Case& c, DType dtype, int threads) {
  const ConvKernels& kernels = CPU_CAPABILITY::kConvKernels;
  const CpuConv conv = conv_of(c, dtype, threads);
  if (!kernels.takes(conv, c.method)) return true;
  std::mt19937 generator(7);
  const int64_t outputs = conv.pixels() * conv.filters;
  const auto x = random_numbers(dtype, conv.images * conv.height * conv.width * conv.channels, generator);
  put_infinity(dtype, x.get());
  const auto weight = random_numbers(
      dtype, int64_t{conv.filters} * conv.kernel_height * conv.kernel_width * conv.group_channels(), generator);
  const auto bias = random_numbers(DType::float32, conv.filters, generator);
  const auto residual = random_numbers(dtype, outputs, generator);
  const auto out = random_numbers(dtype, outputs, generator);
  const std::unique_ptr<void, decltype(&std::free)> packed(std::malloc(kernels.packed_bytes(conv, c.method)),
                                                           &std::free);
  const int64_t channels = conv.group_channels(), row = conv.kernel_width * channels;
  const ConvWeight where{weight.get(), conv.kernel_height * row, row, channels, 1};
  kernels.pack(conv, c.method, where, packed.get());
  kernels.run(conv, c.method, {x.get()}, where, packed.get(),
              {static_cast<const float*>(bias.get()), residual.get(), true, out.get()});
  const double terms = double(conv.group_channels()) * conv.kernel_height * conv.kernel_width;
  const double limit = dtype == DType::float32 ? 2e-6 * terms : 0.01 * std::sqrt(terms);
  for (int64_t i = 0; i < outputs; ++i) {
    const int filter = static_cast<int>(i % conv.filters);
    const double sum = exactly(conv, x.get(), weight.get(), i / conv.filters, filter) +
                       number(DType::float32, bias.get(), filter) + number(dtype, residual.get(), i);
    const double error = off_by(number(dtype, out.get(), i), std::fmax(sum, 0.0));
    if (!(error <= limit)) {
      std::printf("case %td, dtype %d, %d threads: output %lld is off by %g\n", &c - kCases, static_cast<int>(dtype),
                  threads, static_cast<long long>(i), error);
      return false;
    }
  }
  return true;
}

// Every element of `found` against the one that `exactly` says.
template <typename Exactly>
bool all_right(const char* what, const Case& c, const float* found, int64_t count, double limit,
               const Exactly& exactly_at) {
  for (int64_t i = 0; i < count; ++i) {
    const double error = off_by(found[i], exactly_at(i));
    if (!(error <= limit)) {
      std::printf("case %td, %s: element %lld is off by %g\n", &c - kCases, what, static_cast<long long>(i), error);
      return false;
    }
  }
  return true;
}

// A convolution of relu((x - mean) * scale + bias), and both its gradients, on memory of exactly their size.
bool trains_rightly(const Case& c, int threads) {
  const CpuConv conv = conv_of(c, DType::float32, threads);
  if (c.method == kGrouped || c.groups != 1 || !conv_kernels().takes(conv, c.method)) return true;
  std::mt19937 generator(8);
  const int64_t inputs = conv.images * conv.height * conv.width * conv.channels;
  const int64_t outputs = conv.pixels() * conv.filters;
  const int64_t row = int64_t{conv.kernel_width} * conv.channels, weights = conv.filters * conv.kernel_height * row;
  const auto floats = [&](int64_t count) { return random_numbers(DType::float32, count, generator); };
  const auto of = [](const auto& memory) { return static_cast<float*>(memory.get()); };
  const auto x = floats(inputs), weight = floats(weights), grad_out = floats(outputs), residual = floats(inputs);
  const auto mean = floats(conv.channels), scale = floats(conv.channels), bias = floats(conv.channels);
  put_infinity(DType::float32, x.get());
  const auto out = floats(outputs), grad_input = floats(inputs), grad_weight = floats(weights);
  const ConvWeight where{weight.get(), conv.kernel_height * row, row, conv.channels, 1};
  const ConvInput input{x.get(), of(mean), of(scale), of(bias)};

  const auto activation = floats(inputs);
  for (int64_t i = 0; i < inputs; ++i) {
    const int64_t channel = i % conv.channels;
    of(activation)[i] = std::fmax((of(x)[i] - of(mean)[channel]) * of(scale)[channel] + of(bias)[channel], 0.0f);
  }
  std::vector<double> exact_input(of(residual), of(residual) + inputs), exact_weight(weights);
  for (int64_t pixel = 0; pixel < conv.pixels(); ++pixel) {
    const int64_t image = pixel / (conv.out_height * conv.out_width);
    const int top =
        static_cast<int>(pixel / conv.out_width % conv.out_height) * conv.stride_height - conv.padding_height;
    const int left = static_cast<int>(pixel % conv.out_width) * conv.stride_width - conv.padding_width;
    for (int i = 0; i < conv.kernel_height; ++i) {
      for (int j = 0; j < conv.kernel_width; ++j) {
        const int y = top + i * conv.dilation_height, z = left + j * conv.dilation_width;
        if (y < 0 || z < 0 || y >= conv.height || z >= conv.width) continue;
        const int64_t at = ((image * conv.height + y) * conv.width + z) * conv.channels;
        for (int filter = 0; filter < conv.filters; ++filter) {
          const double gradient = of(grad_out)[pixel * conv.filters + filter];
          const int64_t place = (int64_t{filter} * conv.kernel_height + i) * row + int64_t{j} * conv.channels;
          for (int channel = 0; channel < conv.channels; ++channel) {
            exact_input[at + channel] += gradient * of(weight)[place + channel];
            exact_weight[place + channel] += gradient * of(activation)[at + channel];
          }
        }
      }
    }
  }
  const double terms = double(row) * conv.kernel_height;
  conv_forward(conv, c.method, input, where, out.get());
  bool right = all_right("forward", c, of(out), outputs, 8e-6 * terms, [&](int64_t i) {
    return exactly(conv, activation.get(), weight.get(), i / conv.filters, static_cast<int>(i % conv.filters));
  });
  conv_kernels().grad_weight(conv, c.method, input, grad_out.get(), of(grad_weight));
  right &= all_right("weight", c, of(grad_weight), weights, 8e-6 * conv.pixels(),
                     [&](int64_t i) { return exact_weight[i]; });
  if (!grad_input_takes(conv) || !conv_kernels().takes(grad_input_conv(conv), c.method)) return right;
  conv_grad_input(conv, c.method, grad_out.get(), where, residual.get(), grad_input.get());
  return right & all_right("input", c, of(grad_input), inputs,
                           8e-6 * conv.filters * conv.kernel_height * conv.kernel_width,
                           [&](int64_t i) { return exact_input[i]; });
}

}  // namespace

// On threads that have no memory of a kernel's yet: one that needs some and gets none throws, and runs when there is
// some again. Adds to `thrown`.
bool outlives_an_empty_memory(const Case& c, int threads, int& thrown) {
  bool right = false;
  std::thread([&] {
    memory_is_out = true;
    try {
      is_right(c, DType::float32, threads);
    } catch (const std::bad_alloc&) {
      ++thrown;
    }
    memory_is_out = false;
    right = is_right(c, DType::float32, threads);
  }).join();
  return right;
}

int main() {
  int wrong = 0, all = 0, thrown = 0;
  for (const Case& c : kCases) {
    for (const int threads : {1, 3}) {
      wrong += !outlives_an_empty_memory(c, threads, thrown);
      ++all;
    }
  }
  if (2 * thrown < all) {
    std::printf("memory ran out, and only %d of %d threw\n", thrown, all);
    ++wrong;
  }
  for (const Case& c : kCases) {
    for (const DType dtype : {DType::float32, DType::bfloat16}) {
      for (const int threads : {1, 3}) {
        wrong += !is_right(c, dtype, threads);
        ++all;
      }
    }
  }
  for (const Case& c : kCases) {
    for (const int threads : {1, 3}) {
      wrong += !trains_rightly(c, threads);
      ++all;
    }
  }
  std::printf("%d of %d wrong\n", wrong, all);
  return wrong;
}
