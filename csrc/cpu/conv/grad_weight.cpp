// The gradient of a convolution's weights as one matrix product (conv_grad_weight.h).
#include "grad_weight.h"

#include <memory>

#include "cpu/buffers.h"
#include "gather.h"

namespace fused_resnet {
namespace CPU_CAPABILITY {
namespace {

constexpr Blocking kGemmBlocking{288 / kTileRows, 512 / kTileColumns, 1024, 8};

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

}  // namespace CPU_CAPABILITY
}  // namespace fused_resnet
