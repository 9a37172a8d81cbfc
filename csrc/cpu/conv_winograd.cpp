// F(2x2, 3x3): the minimal filtering of Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (2015). A
// window of 4x4 inputs becomes 16 numbers by additions alone, so does (once) a 3x3 kernel; the products of the two,
// summed over the channels, are 16 matrix products, and give 2x2 outputs by additions again. In float32 it is no less
// exact than adding 9 products for each channel: the sums are shorter.
#include <algorithm>

#include "conv_methods.h"

namespace fused_resnet {
namespace CPU_CAPABILITY {
namespace {

constexpr int kWindow = 4;                    // inputs on a side
constexpr int kStep = 2;                      // outputs on a side
constexpr int kProducts = kWindow * kWindow;  // matrix products
constexpr int64_t kBlockWords = 128 * 1024;   // of transformed inputs, half of the second cache
constexpr int64_t kSmallTiles = 2;            // tiles a thread: with fewer, threads share the filters

// Where windows lie: step by step over an image, the last ones reaching beyond it.
struct Windows {
  int64_t across, of_image, count;
  explicit Windows(const CpuConv& conv)
      : across(divided_up(conv.out_width, kStep)),
        of_image(across * divided_up(conv.out_height, kStep)),
        count(of_image * conv.images) {}
};

// (d0 - d2, d1 + d2, d2 - d1, d1 - d3)
inline void transform_inputs(const Vector (&d)[kWindow], Vector (&to)[kWindow]) {
  to[0] = d[0] - d[2];
  to[1] = d[1] + d[2];
  to[2] = d[2] - d[1];
  to[3] = d[1] - d[3];
}

// (m0 + m1 + m2, m1 - m2 - m3)
inline void transform_sums(const Vector (&m)[kWindow], Vector (&to)[kStep]) {
  to[0] = m[0] + m[1] + m[2];
  to[1] = m[1] - m[2] - m[3];
}

class WinogradPart {
 public:
  WinogradPart(const CpuConv& conv, const float* x, const float* packed, const ConvEpilogue& epilogue)
      : conv_(conv),
        x_(x),
        packed_(packed),
        epilogue_(epilogue),
        windows_(conv),
        chunks_(divided_up(conv.channels, kDepthWords)),
        tile_words_(kProducts * chunks_ * kTileRows * kRowWords),
        touched_words_(int64_t{kProducts} * kTileRows * conv.channels) {}

  void run(Share windows, Share panels) {
    const int64_t tiles = std::max<int64_t>(kBlockWords / touched_words_, 1);
    float* const inputs = scratch().words(tiles * tile_words_ + kProducts * kTileSums + conv_.channels);
    float* const sums = inputs + tiles * tile_words_;
    float* const zeros = sums + kProducts * kTileSums;  // stand for every pixel beyond the image
    std::fill_n(zeros, conv_.channels, 0.0f);
    for (int64_t begin = windows.begin; begin < windows.end; begin += tiles * kTileRows) {
      const int64_t count = std::min(tiles * kTileRows, windows.end - begin);
      const int64_t used = divided_up(count, kTileRows);
      for (int64_t t = 0; t < used; ++t) {
        const Share tile = share(count, static_cast<int>(t), static_cast<int>(used));
        for (int64_t w = tile.begin; w < tile.end; ++w) {
          transform_window(begin + w, zeros, inputs + t * tile_words_ + (w - tile.begin) * kRowWords);
        }
      }
      for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
        for (int64_t t = 0; t < used; ++t) {
          const Share tile = share(count, static_cast<int>(t), static_cast<int>(used));
          const int rows = static_cast<int>(tile.end - tile.begin);
          multiply_tile(panel, inputs + t * tile_words_, rows, sums);
          for (int row = 0; row < rows; ++row) {
            finish_window(begin + tile.begin + row, panel, sums + row * kTileColumns);
          }
        }
      }
    }
  }

 private:
  static Scratch& scratch() {
    thread_local Scratch scratch;
    return scratch;
  }

  void transform_window(int64_t window, const float* zeros, float* to) const {
    const int64_t image = window / windows_.of_image, place = window % windows_.of_image;
    const int top = static_cast<int>(place / windows_.across) * kStep - conv_.padding_height;
    const int left = static_cast<int>(place % windows_.across) * kStep - conv_.padding_width;
    const float* pixels[kWindow][kWindow];
    for (int i = 0; i < kWindow; ++i) {
      for (int j = 0; j < kWindow; ++j) {
        const bool inside = static_cast<unsigned>(top + i) < static_cast<unsigned>(conv_.height) &&
                            static_cast<unsigned>(left + j) < static_cast<unsigned>(conv_.width);
        const int64_t pixel = (image * conv_.height + top + i) * conv_.width + left + j;
        pixels[i][j] = inside ? x_ + pixel * conv_.channels : zeros;
      }
    }
    for (int c = 0; c < conv_.channels; c += kVectorLanes) {
      Vector half[kWindow][kWindow], whole[kWindow];
#pragma GCC unroll 4
      for (int j = 0; j < kWindow; ++j) {
        const Vector column[kWindow] = {load_vector(pixels[0][j] + c), load_vector(pixels[1][j] + c),
                                        load_vector(pixels[2][j] + c), load_vector(pixels[3][j] + c)};
        Vector down[kWindow];
        transform_inputs(column, down);
#pragma GCC unroll 4
        for (int i = 0; i < kWindow; ++i) half[i][j] = down[i];
      }
      float* const target = to + c / kDepthWords * kProducts * kTileRows * kRowWords + c % kDepthWords;
#pragma GCC unroll 4
      for (int i = 0; i < kWindow; ++i) {
        transform_inputs(half[i], whole);
#pragma GCC unroll 4
        for (int j = 0; j < kWindow; ++j) store_vector(target + (i * kWindow + j) * kTileRows * kRowWords, whole[j]);
      }
    }
  }

  void multiply_tile(int64_t panel, const float* inputs, int rows, float* sums) const {
    Tile<Single> work{};
    for (int product = 0; product < kProducts; ++product) {
      work.sums = sums + product * kTileSums;
      const float* const weights = packed_ + (panel * kProducts + product) * conv_.channels * kTileColumns;
      for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
        const int64_t before = chunk * kDepthWords;
        work.a = inputs + (chunk * kProducts + product) * kTileRows * kRowWords;
        work.b = weights + before * kTileColumns;
        work.depth = std::min<int64_t>(kDepthWords, conv_.channels - before);
        work.resume = chunk > 0;
        work.ahead = reinterpret_cast<const char*>(work.a);
        multiply(work, rows);
      }
    }
  }

  // The 2x2 outputs of a window, or as many of them as the image has.
  void finish_window(int64_t window, int64_t panel, const float* sums) const {
    const int64_t image = window / windows_.of_image, place = window % windows_.of_image;
    const int row = static_cast<int>(place / windows_.across) * kStep;
    const int column = static_cast<int>(place % windows_.across) * kStep;
    const int64_t filter = panel * kTileColumns;
    for (int v = 0; v < kTileVectors; ++v) {
      const int lanes = static_cast<int>(std::min<int64_t>(kVectorLanes, conv_.filters - filter - v * kVectorLanes));
      if (lanes <= 0) return;
      Vector half[kStep][kWindow];
#pragma GCC unroll 4
      for (int j = 0; j < kWindow; ++j) {
        const float* const from = sums + j * kTileSums + v * kVectorLanes;
        const Vector down[kWindow] = {load_vector(from), load_vector(from + 4 * kTileSums),
                                      load_vector(from + 8 * kTileSums), load_vector(from + 12 * kTileSums)};
        Vector two[kStep];
        transform_sums(down, two);
        half[0][j] = two[0];
        half[1][j] = two[1];
      }
      const float* const bias = epilogue_.bias + filter + v * kVectorLanes;
      const Vector added = lanes == kVectorLanes ? load_vector(bias) : load_some<Single>(bias, lanes);
      for (int i = 0; i < kStep && row + i < conv_.out_height; ++i) {
        Vector two[kStep];
        transform_sums(half[i], two);
        for (int j = 0; j < kStep && column + j < conv_.out_width; ++j) {
          const int64_t pixel = (image * conv_.out_height + row + i) * conv_.out_width + column + j;
          write(pixel * conv_.filters + filter + v * kVectorLanes, two[j] + added, lanes);
        }
      }
    }
  }

  void write(int64_t offset, Vector value, int lanes) const {
    const auto* const residual = static_cast<const float*>(epilogue_.residual);
    auto* const out = static_cast<float*>(epilogue_.out);
    if (lanes == kVectorLanes) {
      if (residual != nullptr) value += load_vector(residual + offset);
      store_vector(out + offset, epilogue_.relu ? relu_of(value) : value);
    } else {
      if (residual != nullptr) value += load_some<Single>(residual + offset, lanes);
      store_some<Single>(out + offset, epilogue_.relu ? relu_of(value) : value, lanes);
    }
  }

  const CpuConv& conv_;
  const float* x_;
  const float* packed_;
  const ConvEpilogue& epilogue_;
  Windows windows_;
  int64_t chunks_, tile_words_, touched_words_;
};

}  // namespace

bool winograd_takes(const CpuConv& conv) {
  return conv.dtype == DType::float32 && conv.groups == 1 && conv.channels % kVectorLanes == 0 &&
         conv.kernel_height == 3 && conv.kernel_width == 3 && conv.stride_height == 1 && conv.stride_width == 1 &&
         conv.dilation_height == 1 && conv.dilation_width == 1;
}

int64_t winograd_packed_words(const CpuConv& conv) {
  return divided_up(conv.filters, kTileColumns) * kProducts * conv.channels * kTileColumns;
}

void winograd_pack(const CpuConv& conv, const float* weight, float* packed) {
  // (g0, (g0 + g1 + g2) / 2, (g0 - g1 + g2) / 2, g2), in float64 so that only the result is rounded
  const auto transform = [](double a, double b, double c, double* to, int step) {
    to[0] = a;
    to[step] = (a + b + c) / 2;
    to[2 * step] = (a - b + c) / 2;
    to[3 * step] = c;
  };
  std::fill_n(packed, winograd_packed_words(conv), 0.0f);
  for (int64_t filter = 0; filter < conv.filters; ++filter) {
    for (int64_t c = 0; c < conv.channels; ++c) {
      double half[kWindow * 3], whole[kProducts];
      const auto at = [&](int i, int j) -> double { return weight[((filter * 3 + i) * 3 + j) * conv.channels + c]; };
      for (int j = 0; j < 3; ++j) transform(at(0, j), at(1, j), at(2, j), half + j, 3);
      for (int i = 0; i < kWindow; ++i) transform(half[3 * i], half[3 * i + 1], half[3 * i + 2], whole + 4 * i, 1);
      for (int product = 0; product < kProducts; ++product) {
        const int64_t row = (filter / kTileColumns * kProducts + product) * conv.channels + c;
        packed[row * kTileColumns + filter % kTileColumns] = static_cast<float>(whole[product]);
      }
    }
  }
}

void winograd_run(const CpuConv& conv, const float* x, const float* packed, const ConvEpilogue& epilogue) {
  const int64_t windows = Windows(conv).count, panels = divided_up(conv.filters, kTileColumns);
  in_parallel(conv.threads, [&](int part, int parts) {
    const bool by_filters = windows < kSmallTiles * kTileRows * parts && panels >= parts;
    WinogradPart work(conv, x, packed, epilogue);
    work.run(by_filters ? Share{0, windows} : share(windows, part, parts),
             by_filters ? share(panels, part, parts) : Share{0, panels});
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace fused_resnet
