// The gradient of a convolution's weights as a matrix product: a row for every filter, a column for every place under
// the kernel, and as depth the pixels of the output. By Winograd's method the same for each of its 16 products, with
// windows as depth: the transposed of each of its three steps.
#include <algorithm>
#include <memory>
#include <utility>

#include "../buffers.h"
#include "conv_gather.h"
#include "conv_winograd.h"

namespace fused_resnet {
namespace CPU_CAPABILITY {
namespace {

// Multiplied at a time: then a panel of columns, 16 KiB, takes half of the first cache.
constexpr int64_t kDepth = std::min<int64_t>(kDepthWords, 4096 / kTileColumns);
constexpr int64_t kPanelWords = kDepth * kTileColumns;
// Vectors that hold a tile's rows; what is beyond them is overwritten by the rows of the next depth, or lies behind the
// last.
constexpr int kRowVectors = (kTileRows + kVectorLanes - 1) / kVectorLanes;
constexpr int64_t kRowsWords = kDepth * kTileRows + kRowVectors * kVectorLanes;

// How the whole is cut into parts, which any thread may compute in any order: rows by columns by splits of the depth,
// which are sums of their own until all are there. It does not depend on how many threads there are, for neither may
// the order of a sum.
struct Blocking {
  int64_t row_tiles, panels;          // of a part, at most: whose rows stay in the second cache, and are laid out
                                      // anew for that many panels
  int64_t least_depth, least_panels;  // of a part, where depth or panels are cut to have enough of them
};
constexpr int64_t kWantedParts = 16, kMostSplitWords = 4 << 20;
constexpr Blocking kGemmBlocking{288 / kTileRows, 512 / kTileColumns, 1024, 8};
constexpr Blocking kWinogradBlocking{132 / kTileRows, 256 / kTileColumns, 256, 4};

class GradParts {
 public:
  GradParts(const Blocking& blocking, int64_t rows, int64_t columns, int64_t depth, int64_t result_words)
      : depth_(depth),
        row_tiles_(divided_up(rows, kTileRows)),
        panels_(divided_up(columns, kTileColumns)),
        row_blocks_(divided_up(row_tiles_, blocking.row_tiles)) {
    const int64_t fewest = divided_up(panels_, blocking.panels);
    const int64_t most_splits = std::min(depth / blocking.least_depth, kMostSplitWords / result_words);
    splits_ = std::max<int64_t>(std::min(divided_up(kWantedParts, row_blocks_ * fewest), most_splits), 1);
    const int64_t wanted = divided_up(kWantedParts, row_blocks_ * splits_);
    panel_blocks_ = std::max({fewest, std::min(wanted, panels_ / blocking.least_panels), int64_t{1}});
  }

  int64_t count() const { return row_blocks_ * panel_blocks_ * splits_; }
  int64_t splits() const { return splits_; }

  struct Part {
    Share row_tiles, panels, depth;
    int64_t split;
  };
  Part operator[](int64_t index) const {
    const int64_t split = index / (row_blocks_ * panel_blocks_);
    return {share(row_tiles_, index % row_blocks_, row_blocks_),
            share(panels_, index / row_blocks_ % panel_blocks_, panel_blocks_), share(depth_, split, splits_), split};
  }

 private:
  int64_t depth_, row_tiles_, panels_, row_blocks_, panel_blocks_, splits_;
};

// The products of a tile of rows and a panel of columns, set or added to `sums`.
struct GradTile {
  const float* a;  // kTileRows for each of the depth
  const float* b;  // kTileColumns for each of the depth
  int64_t depth;
  Ahead inputs;  // of the panel behind this one
  float* sums;
  int64_t stride;  // from one row of the sums to the next
  int columns;     // that exist
  bool first;

  template <int rows>
  static void multiply(const GradTile& tile) {
    Vector sum[rows][kTileVectors];
#pragma GCC unroll 14
    for (int row = 0; row < rows; ++row) {
      sum[row][0] = sum[row][1] = Vector{};
      prefetch_row(tile.sums + row * tile.stride);
    }
    const float* const a = tile.a;
    const auto* const next = reinterpret_cast<const char*>(a + kRowsWords);
    add_products<Single, false>(
        sum, [a](int row, int64_t k) __attribute__((always_inline)) { return a[k * kTileRows + row]; }, tile.b,
        tile.depth, {next, kTileRows * sizeof(float)}, tile.inputs);
#pragma GCC unroll 14
    for (int row = 0; row < rows; ++row) {
      float* const to = tile.sums + row * tile.stride;
      if (tile.columns == kTileColumns) {
        if (!tile.first) {
          sum[row][0] += load_vector(to);
          sum[row][1] += load_vector(to + kVectorLanes);
        }
        store_vector(to, sum[row][0]);
        store_vector(to + kVectorLanes, sum[row][1]);
        continue;
      }
      for (int vector = 0; vector < kTileVectors; ++vector) {
        const int lanes = std::min(tile.columns - vector * kVectorLanes, kVectorLanes);
        if (lanes <= 0) break;
        float* const some = to + vector * kVectorLanes;
        if (!tile.first) sum[row][vector] += load_some<Single>(some, lanes);
        store_some<Single>(some, sum[row][vector], lanes);
      }
    }
  }

  template <int... rows>
  void multiply_rows(int count, std::integer_sequence<int, rows...>) const {
    using Function = void (*)(const GradTile&);
    static constexpr Function kFunctions[] = {multiply<rows + 1>...};
    kFunctions[count - 1](*this);
  }
  void multiply(int64_t rows) const {
    multiply_rows(static_cast<int>(rows), std::make_integer_sequence<int, kTileRows>{});
  }
};

// The gradients of a tile of filters, of which `count` exist, at one pixel.
inline void load_filters(const float* from, int64_t count, Vector (&to)[kRowVectors]) {
  for (int i = 0; i < kRowVectors; ++i) {
    const int64_t lanes = std::clamp<int64_t>(count - i * kVectorLanes, 0, kVectorLanes);
    to[i] = lanes == kVectorLanes ? load_vector(from + i * kVectorLanes)
            : lanes == 0          ? Vector{}
                                  : load_some<Single>(from + i * kVectorLanes, static_cast<int>(lanes));
  }
}

class GemmGrad {
 public:
  GemmGrad(const CpuConv& conv, const ConvInput& input, const Source<float>& source, const float* grad_out)
      : conv_(conv),
        input_(input),
        source_(source),
        grad_out_(grad_out),
        columns_(int64_t{conv.kernel_height} * conv.kernel_width * conv.channels),
        parts_(kGemmBlocking, conv.filters, columns_, conv.pixels(), conv.filters * columns_) {}

  const GradParts& parts() const { return parts_; }
  int64_t split_words() const { return conv_.filters * columns_; }

  // Its share of the sums, those of one split behind those of the other.
  void run(int64_t index, float* sums) const {
    thread_local Scratch scratch;
    const GradParts::Part part = parts_[index];
    const int64_t tiles = part.row_tiles.end - part.row_tiles.begin;
    float* const a = scratch.words(tiles * kRowsWords + kPanelWords);
    float* const b = a + tiles * kRowsWords;
    float* const to = sums + part.split * split_words();
    for (int64_t pixel = part.depth.begin; pixel < part.depth.end; pixel += kDepth) {
      const int64_t depth = std::min(kDepth, part.depth.end - pixel);
      fill_rows(part.row_tiles, pixel, depth, a);
      Corner corners[kDepth];
      find_corners(pixel, depth, corners);
      for (int64_t panel = part.panels.begin; panel < part.panels.end; ++panel) {
        fill_panel(panel, corners, depth, b);
        const int64_t column = panel * kTileColumns;
        for (int64_t t = 0; t < tiles; ++t) {
          const int64_t filter = (part.row_tiles.begin + t) * kTileRows;
          GradTile{a + t * kRowsWords,
                   b,
                   depth,
                   inputs_ahead(panel + 1, corners, depth, t),
                   to + filter * columns_ + column,
                   columns_,
                   static_cast<int>(std::min<int64_t>(kTileColumns, columns_ - column)),
                   pixel == part.depth.begin}
              .multiply(std::min<int64_t>(kTileRows, conv_.filters - filter));
        }
      }
    }
  }

 private:
  struct Corner {  // upper left one of the window under the kernel
    int top, left;
    int64_t offset;  // of its first element; it may lie beyond the image
  };

  // One pixel after the other, as they lie in memory.
  void fill_rows(Share tiles, int64_t pixel, int64_t depth, float* to) const {
    for (int64_t i = 0; i < depth; ++i) {
      float* target = to + i * kTileRows;
      for (int64_t tile = tiles.begin; tile < tiles.end; ++tile, target += kRowsWords) {
        const int64_t filter = tile * kTileRows;
        Vector rows[kRowVectors];
        load_filters(grad_out_ + (pixel + i) * conv_.filters + filter, conv_.filters - filter, rows);
        for (int v = 0; v < kRowVectors; ++v) store_vector(target + v * kVectorLanes, rows[v]);
      }
    }
  }

  void find_corners(int64_t pixel, int64_t count, Corner* to) const {
    const int64_t out_pixels = int64_t{conv_.out_height} * conv_.out_width;
    int64_t image = pixel / out_pixels;
    int row = static_cast<int>(pixel % out_pixels / conv_.out_width);
    int column = static_cast<int>(pixel % conv_.out_width);
    for (int64_t i = 0; i < count; ++i) {
      const int top = row * conv_.stride_height - source_.padding_height;
      const int left = column * conv_.stride_width - source_.padding_width;
      to[i] = {top, left, ((image * source_.height + top) * source_.width + left) * source_.pixel_stride};
      if (++column == conv_.out_width) {
        column = 0;
        if (++row == conv_.out_height) {
          row = 0;
          ++image;
        }
      }
    }
  }

  // Of a panel's inputs those that the products of one tile bring nearer, as if the pixels lay one behind the other.
  Ahead inputs_ahead(int64_t panel, const Corner* corners, int64_t depth, int64_t tile) const {
    constexpr int64_t kPixels = kDepth / kStepWords;  // fetched with each tile
    if (panel * kTileColumns >= columns_ || tile * kPixels >= depth) return {nullptr, 0};
    const int64_t place = panel * kTileColumns / source_.run, channel = panel * kTileColumns % source_.run;
    const int64_t row = place / source_.kernel_width * conv_.dilation_height;
    const int64_t across = place % source_.kernel_width * conv_.dilation_width;
    const int64_t beside = (row * source_.width + across) * source_.pixel_stride + channel;
    const int64_t element = corners[tile * kPixels].offset + beside;
    const int64_t step = conv_.stride_width * source_.pixel_stride * static_cast<int64_t>(sizeof(float)) / kStepWords;
    // add_products looks at it in the middle of a step.
    const uintptr_t from = reinterpret_cast<uintptr_t>(source_.x) + element * sizeof(float) - kStepWords / 2 * step;
    return {reinterpret_cast<const char*>(from), step};
  }

  // Of every pixel the inputs in the columns of a panel; columns behind the last one are whatever they were.
  void fill_panel(int64_t panel, const Corner* corners, int64_t depth, float* to) const {
    int64_t column = panel * kTileColumns;
    const int64_t end = std::min(column + kTileColumns, columns_);
    while (column < end) {
      const int64_t place = column / source_.run, channel = column % source_.run;
      const int count = static_cast<int>(std::min(source_.run - channel, end - column));
      const int row = static_cast<int>(place / source_.kernel_width) * conv_.dilation_height;
      const int across = static_cast<int>(place % source_.kernel_width) * conv_.dilation_width;
      float* const target = to + column % kTileColumns;
      if (input_.mean != nullptr) {
        fill_place<true>(corners, depth, row, across, channel, count, target);
      } else {
        fill_place<false>(corners, depth, row, across, channel, count, target);
      }
      column += count;
    }
  }

  template <bool normalise>
  void fill_place(const Corner* corners, int64_t depth, int row, int across, int64_t channel, int count,
                  float* to) const {
    const int64_t beside = (int64_t{row} * source_.width + across) * source_.pixel_stride + channel;
    for (int64_t i = 0; i < depth; ++i, to += kTileColumns) {
      const Corner& corner = corners[i];
      const bool inside = static_cast<unsigned>(corner.top + row) < static_cast<unsigned>(source_.height) &&
                          static_cast<unsigned>(corner.left + across) < static_cast<unsigned>(source_.width);
      if (!inside) {
        std::fill_n(to, count, 0.0f);
        continue;
      }
      const float* const from = source_.x + corner.offset + beside;
      int k = 0;
      for (; k + kVectorLanes <= count; k += kVectorLanes) {
        store_vector(to + k, normalise ? normalised<Single>(input_, from + k, channel + k, kVectorLanes)
                                       : load_vector(from + k));
      }
      if constexpr (normalise) {
        if (k < count)
          store_some<Single>(to + k, normalised<Single>(input_, from + k, channel + k, count - k), count - k);
      } else {
        for (; k < count; ++k) to[k] = from[k];
      }
    }
  }

  const CpuConv& conv_;
  const ConvInput& input_;
  const Source<float>& source_;
  const float* grad_out_;
  int64_t columns_;
  GradParts parts_;
};

class WinogradGrad {
 public:
  static constexpr int kStep = 2, kWindow = kStep + 2, kProducts = kWindow * kWindow;

  WinogradGrad(const CpuConv& conv, const ConvInput& input, const float* grad_out)
      : conv_(conv),
        inputs_(conv, input),
        grad_out_(grad_out),
        windows_(conv),
        product_words_(int64_t{conv.filters} * conv.channels),
        parts_(kWinogradBlocking, conv.filters, conv.channels, windows_.count, kProducts * product_words_) {}

  const GradParts& parts() const { return parts_; }
  int64_t split_words() const { return kProducts * product_words_; }

  // Its share of the sums, those of one split behind those of the other, and in it those of one product.
  void run(int64_t index, float* sums) const {
    thread_local Scratch scratch;
    const GradParts::Part part = parts_[index];
    const int64_t tiles = part.row_tiles.end - part.row_tiles.begin;
    const int64_t a_words = tiles * kRowsWords;
    float* const a = scratch.words(kProducts * (a_words + kPanelWords));
    float* const b = a + kProducts * a_words;
    float* const to = sums + part.split * split_words();
    for (int64_t window = part.depth.begin; window < part.depth.end; window += kDepth) {
      const int64_t depth = std::min(kDepth, part.depth.end - window);
      WindowPlace places[kDepth];
      for (int64_t w = 0; w < depth; ++w) {
        places[w] = place_of(conv_, windows_, window + w);
        transform_outputs(window + w, part.row_tiles, a + w * kTileRows, a_words);
      }
      for (int64_t panel = part.panels.begin; panel < part.panels.end; ++panel) {
        const int64_t channel = panel * kTileColumns;
        const int columns = static_cast<int>(std::min<int64_t>(kTileColumns, conv_.channels - channel));
        transform_inputs(places, depth, channel, columns, b);
        for (int product = 0; product < kProducts; ++product) {
          for (int64_t t = 0; t < tiles; ++t) {
            const int64_t filter = (part.row_tiles.begin + t) * kTileRows;
            GradTile{a + product * a_words + t * kRowsWords,
                     b + product * kPanelWords,
                     depth,
                     {nullptr, 0},
                     to + product * product_words_ + filter * conv_.channels + channel,
                     conv_.channels,
                     columns,
                     window == part.depth.begin}
                .multiply(std::min<int64_t>(kTileRows, conv_.filters - filter));
          }
        }
      }
    }
  }

  // The gradient of one filter's weights, of all splits.
  void finish(int64_t filter, const float* sums, float* grad_weight) const {
    for (int64_t c = 0; c < conv_.channels; c += kVectorLanes) {
      Vector half[3][kWindow];
      for (int j = 0; j < kWindow; ++j) {
        Vector column[kWindow], down[3];
        for (int i = 0; i < kWindow; ++i) {
          const float* from = sums + (i * kWindow + j) * product_words_ + filter * conv_.channels + c;
          column[i] = load_vector(from);
          for (int64_t split = 1; split < parts_.splits(); ++split) {
            from += split_words();
            column[i] += load_vector(from);
          }
        }
        Filtering<kStep>::grad_kernel(column, down);
        for (int i = 0; i < 3; ++i) half[i][j] = down[i];
      }
      for (int i = 0; i < 3; ++i) {
        Vector whole[3];
        Filtering<kStep>::grad_kernel(half[i], whole);
        for (int j = 0; j < 3; ++j) {
          store_vector(grad_weight + ((filter * 3 + i) * 3 + j) * conv_.channels + c, whole[j]);
        }
      }
    }
  }

 private:
  // Of one window the transformed gradients of some tiles of filters, to each product.
  void transform_outputs(int64_t window, Share tiles, float* to, int64_t product_words) const {
    const int64_t image = window / windows_.of_image, place = window % windows_.of_image;
    const int row = static_cast<int>(place / windows_.across) * kStep;
    const int column = static_cast<int>(place % windows_.across) * kStep;
    const float* pixels[kStep][kStep];
    for (int i = 0; i < kStep; ++i) {
      for (int j = 0; j < kStep; ++j) {
        const bool inside = row + i < conv_.out_height && column + j < conv_.out_width;
        const int64_t pixel = (image * conv_.out_height + row + i) * conv_.out_width + column + j;
        pixels[i][j] = inside ? grad_out_ + pixel * conv_.filters : nullptr;
      }
    }
    for (int64_t tile = tiles.begin; tile < tiles.end; ++tile, to += kRowsWords) {
      const int64_t filter = tile * kTileRows;
      Vector values[kStep][kStep][kRowVectors] = {};
      for (int i = 0; i < kStep; ++i) {
        for (int j = 0; j < kStep; ++j) {
          if (pixels[i][j] != nullptr) load_filters(pixels[i][j] + filter, conv_.filters - filter, values[i][j]);
        }
      }
      for (int v = 0; v < kRowVectors; ++v) {
        Vector half[kWindow][kStep];
        for (int j = 0; j < kStep; ++j) {
          const Vector down[kStep] = {values[0][j][v], values[1][j][v]};
          Vector whole[kWindow];
          Filtering<kStep>::grad_outputs(down, whole);
          for (int i = 0; i < kWindow; ++i) half[i][j] = whole[i];
        }
        for (int i = 0; i < kWindow; ++i) {
          Vector whole[kWindow];
          Filtering<kStep>::grad_outputs(half[i], whole);
          for (int j = 0; j < kWindow; ++j) {
            store_vector(to + (i * kWindow + j) * product_words + v * kVectorLanes, whole[j]);
          }
        }
      }
    }
  }

  // A panel of every product: of the windows the transformed inputs of `columns` channels.
  void transform_inputs(const WindowPlace* places, int64_t count, int64_t channel, int columns, float* to) const {
    for (int64_t w = 0; w < count; ++w) {
      for (int c = 0; c < columns; c += kVectorLanes) {
        float* const target = to + w * kTileColumns + c;
        inputs_.transform(places[w], channel + c, [target](int i, int j, Vector value) __attribute__((always_inline)) {
          store_vector(target + (i * kWindow + j) * kPanelWords, value);
        });
      }
    }
  }

  const CpuConv& conv_;
  WindowInputs<Single, kStep> inputs_;
  const float* grad_out_;
  Windows<kStep> windows_;
  int64_t product_words_;
  GradParts parts_;
};

}  // namespace

void gemm_grad_weight(const CpuConv& conv, const ConvInput& input, const float* grad_out, float* grad_weight) {
  std::unique_ptr<Buffer> padded_image, memory;
  const Source<float> source = source_of<float>(conv, input, padded_image);
  const GemmGrad work(conv, input, source, grad_out);
  const int64_t splits = work.parts().splits(), words = work.split_words();
  if (splits > 1) memory = std::make_unique<Buffer>(splits * words * sizeof(float));
  float* const sums = splits > 1 ? static_cast<float*>(memory->data()) : grad_weight;
  in_parallel_over(work.parts().count(), conv.threads, [&](int64_t part) { work.run(part, sums); });
  if (splits == 1) return;
  in_parallel(conv.threads, [&](int part, int parts) {
    const Share mine = share(words, part, parts);
    std::copy(sums + mine.begin, sums + mine.end, grad_weight + mine.begin);
    for (int64_t split = 1; split < splits; ++split) {
      const float* const from = sums + split * words;
#pragma GCC ivdep
      for (int64_t i = mine.begin; i < mine.end; ++i) grad_weight[i] += from[i];
    }
  });
}

void winograd_grad_weight(const CpuConv& conv, const ConvInput& input, const float* grad_out, float* grad_weight) {
  const WinogradGrad work(conv, input, grad_out);
  const Buffer memory(work.parts().splits() * work.split_words() * sizeof(float));
  auto* const sums = static_cast<float*>(memory.data());
  in_parallel_over(work.parts().count(), conv.threads, [&](int64_t part) { work.run(part, sums); });
  in_parallel_over(conv.filters, conv.threads, [&](int64_t filter) { work.finish(filter, sums, grad_weight); });
}

}  // namespace CPU_CAPABILITY
}  // namespace fused_resnet
