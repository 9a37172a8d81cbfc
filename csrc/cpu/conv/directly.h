// Outputs of a 3x3 convolution of stride 1, and gradients of its weights, as the sums that define them, a few at a
// time: where Winograd's method came to something that is not finite. It multiplies sums of inputs, so that one
// infinite input makes NaN of what it should not reach, and those near the largest float32 overflow before the products
// do.
#pragma once

#include "methods.h"

namespace fused_resnet {
namespace CPU_CAPABILITY {

using Wide = double __attribute__((vector_size(kVectorLanes * sizeof(double))));

// Whether every lane is a number, where `lanes` is the sum of such lanes times 0.
inline bool all_zero(Vector lanes) {
#if defined(__AVX512F__)
  const auto values = reinterpret_cast<__m512>(lanes);
  return _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q) == 0;
#elif defined(__AVX2__)
  const auto values = reinterpret_cast<__m256>(lanes);
  return _mm256_movemask_ps(_mm256_cmp_ps(values, values, _CMP_UNORD_Q)) == 0;
#else
  for (int lane = 0; lane < kVectorLanes; ++lane) {
    if (lanes[lane] != lanes[lane]) return false;
  }
  return true;
#endif
}

// Of one place of the kernel kVectorLanes channels from c on: to[i] holds `lanes` filters of channel c + i.
template <typename Element>
void load_weights(const ConvWeight& weight, int64_t filter, int lanes, int row, int column, int64_t c,
                  Vector (&to)[kVectorLanes]) {
  const auto* const from = static_cast<const typename Element::Storage*>(weight.data);
  if (lanes == kVectorLanes && weight.filter == 1) {
    for (int i = 0; i < kVectorLanes; ++i) to[i] = Element::load(from + weight.at(filter, row, column, c + i));
  } else if (lanes == kVectorLanes && weight.channel == 1) {
    for (int i = 0; i < kVectorLanes; ++i) to[i] = Element::load(from + weight.at(filter + i, row, column, c));
    transpose(to);
  } else {
    for (int i = 0; i < kVectorLanes; ++i) {
      float some[kVectorLanes] = {};
      for (int lane = 0; lane < lanes; ++lane) {
        some[lane] = Element::widen(from[weight.at(filter + lane, row, column, c + i)]);
      }
      to[i] = load_vector(some);
    }
  }
}

// What is convolved at a place of an image; false where that is padding.
template <typename Element>
bool load_input(const CpuConv& conv, const ConvInput& input, int64_t image, int row, int column, int64_t c,
                Vector& to) {
  if (row < 0 || column < 0 || row >= conv.height || column >= conv.width) return false;
  const auto* const x = static_cast<const typename Element::Storage*>(input.x) +
                        ((image * conv.height + row) * conv.width + column) * conv.channels + c;
  to = input.mean == nullptr ? Element::load(x) : normalised<Element>(input, x, c, kVectorLanes);
  return true;
}

// `lanes` filters of `count` outputs side by side.
template <typename Element, int count>
[[gnu::noinline, gnu::cold]] void convolve_directly(const CpuConv& conv, const ConvInput& input,
                                                    const ConvWeight& weight, int64_t image, int row, int column,
                                                    int64_t filter, int lanes, Vector (&to)[count]) {
  for (Vector& sum : to) sum = Vector{};
  for (int i = 0; i < 3; ++i) {
    for (int j = 0; j < 3; ++j) {
      for (int64_t c = 0; c < conv.channels; c += kVectorLanes) {
        Vector weights[kVectorLanes], x;
        load_weights<Element>(weight, filter, lanes, i, j, c, weights);
        for (int out = 0; out < count; ++out) {
          const int top = row + i - conv.padding_height, left = column + out + j - conv.padding_width;
          if (!load_input<Element>(conv, input, image, top, left, c, x)) continue;
          for (int k = 0; k < kVectorLanes; ++k) to[out] += x[k] * weights[k];
        }
      }
    }
  }
}

// The gradients of kVectorLanes channels of a filter from c on, one sum for all pixels: in float64.
[[gnu::noinline, gnu::cold]] inline void grad_weight_directly(const CpuConv& conv, const ConvInput& input,
                                                              const float* grad_out, int64_t filter, int64_t c,
                                                              Vector (&to)[3][3]) {
  Wide sums[3][3] = {};
  const float* grad = grad_out + filter;
  for (int64_t image = 0; image < conv.images; ++image) {
    for (int row = 0; row < conv.out_height; ++row) {
      for (int column = 0; column < conv.out_width; ++column, grad += conv.filters) {
        for (int i = 0; i < 3; ++i) {
          for (int j = 0; j < 3; ++j) {
            Vector x;
            const int top = row + i - conv.padding_height, left = column + j - conv.padding_width;
            if (load_input<Single>(conv, input, image, top, left, c, x)) {
              sums[i][j] += double{*grad} * __builtin_convertvector(x, Wide);
            }
          }
        }
      }
    }
  }
  for (int i = 0; i < 3; ++i) {
    for (int j = 0; j < 3; ++j) to[i][j] = __builtin_convertvector(sums[i][j], Vector);
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace fused_resnet
