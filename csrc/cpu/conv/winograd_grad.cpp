// The gradient of a convolution's weights by Winograd's method (conv_winograd.h): the transposed of each of its three
// steps, with a matrix product for each of its 16.
#include "cpu/buffers.h"
#include "directly.h"
#include "grad_weight.h"
#include "winograd.h"

namespace fused_resnet {
namespace CPU_CAPABILITY {
namespace {

constexpr Blocking kWinogradBlocking{132 / kTileRows, 256 / kTileColumns, 256, 4};

class WinogradGrad {
 public:
  static constexpr int kStep = 2, kWindow = kStep + 2, kProducts = kWindow * kWindow;

  WinogradGrad(const CpuConv& conv, const ConvInput& input, const float* grad_out)
      : conv_(conv),
        input_(input),
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
      Vector poison = Vector{};
      const auto place = [&](int i, int j) { return grad_weight + ((filter * 3 + i) * 3 + j) * conv_.channels + c; };
      for (int i = 0; i < 3; ++i) {
        Vector whole[3];
        Filtering<kStep>::grad_kernel(half[i], whole);
        for (int j = 0; j < 3; ++j) {
          store_vector(place(i, j), whole[j]);
          poison += whole[j] * 0.0f;
        }
      }
      if (__builtin_expect(all_zero(poison), 1)) continue;
      Vector directly[3][3];
      grad_weight_directly(conv_, input_, grad_out_, filter, c, directly);
      for (int i = 0; i < 3; ++i) {
        for (int j = 0; j < 3; ++j) store_vector(place(i, j), directly[i][j]);
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
  const ConvInput& input_;
  WindowInputs<Single, kStep> inputs_;
  const float* grad_out_;
  Windows<kStep> windows_;
  int64_t product_words_;
  GradParts parts_;
};

}  // namespace

void winograd_grad_weight(const CpuConv& conv, const ConvInput& input, const float* grad_out, float* grad_weight) {
  const WinogradGrad work(conv, input, grad_out);
  const Buffer memory(work.parts().splits() * work.split_words() * sizeof(float));
  auto* const sums = static_cast<float*>(memory.data());
  in_parallel_over(work.parts().count(), conv.threads, [&](int64_t part) { work.run(part, sums); });
  in_parallel_over(conv.filters, conv.threads, [&](int64_t filter) { work.finish(filter, sums, grad_weight); });
}

}  // namespace CPU_CAPABILITY
}  // namespace fused_resnet
