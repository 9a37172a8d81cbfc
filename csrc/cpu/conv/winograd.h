// F(2x2, 3x3) and F(4x4, 3x3): the minimal filtering of Lavin and Gray, "Fast Algorithms for Convolutional Neural
// Networks" (2015). A window of 4x4 (6x6) inputs becomes 16 (36) numbers by additions and small factors, so does (once)
// a 3x3 kernel; the products of the two, summed over the channels, are as many matrix products, and give 2x2 (4x4)
// outputs by additions again. All of it in float32, also where activations are bfloat16.
//
// The smaller one is no less exact than adding 9 products for each channel: its sums are shorter. The larger one loses
// up to four bits, which float32 has to spare where the outputs are rounded to the 8 bits of bfloat16.
#pragma once

#include "methods.h"

namespace fused_resnet {
namespace CPU_CAPABILITY {

// One dimension of F(step x step, 3x3): the matrices that the paper calls B^T, A^T and G.
template <int step>
struct Filtering;

template <>
struct Filtering<2> {
  static void inputs(const Vector (&d)[4], Vector (&to)[4]) {
    to[0] = d[0] - d[2];
    to[1] = d[1] + d[2];
    to[2] = d[2] - d[1];
    to[3] = d[1] - d[3];
  }
  static void outputs(const Vector (&m)[4], Vector (&to)[2]) {
    to[0] = m[0] + m[1] + m[2];
    to[1] = m[1] - m[2] - m[3];
  }
  template <typename T>
  static void kernel(const T (&g)[3], T (&to)[4]) {
    to[0] = g[0];
    to[1] = (g[0] + g[1] + g[2]) / 2;
    to[2] = (g[0] - g[1] + g[2]) / 2;
    to[3] = g[2];
  }
  // The transposed of `outputs` and of `kernel`: the way that gradients go.
  static void grad_outputs(const Vector (&y)[2], Vector (&to)[4]) {
    to[0] = y[0];
    to[1] = y[0] + y[1];
    to[2] = y[0] - y[1];
    to[3] = -y[1];
  }
  static void grad_kernel(const Vector (&m)[4], Vector (&to)[3]) {
    const Vector half = 0.5f * (m[1] + m[2]);
    to[0] = m[0] + half;
    to[1] = 0.5f * (m[1] - m[2]);
    to[2] = half + m[3];
  }
};

template <>
struct Filtering<4> {
  static void inputs(const Vector (&d)[6], Vector (&to)[6]) {
    const Vector even = d[4] - 4.0f * d[2], odd = d[3] - 4.0f * d[1];
    const Vector even2 = d[4] - d[2], odd2 = 2.0f * (d[3] - d[1]);
    to[0] = 4.0f * d[0] - 5.0f * d[2] + d[4];
    to[1] = even + odd;
    to[2] = even - odd;
    to[3] = even2 + odd2;
    to[4] = even2 - odd2;
    to[5] = 4.0f * d[1] - 5.0f * d[3] + d[5];
  }
  static void outputs(const Vector (&m)[6], Vector (&to)[4]) {
    const Vector sum = m[1] + m[2], difference = m[1] - m[2];
    const Vector sum2 = m[3] + m[4], difference2 = m[3] - m[4];
    to[0] = m[0] + sum + sum2;
    to[1] = difference + 2.0f * difference2;
    to[2] = sum + 4.0f * sum2;
    to[3] = difference + 8.0f * difference2 + m[5];
  }
  template <typename T>
  static void kernel(const T (&g)[3], T (&to)[6]) {
    to[0] = g[0] / 4;
    to[1] = -(g[0] + g[1] + g[2]) / 6;
    to[2] = -(g[0] - g[1] + g[2]) / 6;
    to[3] = (g[0] + 2 * g[1] + 4 * g[2]) / 24;
    to[4] = (g[0] - 2 * g[1] + 4 * g[2]) / 24;
    to[5] = g[2];
  }
};

// Where windows lie: step by step over an image, the last ones reaching beyond it.
template <int step>
struct Windows {
  int64_t across, of_image, count;
  explicit Windows(const CpuConv& conv)
      : across(divided_up(conv.out_width, step)),
        of_image(across * divided_up(conv.out_height, step)),
        count(of_image * conv.images) {}
};

// Where a window of inputs lies, and which of them are inside the image: a bit for each.
struct WindowPlace {
  int64_t corner;  // of the first element; it may lie beyond the image
  uint64_t inside;
};

template <int step>
WindowPlace place_of(const CpuConv& conv, const Windows<step>& windows, int64_t window) {
  constexpr int kWindow = step + 2;
  const int64_t image = window / windows.of_image, place = window % windows.of_image;
  const int top = static_cast<int>(place / windows.across) * step - conv.padding_height;
  const int left = static_cast<int>(place % windows.across) * step - conv.padding_width;
  const int64_t corner = ((image * conv.height + top) * conv.width + left) * conv.channels;
  uint64_t inside = 0;
  for (int i = 0; i < kWindow; ++i) {
    for (int j = 0; j < kWindow; ++j) {
      const bool is_inside = static_cast<unsigned>(top + i) < static_cast<unsigned>(conv.height) &&
                             static_cast<unsigned>(left + j) < static_cast<unsigned>(conv.width);
      inside |= uint64_t{is_inside} << (i * kWindow + j);
    }
  }
  return {corner, inside};
}

// The inputs of windows, transformed.
template <typename Element, int step>
class WindowInputs {
 public:
  using Storage = typename Element::Storage;
  static constexpr int kWindow = step + 2;  // inputs on a side
  static constexpr uint64_t kAll = (uint64_t{1} << (kWindow * kWindow)) - 1;

  WindowInputs(const CpuConv& conv, const ConvInput& input)
      : input_(input), pixel_(conv.channels), row_(int64_t{conv.width} * conv.channels) {}

  // Calls store(i, j, value) with the products' factors of kVectorLanes channels from c on.
  template <typename Store>
  void transform(const WindowPlace& place, int64_t c, const Store& store) const {
    if (input_.mean != nullptr) {
      transform_any<true, false>(place, c, store);
    } else if (place.inside == kAll) {
      transform_any<false, true>(place, c, store);
    } else {
      transform_any<false, false>(place, c, store);
    }
  }

 private:
  template <bool normalise, bool all_inside, typename Store>
  void transform_any(const WindowPlace& place, int64_t c, const Store& store) const {
    const auto* const x = static_cast<const Storage*>(input_.x);
    Vector half[kWindow][kWindow];
#pragma GCC unroll 6
    for (int j = 0; j < kWindow; ++j) {
      Vector column[kWindow], down[kWindow];
#pragma GCC unroll 6
      for (int i = 0; i < kWindow; ++i) {
        const int64_t element = place.corner + i * row_ + j * pixel_ + c;
        if (!all_inside && (place.inside >> (i * kWindow + j) & 1) == 0) {
          column[i] = Vector{};
        } else if constexpr (normalise) {
          column[i] = normalised<Element>(input_, x + element, c, kVectorLanes);
        } else {
          column[i] = Element::load(x + element);
        }
      }
      Filtering<step>::inputs(column, down);
#pragma GCC unroll 6
      for (int i = 0; i < kWindow; ++i) half[i][j] = down[i];
    }
#pragma GCC unroll 6
    for (int i = 0; i < kWindow; ++i) {
      Vector whole[kWindow];
      Filtering<step>::inputs(half[i], whole);
#pragma GCC unroll 6
      for (int j = 0; j < kWindow; ++j) store(i, j, whole[j]);
    }
  }

  const ConvInput& input_;
  int64_t pixel_, row_;  // elements
};

}  // namespace CPU_CAPABILITY
}  // namespace fused_resnet
