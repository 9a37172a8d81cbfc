// The methods by name and dtype, and the pooling behind a stem. Compiled once per CPU_CAPABILITY (see setup.py).
#include "conv.h"

#include <algorithm>
#include <limits>

#include "methods.h"

namespace fused_resnet {
namespace CPU_CAPABILITY {
namespace {

// Calls run(Element{}) with what this build has for the dtype; false if it has nothing.
template <typename Run>
bool with_element(DType dtype, const Run& run) {
  if (dtype == DType::float32) {
    run(Single{});
    return true;
  }
#if defined(__AVX512BF16__)
  if (dtype == DType::bfloat16) {
    run(Brain{});
    return true;
  }
#endif
  return false;
}

// As torch.max_pool2d: a NaN wins.
inline Vector max_of(Vector a, Vector b) { return ((a > b) | (a != a)) ? a : b; }

template <typename Element>
void pool_row(const CpuConv& pool, const typename Element::Storage* x, int64_t row, typename Element::Storage* out) {
  const int top = static_cast<int>(row % pool.out_height) * pool.stride_height - pool.padding_height;
  const int64_t image = row / pool.out_height;
  for (int column = 0; column < pool.out_width; ++column) {
    const int left = column * pool.stride_width - pool.padding_width;
    for (int c = 0; c < pool.channels; c += kVectorLanes) {
      const int lanes = std::min(kVectorLanes, pool.channels - c);
      Vector highest = broadcast(-std::numeric_limits<float>::infinity());
      for (int y = std::max(top, 0); y < std::min(top + pool.kernel_height, pool.height); ++y) {
        for (int z = std::max(left, 0); z < std::min(left + pool.kernel_width, pool.width); ++z) {
          const auto* const from = x + ((image * pool.height + y) * pool.width + z) * pool.channels + c;
          highest = max_of(lanes == kVectorLanes ? Element::load(from) : load_some<Element>(from, lanes), highest);
        }
      }
      auto* const to = out + (row * pool.out_width + column) * pool.channels + c;
      if (lanes == kVectorLanes) {
        Element::store(to, highest);
      } else {
        store_some<Element>(to, highest, lanes);
      }
    }
  }
}

}  // namespace

bool conv_takes(const CpuConv& conv, ConvMethod method) {
  if (!with_element(conv.dtype, [](auto) {})) return false;
  switch (method) {
    case ConvMethod::gemm:
      return true;
    case ConvMethod::winograd:
      return winograd_takes(conv);
    case ConvMethod::grouped:
      return grouped_takes(conv);
  }
  return false;
}

int64_t conv_packed_bytes(const CpuConv& conv, ConvMethod method) {
  int64_t words = 0;
  with_element(conv.dtype, [&](auto element) {
    using Element = decltype(element);
    words = method == ConvMethod::gemm       ? gemm_packed_words<Element>(conv)
            : method == ConvMethod::winograd ? winograd_packed_words<Element>(conv)
                                             : grouped_packed_words<Element>(conv);
  });
  return words * static_cast<int64_t>(sizeof(float));
}

void conv_pack(const CpuConv& conv, ConvMethod method, const ConvWeight& weight, void* packed) {
  with_element(conv.dtype, [&](auto element) {
    using Element = decltype(element);
    auto* const to = static_cast<float*>(packed);
    if (method == ConvMethod::gemm) return gemm_pack<Element>(conv, weight, to);
    if (method == ConvMethod::grouped) return grouped_pack<Element>(conv, weight, to);
    winograd_pack<Element>(conv, weight, to);
  });
}

void conv_run(const CpuConv& conv, ConvMethod method, const ConvInput& input, const ConvWeight& weight,
              const void* packed, const ConvEpilogue& epilogue) {
  with_element(conv.dtype, [&](auto element) {
    using Element = decltype(element);
    const auto* const weights = static_cast<const float*>(packed);
    if (method == ConvMethod::gemm) return gemm_run<Element>(conv, input, weights, epilogue);
    if (method == ConvMethod::winograd) return winograd_run<Element>(conv, input, weight, weights, epilogue);
    grouped_run<Element>(conv, static_cast<const typename Element::Storage*>(input.x), weights, epilogue);
  });
}

void conv_grad_weight(const CpuConv& conv, ConvMethod method, const ConvInput& input, const void* grad_out,
                      float* grad_weight) {
  const auto* const from = static_cast<const float*>(grad_out);
  if (method == ConvMethod::winograd) return winograd_grad_weight(conv, input, from, grad_weight);
  gemm_grad_weight(conv, input, from, grad_weight);
}

void scatter(const CpuConv& conv, const Lattice& lattice, const float* from, const float* residual, float* to) {
  const int64_t channels = conv.channels;
  in_parallel(conv.threads, [&](int part, int parts) {
    const Share lines = share(conv.images * lattice.rows, part, parts);
    for (int64_t line = lines.begin; line < lines.end; ++line) {
      const int64_t row = lattice.first_row + line % lattice.rows * conv.stride_height;
      const int64_t first = (line / lattice.rows * conv.height + row) * conv.width + lattice.first_column;
      for (int64_t i = 0; i < lattice.columns; ++i) {
        const int64_t place = (first + i * conv.stride_width) * channels;
        const int64_t source = (line * lattice.columns + i) * channels;
        if (from != nullptr && residual != nullptr) {
#pragma GCC ivdep
          for (int64_t c = 0; c < channels; ++c) to[place + c] = from[source + c] + residual[place + c];
        } else if (from != nullptr || residual != nullptr) {
          std::copy_n(from != nullptr ? from + source : residual + place, channels, to + place);
        } else {
          std::fill_n(to + place, channels, 0.0f);
        }
      }
    }
  });
}

void max_pool(const CpuConv& pool, const void* x, void* out) {
  with_element(pool.dtype, [&](auto element) {
    using Element = decltype(element);
    using Storage = typename Element::Storage;
    in_parallel(pool.threads, [&](int part, int parts) {
      const Share rows = share(pool.images * pool.out_height, part, parts);
      for (int64_t row = rows.begin; row < rows.end; ++row) {
        pool_row<Element>(pool, static_cast<const Storage*>(x), row, static_cast<Storage*>(out));
      }
    });
  });
}

void average(const CpuConv& images, const void* x, void* out) {
  with_element(images.dtype, [&](auto element) {
    using Element = decltype(element);
    using Storage = typename Element::Storage;
    const int channels = images.channels;
    const int64_t pixels = int64_t{images.height} * images.width;
    in_parallel(images.threads, [&](int part, int parts) {
      thread_local Scratch scratch;
      float* const sums = scratch.words(channels + kVectorLanes);
      const Share mine = share(images.images, part, parts);
      for (int64_t image = mine.begin; image < mine.end; ++image) {
        const Storage* from = static_cast<const Storage*>(x) + image * pixels * channels;
        std::fill_n(sums, channels + kVectorLanes, 0.0f);
        for (int64_t pixel = 0; pixel < pixels; ++pixel, from += channels) {  // along memory: its rows lie pages apart
          int c = 0;
          for (; c + kVectorLanes <= channels; c += kVectorLanes) {
            store_vector(sums + c, load_vector(sums + c) + Element::load(from + c));
          }
          if (c < channels) {
            store_vector(sums + c, load_vector(sums + c) + load_some<Element>(from + c, channels - c));
          }
        }
        Storage* const to = static_cast<Storage*>(out) + image * channels;
        for (int c = 0; c < channels; c += kVectorLanes) {
          store_some<Element>(to + c, load_vector(sums + c) / static_cast<float>(pixels),
                              std::min(kVectorLanes, channels - c));
        }
      }
    });
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace fused_resnet
