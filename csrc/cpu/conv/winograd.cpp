// A convolution by Winograd's method (conv_winograd.h).
#include "winograd.h"

#include <algorithm>

#include "directly.h"

namespace fused_resnet {
namespace CPU_CAPABILITY {
namespace {

constexpr int64_t kBlockWords = 128 * 1024;  // of transformed inputs, half of the second cache
constexpr int64_t kLeastTiles = 2;           // of a block: then weights are used twice each time they are read
constexpr int64_t kMostTiles = 8;
constexpr int64_t kSmallTiles = 2;  // of a thread: with fewer, threads share the filters

template <typename Element>
constexpr int winograd_step = sizeof(typename Element::Storage) == 2 ? 4 : 2;

template <typename Element, int step>
class WinogradPart {
 public:
  using Storage = typename Element::Storage;
  static constexpr int kWindow = step + 2;             // inputs on a side
  static constexpr int kProducts = kWindow * kWindow;  // matrix products

  WinogradPart(const CpuConv& conv, const ConvInput& input, const ConvWeight& weight, const float* packed,
               const ConvEpilogue& epilogue)
      : conv_(conv),
        input_(input),
        weight_(weight),
        inputs_(conv, input),
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
    float* const inputs = scratch().words(tiles * (tile_words_ + kProducts * kTileSums));
    float* const sums = inputs + tiles * tile_words_;
    for (int64_t t = 0; t < tiles; ++t) {
      const Share tile = share(count, t, tiles);
      for (int64_t w = tile.begin; w < tile.end; ++w) {
        transform_window(windows.begin + w, inputs + t * tile_words_ + (w - tile.begin) * kRowWords);
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

  void transform_window(int64_t window, float* to) const {
    const WindowPlace place = place_of(conv_, windows_, window);
    for (int64_t c = 0; c < conv_.channels; c += kVectorLanes) {
      float* const target = to + c / kDepthWords * kProducts * kTileRows * kRowWords + c % kDepthWords;
      inputs_.transform(place, c, [target](int i, int j, Vector value) __attribute__((always_inline)) {
        store_vector(target + (i * kWindow + j) * kTileRows * kRowWords, value);
      });
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
      const Vector added = bias(filter + v * kVectorLanes, lanes);
#pragma GCC unroll 4
      for (int i = 0; i < step; ++i) {
        if (row + i >= conv_.out_height) break;
        Vector some[step], poison = Vector{};
        Filtering<step>::outputs(half[i], some);
#pragma GCC unroll 4
        for (int j = 0; j < step; ++j) poison += some[j] * 0.0f;
        if (__builtin_expect(!all_zero(poison), 0)) {
          Vector directly[step];  // another name, or the sums above would have to lie in memory
          const int64_t from = filter + v * kVectorLanes;
          convolve_directly<Element>(conv_, input_, weight_, image, row + i, column, from, lanes, directly);
          for (int j = 0; j < step; ++j) some[j] = directly[j];
        }
        const int64_t pixel = (image * conv_.out_height + row + i) * conv_.out_width + column;
#pragma GCC unroll 4
        for (int j = 0; j < step; ++j) {
          if (column + j >= conv_.out_width) break;
          write((pixel + j) * conv_.filters + filter + v * kVectorLanes, some[j] + added, lanes);
        }
      }
    }
  }

  Vector bias(int64_t filter, int lanes) const {
    if (epilogue_.bias == nullptr) return Vector{};
    return lanes == kVectorLanes ? load_vector(epilogue_.bias + filter)
                                 : load_some<Single>(epilogue_.bias + filter, lanes);
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
  const ConvInput& input_;
  const ConvWeight& weight_;
  WindowInputs<Element, step> inputs_;
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
void winograd_pack(const CpuConv& conv, const ConvWeight& weight, float* packed) {
  constexpr int kStep = winograd_step<Element>, kWindow = kStep + 2, kProducts = kWindow * kWindow;
  const int64_t panels = divided_up(conv.filters, kTileColumns), blocks = conv.channels / kVectorLanes;
  in_parallel_over(panels * kTileVectors * blocks, std::max(conv.threads, 1), [&](int64_t part) {
    const int64_t place = part / blocks, block = part % blocks * kVectorLanes, first = place * kVectorLanes;
    const int lanes = static_cast<int>(std::clamp<int64_t>(conv.filters - first, 0, kVectorLanes));
    Vector weights[3][3][kVectorLanes];
    for (int i = 0; i < 3; ++i) {
      for (int j = 0; j < 3; ++j) load_weights<Element>(weight, first, lanes, i, j, block, weights[i][j]);
    }
    float* const to =
        packed + place / kTileVectors * kProducts * conv.channels * kTileColumns + place % kTileVectors * kVectorLanes;
    for (int c = 0; c < kVectorLanes; ++c) {
      Wide half[3][kWindow];  // by kernel column
      for (int j = 0; j < 3; ++j) {
        Wide column[3];  // so that only the result is rounded
        for (int i = 0; i < 3; ++i) column[i] = __builtin_convertvector(weights[i][j][c], Wide);
        Filtering<kStep>::kernel(column, half[j]);
      }
      for (int i = 0; i < kWindow; ++i) {
        const Wide row[3] = {half[0][i], half[1][i], half[2][i]};
        Wide whole[kWindow];
        Filtering<kStep>::kernel(row, whole);
        for (int j = 0; j < kWindow; ++j) {
          store_vector(to + ((i * kWindow + j) * conv.channels + block + c) * kTileColumns,
                       __builtin_convertvector(whole[j], Vector));
        }
      }
    }
  });
}

template <typename Element>
void winograd_run(const CpuConv& conv, const ConvInput& input, const ConvWeight& weight, const float* packed,
                  const ConvEpilogue& epilogue) {
  constexpr int kStep = winograd_step<Element>;
  const WinogradPart<Element, kStep> work(conv, input, weight, packed, epilogue);
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
template void winograd_pack<Single>(const CpuConv&, const ConvWeight&, float*);
template void winograd_run<Single>(const CpuConv&, const ConvInput&, const ConvWeight&, const float*,
                                   const ConvEpilogue&);
#if defined(__AVX512BF16__)
template int64_t winograd_packed_words<Brain>(const CpuConv&);
template void winograd_pack<Brain>(const CpuConv&, const ConvWeight&, float*);
template void winograd_run<Brain>(const CpuConv&, const ConvInput&, const ConvWeight&, const float*,
                                  const ConvEpilogue&);
#endif

}  // namespace CPU_CAPABILITY
}  // namespace fused_resnet
