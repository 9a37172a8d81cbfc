// F(2x2, 3x3) and F(4x4, 3x3): the minimal filtering of Lavin and Gray, "Fast Algorithms for Convolutional Neural
// Networks" (2015). A window of 4x4 (6x6) inputs becomes 16 (36) numbers by additions and small factors, so does (once)
// a 3x3 kernel; the products of the two, summed over the channels, are as many matrix products, and give 2x2 (4x4)
// outputs by additions again. All of it in float32, also where activations are bfloat16.
//
// The smaller one is no less exact than adding 9 products for each channel: its sums are shorter. The larger one loses
// up to four bits, which float32 has to spare where the outputs are rounded to the 8 bits of bfloat16.
#include <algorithm>

#include "conv_methods.h"

namespace fused_resnet {
namespace CPU_CAPABILITY {
namespace {

constexpr int64_t kBlockWords = 128 * 1024;  // of transformed inputs, half of the second cache
constexpr int64_t kLeastTiles = 2;           // of a block: then weights are used twice each time they are read
constexpr int64_t kMostTiles = 8;
constexpr int64_t kSmallTiles = 2;  // of a thread: with fewer, threads share the filters

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
  static void kernel(const double (&g)[3], double (&to)[4]) {
    to[0] = g[0];
    to[1] = (g[0] + g[1] + g[2]) / 2;
    to[2] = (g[0] - g[1] + g[2]) / 2;
    to[3] = g[2];
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
  static void kernel(const double (&g)[3], double (&to)[6]) {
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

template <typename Element>
constexpr int winograd_step = sizeof(typename Element::Storage) == 2 ? 4 : 2;

template <typename Element, int step>
class WinogradPart {
 public:
  using Storage = typename Element::Storage;
  static constexpr int kWindow = step + 2;             // inputs on a side
  static constexpr int kProducts = kWindow * kWindow;  // matrix products

  WinogradPart(const CpuConv& conv, const Storage* x, const float* packed, const ConvEpilogue& epilogue)
      : conv_(conv),
        x_(x),
        packed_(packed),
        epilogue_(epilogue),
        windows_(conv),
        chunks_(divided_up(conv.channels, kDepthWords)),
        tile_words_(kProducts * chunks_ * kTileRows * kRowWords),
        touched_words_(int64_t{kProducts} * kTileRows * conv.channels) {}

  // How many tiles of windows run() takes at a time: whose inputs stay in the second cache.
  int64_t block_tiles() const { return std::clamp<int64_t>(kBlockWords / touched_words_, kLeastTiles, kMostTiles); }

  // The outputs of these windows, of the filters of these panels.
  void run(Share windows, Share panels) const {
    const int64_t count = windows.end - windows.begin, tiles = divided_up(count, kTileRows);
    float* const inputs = scratch().words(tiles * (tile_words_ + kProducts * kTileSums) + conv_.channels);
    float* const sums = inputs + tiles * tile_words_;
    auto* const zeros = reinterpret_cast<Storage*>(sums + tiles * kProducts * kTileSums);  // pixels beyond the image
    std::fill_n(zeros, conv_.channels, Storage{0});
    for (int64_t t = 0; t < tiles; ++t) {
      const Share tile = share(count, t, tiles);
      for (int64_t w = tile.begin; w < tile.end; ++w) {
        transform_window(windows.begin + w, zeros, inputs + t * tile_words_ + (w - tile.begin) * kRowWords);
      }
    }
    for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
      multiply_tiles(panel, inputs, count, tiles, sums);
      for (int64_t t = 0; t < tiles; ++t) {
        const Share tile = share(count, t, tiles);
        for (int64_t row = 0; row < tile.end - tile.begin; ++row) {
          const int64_t window = windows.begin + tile.begin + row;
          finish_window(window, panel, sums + t * kProducts * kTileSums + row * kTileColumns);
        }
      }
    }
  }

 private:
  static Scratch& scratch() {
    thread_local Scratch scratch;
    return scratch;
  }

  void transform_window(int64_t window, const Storage* zeros, float* to) const {
    const int64_t image = window / windows_.of_image, place = window % windows_.of_image;
    const int top = static_cast<int>(place / windows_.across) * step - conv_.padding_height;
    const int left = static_cast<int>(place % windows_.across) * step - conv_.padding_width;
    const Storage* pixels[kWindow][kWindow];
    for (int i = 0; i < kWindow; ++i) {
      for (int j = 0; j < kWindow; ++j) {
        const bool inside = static_cast<unsigned>(top + i) < static_cast<unsigned>(conv_.height) &&
                            static_cast<unsigned>(left + j) < static_cast<unsigned>(conv_.width);
        const int64_t pixel = (image * conv_.height + top + i) * conv_.width + left + j;
        pixels[i][j] = inside ? x_ + pixel * conv_.channels : zeros;
      }
    }
    for (int c = 0; c < conv_.channels; c += kVectorLanes) {
      Vector half[kWindow][kWindow];
#pragma GCC unroll 6
      for (int j = 0; j < kWindow; ++j) {
        Vector column[kWindow], down[kWindow];
#pragma GCC unroll 6
        for (int i = 0; i < kWindow; ++i) column[i] = Element::load(pixels[i][j] + c);
        Filtering<step>::inputs(column, down);
#pragma GCC unroll 6
        for (int i = 0; i < kWindow; ++i) half[i][j] = down[i];
      }
      float* const target = to + c / kDepthWords * kProducts * kTileRows * kRowWords + c % kDepthWords;
#pragma GCC unroll 6
      for (int i = 0; i < kWindow; ++i) {
        Vector whole[kWindow];
        Filtering<step>::inputs(half[i], whole);
#pragma GCC unroll 6
        for (int j = 0; j < kWindow; ++j) store_vector(target + (i * kWindow + j) * kTileRows * kRowWords, whole[j]);
      }
    }
  }

  // Weights outside, tiles inside: weights come from afar, and are read once.
  void multiply_tiles(int64_t panel, const float* inputs, int64_t count, int64_t tiles, float* sums) const {
    Tile<Single> work{};
    const int64_t ahead_step = divided_up(kTileColumns * sizeof(float), tiles);
    for (int product = 0; product < kProducts; ++product) {
      const float* const weights = packed_ + (panel * kProducts + product) * conv_.channels * kTileColumns;
      for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
        const int64_t before = chunk * kDepthWords;
        work.b = weights + before * kTileColumns;
        work.depth = std::min<int64_t>(kDepthWords, conv_.channels - before);
        work.resume = chunk > 0;
        for (int64_t t = 0; t < tiles; ++t) {
          const Share tile = share(count, t, tiles);
          work.a = inputs + t * tile_words_ + (chunk * kProducts + product) * kTileRows * kRowWords;
          work.sums = sums + (t * kProducts + product) * kTileSums;
          const auto* const next = reinterpret_cast<const char*>(work.b + work.depth * kTileColumns);
          work.weights_ahead = {next + t * work.depth * ahead_step, ahead_step};
          work.inputs_ahead = work.weights_ahead;  // more of them: the inputs are near
          multiply<Single, true>(work, static_cast<int>(tile.end - tile.begin));
        }
      }
    }
  }

  // The outputs of a window, or as many of them as the image has.
  void finish_window(int64_t window, int64_t panel, const float* sums) const {
    const int64_t image = window / windows_.of_image, place = window % windows_.of_image;
    const int row = static_cast<int>(place / windows_.across) * step;
    const int column = static_cast<int>(place % windows_.across) * step;
    const int64_t filter = panel * kTileColumns;
    for (int v = 0; v < kTileVectors; ++v) {
      const int lanes = static_cast<int>(std::min<int64_t>(kVectorLanes, conv_.filters - filter - v * kVectorLanes));
      if (lanes <= 0) return;
      Vector half[step][kWindow];
#pragma GCC unroll 6
      for (int j = 0; j < kWindow; ++j) {
        Vector down[kWindow], some[step];
#pragma GCC unroll 6
        for (int i = 0; i < kWindow; ++i) {
          down[i] = load_vector(sums + (i * kWindow + j) * kTileSums + v * kVectorLanes);
        }
        Filtering<step>::outputs(down, some);
#pragma GCC unroll 4
        for (int i = 0; i < step; ++i) half[i][j] = some[i];
      }
      const float* const bias = epilogue_.bias + filter + v * kVectorLanes;
      const Vector added = lanes == kVectorLanes ? load_vector(bias) : load_some<Single>(bias, lanes);
#pragma GCC unroll 4
      for (int i = 0; i < step; ++i) {
        if (row + i >= conv_.out_height) break;
        Vector some[step];
        Filtering<step>::outputs(half[i], some);
        const int64_t pixel = (image * conv_.out_height + row + i) * conv_.out_width + column;
#pragma GCC unroll 4
        for (int j = 0; j < step; ++j) {
          if (column + j >= conv_.out_width) break;
          write((pixel + j) * conv_.filters + filter + v * kVectorLanes, some[j] + added, lanes);
        }
      }
    }
  }

  void write(int64_t offset, Vector value, int lanes) const {
    const auto* const residual = static_cast<const Storage*>(epilogue_.residual);
    auto* const out = static_cast<Storage*>(epilogue_.out);
    if (lanes == kVectorLanes) {
      if (residual != nullptr) value += Element::load(residual + offset);
      Element::store(out + offset, epilogue_.relu ? relu_of(value) : value);
    } else {
      if (residual != nullptr) value += load_some<Element>(residual + offset, lanes);
      store_some<Element>(out + offset, epilogue_.relu ? relu_of(value) : value, lanes);
    }
  }

  const CpuConv& conv_;
  const Storage* x_;
  const float* packed_;
  const ConvEpilogue& epilogue_;
  Windows<step> windows_;
  int64_t chunks_, tile_words_, touched_words_;
};

}  // namespace

bool winograd_takes(const CpuConv& conv) {
  return conv.groups == 1 && conv.channels % kVectorLanes == 0 && conv.kernel_height == 3 && conv.kernel_width == 3 &&
         conv.stride_height == 1 && conv.stride_width == 1 && conv.dilation_height == 1 && conv.dilation_width == 1;
}

template <typename Element>
int64_t winograd_packed_words(const CpuConv& conv) {
  constexpr int64_t kProducts = WinogradPart<Element, winograd_step<Element>>::kProducts;
  return divided_up(conv.filters, kTileColumns) * kProducts * conv.channels * kTileColumns;
}

template <typename Element>
void winograd_pack(const CpuConv& conv, const typename Element::Storage* weight, float* packed) {
  constexpr int kStep = winograd_step<Element>, kWindow = kStep + 2, kProducts = kWindow * kWindow;
  std::fill_n(packed, winograd_packed_words<Element>(conv), 0.0f);
  for (int64_t filter = 0; filter < conv.filters; ++filter) {
    for (int64_t c = 0; c < conv.channels; ++c) {
      double half[3][kWindow];  // by kernel column; in float64, so that only the result is rounded
      for (int j = 0; j < 3; ++j) {
        double column[3];
        for (int i = 0; i < 3; ++i) {
          column[i] = Element::widen(weight[((filter * 3 + i) * 3 + j) * conv.channels + c]);
        }
        Filtering<kStep>::kernel(column, half[j]);
      }
      for (int i = 0; i < kWindow; ++i) {
        const double row[3] = {half[0][i], half[1][i], half[2][i]};
        double whole[kWindow];
        Filtering<kStep>::kernel(row, whole);
        for (int j = 0; j < kWindow; ++j) {
          const int64_t product = filter / kTileColumns * kProducts + i * kWindow + j;
          packed[(product * conv.channels + c) * kTileColumns + filter % kTileColumns] = static_cast<float>(whole[j]);
        }
      }
    }
  }
}

template <typename Element>
void winograd_run(const CpuConv& conv, const typename Element::Storage* x, const float* packed,
                  const ConvEpilogue& epilogue) {
  constexpr int kStep = winograd_step<Element>;
  const WinogradPart<Element, kStep> work(conv, x, packed, epilogue);
  const int64_t windows = Windows<kStep>(conv).count, panels = divided_up(conv.filters, kTileColumns);
  const int64_t tiles = divided_up(windows, kTileRows), threads = conv.threads;
  const bool by_filters = tiles < kSmallTiles * threads && panels >= threads;
  const int64_t blocks = divided_up(tiles, work.block_tiles());
  // As many for each thread.
  const int64_t window_parts = by_filters ? blocks : std::min(tiles, divided_up(blocks, threads) * threads);
  const int64_t panel_parts = by_filters ? threads : 1;
  in_parallel_over(window_parts * panel_parts, conv.threads, [&](int64_t part) {
    const Share mine = share(tiles, part % window_parts, window_parts);
    work.run({mine.begin * kTileRows, std::min(mine.end * kTileRows, windows)},
             share(panels, part / window_parts, panel_parts));
  });
}

template int64_t winograd_packed_words<Single>(const CpuConv&);
template void winograd_pack<Single>(const CpuConv&, const float*, float*);
template void winograd_run<Single>(const CpuConv&, const float*, const float*, const ConvEpilogue&);
#if defined(__AVX512BF16__)
template int64_t winograd_packed_words<Brain>(const CpuConv&);
template void winograd_pack<Brain>(const CpuConv&, const uint16_t*, float*);
template void winograd_run<Brain>(const CpuConv&, const uint16_t*, const float*, const ConvEpilogue&);
#endif

}  // namespace CPU_CAPABILITY
}  // namespace fused_resnet
