// The gradient of a convolution's weights as a matrix product: a row for every filter, a column for every place under
// the kernel, and as depth the pixels of the output. By Winograd's method the same for each of its 16 products, with
// windows as depth: the transposed of each of its three steps.
#include <algorithm>
#include <memory>
#include <vector>

#include "../buffers.h"
#include "conv_winograd.h"
#include "transpose.h"

namespace fused_resnet {
namespace CPU_CAPABILITY {
namespace {

constexpr int64_t kBlockRows = 288;     // filters of a part: kDepthWords of them, 300 KB, stay in the second cache
constexpr int64_t kBlockColumns = 512;  // of a part, for which those are transposed
constexpr int64_t kWindowRows = 132;    // the same of Winograd's, with 16 of each
constexpr int64_t kWindowColumns = 256;
// The depth is split among threads where that leaves fewer parts than these; not by how many threads there are, for a
// sum's order must not depend on them.
constexpr int64_t kWantedParts = 32, kLeastDepth = 1024;
constexpr int64_t kMostSplitWords = 4 << 20;

// The parts that any thread may compute in any order: rows by columns by splits of the depth, which are sums of their
// own until all are there.
class GradParts {
 public:
  GradParts(int64_t rows, int64_t columns, int64_t depth, int64_t row_block, int64_t column_block, int64_t result_words)
      : depth_(depth),
        row_tiles_(divided_up(rows, kTileRows)),
        panels_(divided_up(columns, kTileColumns)),
        row_blocks_(divided_up(row_tiles_ * kTileRows, row_block)),
        panel_blocks_(divided_up(panels_ * kTileColumns, column_block)) {
    const int64_t wanted = divided_up(kWantedParts, row_blocks_ * panel_blocks_);
    const int64_t most = std::min(depth / kLeastDepth, kMostSplitWords / result_words);
    splits_ = std::max<int64_t>(std::min(wanted, most), 1);
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
  // Of the filters those of one tile of rows.
  Share rows_of(int64_t tile, int64_t rows) const { return share(rows, tile, row_tiles_); }

 private:
  int64_t depth_, row_tiles_, panels_, row_blocks_, panel_blocks_, splits_;
};

// Adds (but for the first time: sets) the products of some rows of `a` and a panel `b` to `sums`.
struct GradTile {
  const float *a, *b;
  int64_t depth;
  float* sums;
  int64_t stride;
  int rows, columns;
  bool first;

  void multiply() const {
    static constexpr float kZeros[kTileColumns] = {};
    Tile<Single> work{};
    work.a = a;
    work.b = b;
    work.depth = depth;
    work.bias = kZeros;
    work.residual = first ? nullptr : sums;
    work.out = sums;
    work.out_stride = stride;
    work.filters = columns;
    // The rows behind these, half by half.
    const auto* const next = reinterpret_cast<const char*>(a + rows * kRowWords);
    constexpr int64_t kStep = (kTileRows * kRowWords * sizeof(float) / 2 + kDepthWords - 1) / kDepthWords;
    work.weights_ahead = {next, kStep};
    work.inputs_ahead = {next + kStep * depth, kStep};
    CPU_CAPABILITY::multiply<Single, false>(work, rows);
  }
};

class GemmGrad {
 public:
  GemmGrad(const CpuConv& conv, const ConvInput& input, const float* grad_out)
      : conv_(conv),
        input_(input),
        grad_out_(grad_out),
        columns_(int64_t{conv.kernel_height} * conv.kernel_width * conv.channels),
        parts_(conv.filters, columns_, conv.pixels(), kBlockRows, kBlockColumns, conv.filters * columns_) {}

  const GradParts& parts() const { return parts_; }

  // Its share of every split's sums, which lie one after the other.
  void run(int64_t index, float* sums) const {
    thread_local Scratch scratch;
    const GradParts::Part part = parts_[index];
    const Share rows{parts_.rows_of(part.row_tiles.begin, conv_.filters).begin,
                     parts_.rows_of(part.row_tiles.end - 1, conv_.filters).end};
    float* const a = scratch.words((rows.end - rows.begin) * kRowWords + kDepthWords * kTileColumns);
    float* const b = a + (rows.end - rows.begin) * kRowWords;
    float* const to = sums + part.split * conv_.filters * columns_;
    for (int64_t pixel = part.depth.begin; pixel < part.depth.end; pixel += kDepthWords) {
      const int64_t depth = std::min<int64_t>(kDepthWords, part.depth.end - pixel);
      transpose(grad_out_ + pixel * conv_.filters + rows.begin, conv_.filters, depth, rows.end - rows.begin, a,
                kRowWords);
      Corner corners[kDepthWords];
      find_corners(pixel, depth, corners);
      for (int64_t panel = part.panels.begin; panel < part.panels.end; ++panel) {
        fill_panel(panel, corners, depth, b);
        for (int64_t tile = part.row_tiles.begin; tile < part.row_tiles.end; ++tile) {
          const Share filters = parts_.rows_of(tile, conv_.filters);
          const int64_t column = panel * kTileColumns;
          GradTile{a + (filters.begin - rows.begin) * kRowWords,
                   b,
                   depth,
                   to + filters.begin * columns_ + column,
                   columns_,
                   static_cast<int>(filters.end - filters.begin),
                   static_cast<int>(std::min<int64_t>(kTileColumns, columns_ - column)),
                   pixel == part.depth.begin}
              .multiply();
        }
      }
    }
  }

 private:
  struct Corner {  // upper left one of the window under the kernel
    int top, left;
    int64_t offset;  // of its first element; it may lie beyond the image
  };

  void find_corners(int64_t pixel, int64_t count, Corner* to) const {
    const int64_t out_pixels = int64_t{conv_.out_height} * conv_.out_width;
    for (int64_t i = 0; i < count; ++i, ++pixel) {
      const int64_t image = pixel / out_pixels, place = pixel % out_pixels;
      const int top = static_cast<int>(place / conv_.out_width) * conv_.stride_height - conv_.padding_height;
      const int left = static_cast<int>(place % conv_.out_width) * conv_.stride_width - conv_.padding_width;
      to[i] = {top, left, ((image * conv_.height + top) * conv_.width + left) * conv_.channels};
    }
  }

  // Of every pixel the inputs in the columns of a panel; the columns beyond the last are whatever they were.
  void fill_panel(int64_t panel, const Corner* corners, int64_t depth, float* to) const {
    int64_t column = panel * kTileColumns;
    const int64_t end = std::min(column + kTileColumns, columns_);
    while (column < end) {
      const int64_t place = column / conv_.channels, channel = column % conv_.channels;
      const int count = static_cast<int>(std::min(conv_.channels - channel, end - column));
      const int row = static_cast<int>(place / conv_.kernel_width) * conv_.dilation_height;
      const int across = static_cast<int>(place % conv_.kernel_width) * conv_.dilation_width;
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
    const auto* const x = static_cast<const float*>(input_.x);
    const int64_t beside = (int64_t{row} * conv_.width + across) * conv_.channels + channel;
    for (int64_t i = 0; i < depth; ++i, to += kTileColumns) {
      const Corner& corner = corners[i];
      const bool inside = static_cast<unsigned>(corner.top + row) < static_cast<unsigned>(conv_.height) &&
                          static_cast<unsigned>(corner.left + across) < static_cast<unsigned>(conv_.width);
      if (!inside) {
        std::fill_n(to, count, 0.0f);
        continue;
      }
      const float* const from = x + corner.offset + beside;
      for (int k = 0; k < count; k += kVectorLanes) {
        const int lanes = std::min(kVectorLanes, count - k);
        Vector value;
        if constexpr (normalise) {
          value = normalised<Single>(input_, from + k, channel + k, lanes);
        } else {
          value = lanes == kVectorLanes ? load_vector(from + k) : load_some<Single>(from + k, lanes);
        }
        if (lanes == kVectorLanes) {
          store_vector(to + k, value);
        } else {
          store_some<Single>(to + k, value, lanes);
        }
      }
    }
  }

  const CpuConv& conv_;
  const ConvInput& input_;
  const float* grad_out_;
  int64_t columns_;
  GradParts parts_;
};

class WinogradGrad {
 public:
  static constexpr int kStep = 2, kWindow = kStep + 2, kProducts = kWindow * kWindow;

  WinogradGrad(const CpuConv& conv, const ConvInput& input, const float* grad_out)
      : conv_(conv),
        input_(input),
        grad_out_(grad_out),
        windows_(conv),
        product_words_(int64_t{conv.filters} * conv.channels),
        parts_(conv.filters, conv.channels, windows_.count, kWindowRows, kWindowColumns, kProducts * product_words_) {}

  const GradParts& parts() const { return parts_; }
  int64_t split_words() const { return kProducts * product_words_; }

  void run(int64_t index, float* sums) const {
    thread_local Scratch scratch;
    const GradParts::Part part = parts_[index];
    const Share rows{parts_.rows_of(part.row_tiles.begin, conv_.filters).begin,
                     parts_.rows_of(part.row_tiles.end - 1, conv_.filters).end};
    // Of each product a row for every filter, and room for a vector of filters more.
    const int64_t a_words = (divided_up(rows.end - rows.begin, kVectorLanes) * kVectorLanes) * kRowWords;
    constexpr int64_t kPanelWords = kDepthWords * kTileColumns;
    float* const a = scratch.words(kProducts * (a_words + kPanelWords));
    float* const b = a + kProducts * a_words;
    float* const to = sums + part.split * split_words();
    for (int64_t window = part.depth.begin; window < part.depth.end; window += kDepthWords) {
      const int64_t depth = std::min<int64_t>(kDepthWords, part.depth.end - window);
      transform_outputs(window, depth, rows, a, a_words);
      for (int64_t panel = part.panels.begin; panel < part.panels.end; ++panel) {
        const int64_t channel = panel * kTileColumns;
        const int columns = static_cast<int>(std::min<int64_t>(kTileColumns, conv_.channels - channel));
        if (input_.mean != nullptr) {
          transform_inputs<true>(window, depth, channel, columns, b);
        } else {
          transform_inputs<false>(window, depth, channel, columns, b);
        }
        for (int product = 0; product < kProducts; ++product) {
          for (int64_t tile = part.row_tiles.begin; tile < part.row_tiles.end; ++tile) {
            const Share filters = parts_.rows_of(tile, conv_.filters);
            GradTile{a + product * a_words + (filters.begin - rows.begin) * kRowWords,
                     b + product * kPanelWords,
                     depth,
                     to + product * product_words_ + filters.begin * conv_.channels + channel,
                     conv_.channels,
                     static_cast<int>(filters.end - filters.begin),
                     columns,
                     window == part.depth.begin}
                .multiply();
          }
        }
      }
    }
  }

  // The gradient of one filter's weights of all splits.
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
  // Rows of `to`: of every product and filter the transformed gradients of the windows.
  void transform_outputs(int64_t window, int64_t count, Share filters, float* to, int64_t product_words) const {
    for (int64_t filter = filters.begin; filter < filters.end; filter += kVectorLanes) {
      const int lanes = static_cast<int>(std::min<int64_t>(kVectorLanes, filters.end - filter));
      for (int64_t w = 0; w < count; w += kVectorLanes) {
        Vector rows[kProducts][kVectorLanes] = {};
        for (int i = 0; i < std::min<int64_t>(kVectorLanes, count - w); ++i) {
          transform_output(window + w + i, filter, lanes, rows, i);
        }
        for (int product = 0; product < kProducts; ++product) {
          transpose(rows[product], to + product * product_words + (filter - filters.begin) * kRowWords + w, kRowWords);
        }
      }
    }
  }

  void transform_output(int64_t window, int64_t filter, int lanes, Vector (&to)[kProducts][kVectorLanes],
                        int place) const {
    const int64_t image = window / windows_.of_image, in_image = window % windows_.of_image;
    const int row = static_cast<int>(in_image / windows_.across) * kStep;
    const int column = static_cast<int>(in_image % windows_.across) * kStep;
    Vector half[kWindow][kStep];
    for (int j = 0; j < kStep; ++j) {
      Vector values[kStep], down[kWindow];
      for (int i = 0; i < kStep; ++i) {
        const bool inside = row + i < conv_.out_height && column + j < conv_.out_width;
        const int64_t pixel = (image * conv_.out_height + row + i) * conv_.out_width + column + j;
        const float* const from = grad_out_ + pixel * conv_.filters + filter;
        values[i] = !inside ? Vector{} : lanes == kVectorLanes ? load_vector(from) : load_some<Single>(from, lanes);
      }
      Filtering<kStep>::grad_outputs(values, down);
      for (int i = 0; i < kWindow; ++i) half[i][j] = down[i];
    }
    for (int i = 0; i < kWindow; ++i) {
      Vector whole[kWindow];
      Filtering<kStep>::grad_outputs(half[i], whole);
      for (int j = 0; j < kWindow; ++j) to[i * kWindow + j][place] = whole[j];
    }
  }

  // A panel of every product: of the windows the transformed inputs of `columns` channels.
  template <bool normalise>
  void transform_inputs(int64_t window, int64_t count, int64_t channel, int columns, float* to) const {
    for (int64_t w = 0; w < count; ++w) {
      const WindowInputs<Single, kStep> inputs(conv_, input_, windows_, window + w);
      for (int c = 0; c < columns; c += kVectorLanes) {
        float* const target = to + w * kTileColumns + c;
        inputs.template transform<normalise>(
            static_cast<int>(channel) + c, [target](int i, int j, Vector value) __attribute__((always_inline)) {
              store_vector(target + (i * kWindow + j) * kDepthWords * kTileColumns, value);
            });
      }
    }
  }

  const CpuConv& conv_;
  const ConvInput& input_;
  const float* grad_out_;
  Windows<kStep> windows_;
  int64_t product_words_;
  GradParts parts_;
};

}  // namespace

void gemm_grad_weight(const CpuConv& conv, const ConvInput& input, const float* grad_out, float* grad_weight) {
  const GemmGrad work(conv, input, grad_out);
  const int64_t splits = work.parts().splits();
  const int64_t words = int64_t{conv.filters} * conv.kernel_height * conv.kernel_width * conv.channels;
  std::unique_ptr<Buffer> memory;
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
