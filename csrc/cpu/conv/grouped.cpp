// 3x3 convolutions in groups, as ResNeXt has them. Of few channels a group, a vector holds the outputs of several
// groups, of one, or of a part of one; what each lane needs of an input pixel is one channel of its own group, spread
// over the group's lanes. An input that was spread is used for the outputs of all three kernel columns, and so most
// instructions are products.
#include <algorithm>

#include "methods.h"

namespace fused_resnet {
namespace CPU_CAPABILITY {
namespace {

#if defined(__AVX2__)
constexpr bool kHasGrouped = true;
#if defined(__AVX512F__)
constexpr int kWidest = 14;  // outputs in registers, beside three weights
#else
constexpr int kWidest = 7;
#endif

// Of a pixel's inputs, those of the groups whose outputs a vector holds: word `first` of each group, in every lane of
// the group; a word is a channel in float32, two in bfloat16. A group of as many lanes as a vector has it to itself.
template <typename Element, int group, bool shares_vector = (group < kVectorLanes)>
struct Spread {
  static constexpr int kPixelWords = group / Element::kPerWord;
  int first;
  explicit Spread(int first) : first(first) {}
  Vector operator()(const float* pixel) const { return broadcast(pixel[first]); }
};
#if defined(__AVX512F__)
template <typename Element, int group>
struct Spread<Element, group, true> {
  static constexpr int kPixelWords = kVectorLanes / Element::kPerWord;
  __m512i lanes;
  explicit Spread(int first) {
    alignas(64) int lane[kVectorLanes];
    for (int i = 0; i < kVectorLanes; ++i) lane[i] = i / group * (group / Element::kPerWord) + first;
    lanes = _mm512_load_si512(lane);
  }
  Vector operator()(const float* pixel) const {
    const __m512 words =
        kPixelWords == kVectorLanes ? _mm512_loadu_ps(pixel) : _mm512_castps256_ps512(_mm256_loadu_ps(pixel));
    return reinterpret_cast<Vector>(_mm512_permutexvar_ps(lanes, words));
  }
};
#else
template <>
struct Spread<Single, 4, true> {  // a half of the vector each, within which one word is spread
  static constexpr int kPixelWords = kVectorLanes;
  __m256i lanes;
  explicit Spread(int first) : lanes(_mm256_set1_epi32(first)) {}
  Vector operator()(const float* pixel) const {
    return reinterpret_cast<Vector>(_mm256_permutevar_ps(_mm256_loadu_ps(pixel), lanes));
  }
};
#endif

// `width` outputs side by side from the rows of inputs below `pixels`, of which one is `row_words` long.
template <typename Element, int group, int stride, int width>
void outputs_of_row(const float* pixels, int64_t row_words, const float* weight, Vector (&sum)[kWidest]) {
  Vector total[width];  // not `sum` itself, which would stay in memory
#pragma GCC unroll 14
  for (int i = 0; i < width; ++i) total[i] = Vector{};
  for (int row = 0; row < 3; ++row, pixels += row_words) {
    for (int word = 0; word < group / Element::kPerWord; ++word, weight += 3 * kVectorLanes) {
      const Vector weights[3] = {load_vector(weight), load_vector(weight + kVectorLanes),
                                 load_vector(weight + 2 * kVectorLanes)};
      const Spread<Element, group> spread(word);
#pragma GCC unroll 29
      for (int pixel = 0; pixel < (width - 1) * stride + 3; ++pixel) {
        const Vector input = spread(pixels + pixel * spread.kPixelWords);
#pragma GCC unroll 3
        for (int column = 0; column < 3; ++column) {
          const int output = (pixel - column) / stride;
          if (pixel >= column && (pixel - column) % stride == 0 && output < width) {
            total[output] = Element::multiply_add(total[output], input, weights[column]);
          }
        }
      }
    }
  }
#pragma GCC unroll 14
  for (int i = 0; i < width; ++i) sum[i] = total[i];
}

// Some channels of an image with zeros around it, as far as a 3x3 kernel reaches. Words, of each pixel: an integer, or
// a std::integral_constant, so that short copies are no calls.
template <typename Words>
class PaddedCopy {
 public:
  PaddedCopy(const CpuConv& conv, Words pixel_words)
      : conv_(conv),
        pixel_words_(pixel_words),
        rows_(std::max((conv.out_height - 1) * conv.stride_height + 3, conv.height + conv.padding_height)),
        row_words_(int64_t{std::max((conv.out_width - 1) * conv.stride_width + 3, conv.width + conv.padding_width)} *
                   pixel_words) {}

  int64_t words() const { return rows_ * row_words_; }
  int64_t row_words() const { return row_words_; }

  // From `channel` on.
  template <typename Storage>
  void make(const Storage* x, int64_t image, int64_t channel, float* to) const {
    const int64_t left = int64_t{conv_.padding_width} * pixel_words_;
    const int64_t right = left + int64_t{conv_.width} * pixel_words_;
    for (int row = 0; row < rows_; ++row, to += row_words_) {
      const int y = row - conv_.padding_height;
      if (y < 0 || y >= conv_.height) {
        std::fill_n(to, row_words_, 0.0f);
        continue;
      }
      const Storage* from = x + (image * conv_.height + y) * conv_.width * conv_.channels + channel;
      std::fill_n(to, left, 0.0f);
      for (int64_t word = left; word < right; word += pixel_words_, from += conv_.channels) {
        std::memcpy(to + word, from, pixel_words_ * sizeof(float));
      }
      std::fill_n(to + right, row_words_ - right, 0.0f);
    }
  }

 private:
  const CpuConv& conv_;
  Words pixel_words_;
  int64_t rows_, row_words_;
};

template <typename Element, int group, int stride>
class GroupedPart {
 public:
  using Storage = typename Element::Storage;

  GroupedPart(const CpuConv& conv, const Storage* x, const float* packed, const ConvEpilogue& epilogue)
      : conv_(conv), x_(x), packed_(packed), epilogue_(epilogue), copy_(conv, {}) {}

  static constexpr int kPixelWords = Spread<Element, group>::kPixelWords;

  // All outputs of one image in one vector of filters.
  void run(int64_t image, int slice) const {
    thread_local Scratch scratch;
    float* const padded = scratch.words(copy_.words());
    copy_.make(x_, image, slice * kVectorLanes / group * group, padded);
    const float* const weight = packed_ + int64_t{slice} * 9 * (group / Element::kPerWord) * kVectorLanes;
    const Vector bias = load_vector(epilogue_.bias + slice * kVectorLanes);
    for (int row = 0; row < conv_.out_height; ++row) {
      const float* const from = padded + row * stride * copy_.row_words();
      int column = 0;
      const auto finish = [&](auto width) {
        constexpr int kWidth = decltype(width)::value;
        Vector sum[kWidest];
        outputs_of_row<Element, group, stride, kWidth>(from + column * stride * kPixelWords, copy_.row_words(), weight,
                                                       sum);
        for (int i = 0; i < kWidth; ++i) write(image, row, column + i, slice, sum[i] + bias);
        column += kWidth;
      };
      if constexpr (kWidest >= 14) {
        while (conv_.out_width - column >= 14) finish(std::integral_constant<int, 14>{});
      }
      while (conv_.out_width - column >= 7) finish(std::integral_constant<int, 7>{});
      while (conv_.out_width - column >= 3) finish(std::integral_constant<int, 3>{});
      while (conv_.out_width - column >= 1) finish(std::integral_constant<int, 1>{});
    }
  }

 private:
  void write(int64_t image, int row, int column, int slice, Vector value) const {
    const int64_t pixel = (image * conv_.out_height + row) * conv_.out_width + column;
    const int64_t offset = pixel * conv_.filters + slice * kVectorLanes;
    if (epilogue_.residual != nullptr) value += Element::load(static_cast<const Storage*>(epilogue_.residual) + offset);
    Element::store(static_cast<Storage*>(epilogue_.out) + offset, epilogue_.relu ? relu_of(value) : value);
  }

  const CpuConv& conv_;
  const Storage* x_;
  const float* packed_;
  const ConvEpilogue& epilogue_;
  PaddedCopy<std::integral_constant<int, kPixelWords>> copy_;
};

template <typename Element, int group, int stride>
void run_all(const CpuConv& conv, const typename Element::Storage* x, const float* packed,
             const ConvEpilogue& epilogue) {
  const GroupedPart<Element, group, stride> work(conv, x, packed, epilogue);
  const int slices = conv.channels / kVectorLanes;
  in_parallel_over(int64_t{conv.images} * slices, conv.threads,
                   [&](int64_t part) { work.run(part / slices, static_cast<int>(part % slices)); });
}

#if !defined(__AVX512F__)
// Groups at least as wide as a panel of filters, multiplied in tiles as conv_gemm.cpp does; but the inputs of a group
// are copied once, with their padding, and not once for each place of the kernel, which would take a fifth of the time.
constexpr int kNarrowestPanel = kTileColumns;  // channels and filters of such a group

template <int rows>
void multiply_pixels(const float* const* pixels, int64_t row_words, const Tile<Single>& tile) {
  Vector sum[rows][kTileVectors];
#pragma GCC unroll 6
  for (int row = 0; row < rows; ++row) sum[row][0] = sum[row][1] = Vector{};
  prefetch_outputs<Single, rows>(tile);
  const float* at[rows];
#pragma GCC unroll 6
  for (int row = 0; row < rows; ++row) at[row] = pixels[row];
  const float* b = tile.b;
  Ahead weights_ahead = tile.weights_ahead;
  for (int kernel_row = 0; kernel_row < 3; ++kernel_row, b += tile.depth * kTileColumns) {
    const auto inputs = [&at](int row, int64_t k) __attribute__((always_inline)) { return at[row][k]; };
    add_products<Single, false>(sum, inputs, b, tile.depth, weights_ahead, tile.inputs_ahead);
    weights_ahead.from += tile.depth * weights_ahead.step;
#pragma GCC unroll 6
    for (int row = 0; row < rows; ++row) at[row] += row_words;
  }
  finish_tile<Single, rows>(tile, sum);
}

class WideGroupPart {
 public:
  WideGroupPart(const CpuConv& conv, const float* x, const float* packed, const ConvEpilogue& epilogue)
      : conv_(conv),
        x_(x),
        packed_(packed),
        epilogue_(epilogue),
        pixel_words_(conv.group_channels()),
        copy_(conv, pixel_words_) {}

  // All outputs of one image in one group.
  void run(int64_t image, int group) const {
    thread_local Scratch scratch;
    float* const padded = scratch.words(copy_.words());
    copy_.make(x_, image, group * pixel_words_, padded);
    const int pixels = conv_.out_height * conv_.out_width, filters = conv_.group_filters();
    const int64_t tiles = divided_up(pixels, kTileRows), panels = divided_up(filters, kTileColumns);
    Tile<Single> work{};
    work.depth = 3 * pixel_words_;
    work.relu = epilogue_.relu;
    work.out_stride = conv_.filters;
    for (int64_t panel = 0; panel < panels; ++panel) {
      const int64_t filter = int64_t{group} * filters + panel * kTileColumns;
      float bias[kTileColumns] = {};
      work.filters = static_cast<int>(std::min<int64_t>(kTileColumns, filters - panel * kTileColumns));
      work.bias = bias;
      work.b = packed_ + (group * panels + panel) * 3 * work.depth * kTileColumns;
      const int64_t panel_words = 3 * work.depth;
      const auto* const next = reinterpret_cast<const char*>(work.b + panel_words * kTileColumns);
      const int64_t ahead_step = divided_up(kTileColumns * sizeof(float), tiles);
      work.inputs_ahead = {next, 0};
      std::copy_n(epilogue_.bias + filter, work.filters, bias);
      for (int64_t t = 0; t < tiles; ++t) {
        const Share tile = share(pixels, t, tiles);
        const int64_t first = (image * pixels + tile.begin) * conv_.filters + filter;
        work.out = static_cast<float*>(epilogue_.out) + first;
        work.residual = epilogue_.residual == nullptr ? nullptr : static_cast<const float*>(epilogue_.residual) + first;
        work.weights_ahead = {next + t * panel_words * ahead_step, ahead_step};
        multiply_tile(padded, tile, work);
      }
    }
  }

 private:
  void multiply_tile(const float* padded, Share tile, const Tile<Single>& work) const {
    const float* pixels[kTileRows];
    int row = static_cast<int>(tile.begin) / conv_.out_width, column = static_cast<int>(tile.begin) % conv_.out_width;
    for (int64_t i = 0; i < tile.end - tile.begin; ++i) {
      pixels[i] = padded + row * conv_.stride_height * copy_.row_words() + column * conv_.stride_width * pixel_words_;
      if (++column == conv_.out_width) {
        column = 0;
        ++row;
      }
    }
    using Function = void (*)(const float* const*, int64_t, const Tile<Single>&);
    static constexpr Function kFunctions[kTileRows] = {multiply_pixels<1>, multiply_pixels<2>, multiply_pixels<3>,
                                                       multiply_pixels<4>, multiply_pixels<5>, multiply_pixels<6>};
    kFunctions[tile.end - tile.begin - 1](pixels, copy_.row_words(), work);
  }

  const CpuConv& conv_;
  const float* x_;
  const float* packed_;
  const ConvEpilogue& epilogue_;
  int64_t pixel_words_;
  PaddedCopy<int64_t> copy_;
};

bool is_wide(const CpuConv& conv) {
  return conv.dtype == DType::float32 && conv.group_channels() >= kNarrowestPanel &&
         conv.group_filters() >= kNarrowestPanel;
}

void run_wide(const CpuConv& conv, const float* x, const float* packed, const ConvEpilogue& epilogue) {
  const WideGroupPart work(conv, x, packed, epilogue);
  in_parallel_over(int64_t{conv.images} * conv.groups, conv.threads,
                   [&](int64_t part) { work.run(part / conv.groups, static_cast<int>(part % conv.groups)); });
}
#else
bool is_wide(const CpuConv&) { return false; }
#endif

// Calls run(integral_constant group, integral_constant stride) with those of the convolution.
template <typename Run>
void with_group_and_stride(const CpuConv& conv, const Run& run) {
  const auto with_stride = [&](auto group) {
    if (conv.stride_width == 1) return run(group, std::integral_constant<int, 1>{});
    return run(group, std::integral_constant<int, 2>{});
  };
  switch (conv.group_channels()) {
    case 4:
      return with_stride(std::integral_constant<int, 4>{});
    case 8:
      return with_stride(std::integral_constant<int, 8>{});
    case 16:
      if constexpr (kVectorLanes == 16) return with_stride(std::integral_constant<int, 16>{});
  }
}
#else
constexpr bool kHasGrouped = false;
bool is_wide(const CpuConv&) { return false; }
#endif

bool is_shared(const CpuConv& conv) {
  const int group = conv.group_channels();
  return (group == 4 || group == 8 || group == 16) && conv.group_filters() == group &&
         conv.channels % kVectorLanes == 0;
}

}  // namespace

bool grouped_takes(const CpuConv& conv) {
  return kHasGrouped && conv.groups > 1 && (is_shared(conv) || is_wide(conv)) && conv.kernel_height == 3 &&
         conv.kernel_width == 3 && conv.dilation_height == 1 && conv.dilation_width == 1 &&
         conv.stride_height == conv.stride_width && (conv.stride_width == 1 || conv.stride_width == 2);
}

template <typename Element>
int64_t grouped_packed_words(const CpuConv& conv) {
  if (is_wide(conv)) return gemm_packed_words<Element>(conv);
  return int64_t{conv.filters} * 9 * (conv.group_channels() / Element::kPerWord);
}

template <typename Element>
void grouped_pack(const CpuConv& conv, const ConvWeight& weight, float* packed) {
  if (is_wide(conv)) return gemm_pack<Element>(conv, weight, packed);
  const int group = conv.group_channels();
  const auto* const from = static_cast<const typename Element::Storage*>(weight.data);
  auto* to = reinterpret_cast<typename Element::Storage*>(packed);
  for (int slice = 0; slice < conv.filters; slice += kVectorLanes) {
    for (int row = 0; row < 3; ++row) {
      for (int channel = 0; channel < group; channel += Element::kPerWord) {
        for (int column = 0; column < 3; ++column) {
          for (int filter = slice; filter < slice + kVectorLanes; ++filter) {
            for (int i = 0; i < Element::kPerWord; ++i) *to++ = from[weight.at(filter, row, column, channel + i)];
          }
        }
      }
    }
  }
}

template <typename Element>
void grouped_run(const CpuConv& conv, const typename Element::Storage* x, const float* packed,
                 const ConvEpilogue& epilogue) {
#if defined(__AVX2__)
#if !defined(__AVX512F__)
  if (is_wide(conv)) return run_wide(conv, x, packed, epilogue);
#endif
  with_group_and_stride(conv, [&](auto group, auto stride) {
    run_all<Element, decltype(group)::value, decltype(stride)::value>(conv, x, packed, epilogue);
  });
#else
  static_cast<void>(conv), static_cast<void>(x), static_cast<void>(packed), static_cast<void>(epilogue);
#endif
}

template int64_t grouped_packed_words<Single>(const CpuConv&);
template void grouped_pack<Single>(const CpuConv&, const ConvWeight&, float*);
template void grouped_run<Single>(const CpuConv&, const float*, const float*, const ConvEpilogue&);
#if defined(__AVX512BF16__)
template int64_t grouped_packed_words<Brain>(const CpuConv&);
template void grouped_pack<Brain>(const CpuConv&, const ConvWeight&, float*);
template void grouped_run<Brain>(const CpuConv&, const uint16_t*, const float*, const ConvEpilogue&);
#endif

}  // namespace CPU_CAPABILITY
}  // namespace fused_resnet
