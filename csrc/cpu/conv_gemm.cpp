// A convolution as a matrix product: a row for every output pixel, a column for every filter, and as depth the inputs
// under the kernel, in the order (kernel row, kernel column, channel) of NHWC. Rows are gathered for a block of tiles
// and a part of the depth at a time, into memory that stays in the second cache; the whole matrix never exists.
#include "conv_gather.h"

namespace fused_resnet {
namespace CPU_CAPABILITY {
namespace {

constexpr int kBlockTiles = 8;    // whose inputs, 8 x 14 x 1 KiB, stay in the second cache
constexpr int kBlockPanels = 16;  // whose unfinished sums, 224 KiB with those tiles, do too
constexpr int kSmallTiles = 4;    // of a thread: with fewer, threads share the filters, to read each weight once

// With AVX2 it would be one instruction of 22, for tiles that mostly find them there.
constexpr bool kFetchWeights = kStepWords == 1;

template <typename Element>
class GemmPart {
 public:
  using Storage = typename Element::Storage;

  GemmPart(const CpuConv& conv, const Source<Storage>& source, const float* packed, const ConvEpilogue& epilogue)
      : conv_(conv), rows_(conv, source), packed_(packed), epilogue_(epilogue) {}

  // The outputs at these pixels, of the filters of these panels.
  void run(Share pixels, Share panels) {
    std::vector<RowTile> tiles = cut(pixels);
    for (int group = 0; group < conv_.groups; ++group) {
      for (size_t first = 0; first < tiles.size(); first += kBlockTiles) {
        const size_t count = std::min<size_t>(kBlockTiles, tiles.size() - first);
        for (int64_t panel = panels.begin; panel < panels.end; panel += kBlockPanels) {
          run_block(group, tiles.data() + first, count, {panel, std::min(panel + kBlockPanels, panels.end)});
        }
      }
    }
  }

 private:
  struct RowTile {
    Share pixels;
    Share depth;  // in words: the rest is padding for all of them
  };

  // Tiles of as many rows each, kTileRows at most. Where an image's row is no longer than a tile, the first and the
  // last of them have tiles of their own: a third of a 3x3 kernel lies beyond the image there, and is not multiplied.
  std::vector<RowTile> cut(Share pixels) const {
    const int64_t image_pixels = int64_t{conv_.out_height} * conv_.out_width;
    const bool by_rows = conv_.padding_height > 0 && conv_.out_width <= kTileRows && 2 * conv_.out_width >= kTileRows;
    std::vector<RowTile> tiles;
    for (int64_t pixel = pixels.begin; pixel < pixels.end;) {
      int64_t end = pixels.end;
      if (by_rows) {
        const int64_t image = pixel / image_pixels * image_pixels;
        const int64_t first_row = image + conv_.out_width, last_row = image + image_pixels - conv_.out_width;
        end = std::min(end, pixel < first_row ? first_row : pixel < last_row ? last_row : image + image_pixels);
      }
      const int64_t count = divided_up(end - pixel, divided_up(end - pixel, kTileRows));
      tiles.push_back({{pixel, pixel + count}, rows_.depth_inside({pixel, pixel + count})});
      pixel += count;
    }
    return tiles;
  }

  void run_block(int group, const RowTile* tiles, int64_t count, Share panels) const {
    thread_local Scratch scratch;
    constexpr int64_t kInputs = kTileRows * kRowWords;
    float* const inputs = scratch.words(kBlockTiles * kInputs + kBlockTiles * kBlockPanels * kTileSums);
    float* const sums = inputs + kBlockTiles * kInputs;
    const int64_t all_panels = divided_up(conv_.group_filters(), kTileColumns);
    for (int64_t chunk = 0; chunk < rows_.chunks(); ++chunk) {
      for (int64_t t = 0; t < count; ++t) rows_.gather(group, tiles[t].pixels, chunk, inputs + t * kInputs);
      const int64_t before = chunk * kDepthWords;
      const bool last = chunk + 1 == rows_.chunks();
      const char* inputs_ahead = rows_.ahead(group, tiles[count - 1].pixels.end, chunk);
      for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
        const int64_t filter = int64_t{group} * conv_.group_filters() + panel * kTileColumns;
        const float* const weights =
            packed_ + ((group * all_panels + panel) * rows_.depth_words() + before) * kTileColumns;
        float bias[kTileColumns] = {};
        Tile<Element> work;
        work.filters = static_cast<int>(std::min<int64_t>(kTileColumns, conv_.group_filters() - panel * kTileColumns));
        work.bias = bias;
        work.resume = chunk > 0;
        work.out_stride = conv_.filters;
        work.relu = epilogue_.relu;
        std::copy_n(epilogue_.bias + filter, work.filters, bias);
        for (int64_t t = 0; t < count; ++t) {
          const Share depth = within(tiles[t].depth, before);
          work.a = inputs + t * kInputs + depth.begin;
          work.b = weights + depth.begin * kTileColumns;
          work.depth = depth.end - depth.begin;
          work.sums = sums + ((panel - panels.begin) * kBlockTiles + t) * kTileSums;
          const int64_t first = tiles[t].pixels.begin * conv_.filters + filter;
          work.out = last ? static_cast<Storage*>(epilogue_.out) + first : nullptr;
          work.residual =
              last && epilogue_.residual != nullptr ? static_cast<const Storage*>(epilogue_.residual) + first : nullptr;
          // All tiles together have the next panel's weights brought nearer, those of a panel the next block's inputs.
          work.weights_ahead = weights_ahead(weights, panel + 1 < panels.end, last, t, count);
          work.inputs_ahead = {inputs_ahead, panel == panels.begin ? kCacheLine : 0};
          if (panel == panels.begin) inputs_ahead += kDepthWords * kCacheLine;
          multiply<Element, kFetchWeights>(work, static_cast<int>(tiles[t].pixels.end - tiles[t].pixels.begin));
        }
      }
    }
  }

  // What of this part of the depth lies in the chunk that begins at `before`, counted from there.
  Share within(Share depth, int64_t before) const {
    const int64_t length = std::min<int64_t>(kDepthWords, rows_.depth_words() - before);
    const int64_t begin = std::clamp<int64_t>(depth.begin - before, 0, length);
    return {begin, std::clamp<int64_t>(depth.end - before, begin, length)};
  }

  // One tile's share of the weights that are multiplied after these: of the next panel, else of the next chunk.
  Ahead weights_ahead(const float* weights, bool more_panels, bool last_chunk, int64_t tile, int64_t tiles) const {
    const int64_t next = more_panels ? rows_.depth_words() : last_chunk ? 0 : kDepthWords;
    const int64_t step = divided_up(kTileColumns * sizeof(float), tiles);
    return {reinterpret_cast<const char*>(weights + next * kTileColumns) + tile * kDepthWords * step, step};
  }

  const CpuConv& conv_;
  Gather<Element> rows_;
  const float* packed_;
  const ConvEpilogue& epilogue_;
};

}  // namespace

template <typename Element>
int64_t gemm_packed_words(const CpuConv& conv) {
  const int64_t depth = int64_t{conv.group_channels()} * conv.kernel_height * conv.kernel_width;
  const int64_t panels = divided_up(conv.group_filters(), kTileColumns);
  return conv.groups * panels * kTileColumns * divided_up(depth, Element::kPerWord);
}

template <typename Element>
void gemm_pack(const CpuConv& conv, const typename Element::Storage* weight, float* packed) {
  const int64_t depth = int64_t{conv.group_channels()} * conv.kernel_height * conv.kernel_width;
  const int filters = conv.group_filters();
  auto* to = reinterpret_cast<typename Element::Storage*>(packed);
  for (int group = 0; group < conv.groups; ++group) {
    for (int panel = 0; panel < filters; panel += kTileColumns) {
      for (int64_t k = 0; k < depth; k += Element::kPerWord) {
        for (int column = panel; column < panel + kTileColumns; ++column) {
          for (int64_t i = k; i < k + Element::kPerWord; ++i) {
            const int64_t filter = int64_t{group} * filters + column;
            *to++ = column < filters && i < depth ? weight[filter * depth + i] : 0;
          }
        }
      }
    }
  }
}

template <typename Element>
void gemm_run(const CpuConv& conv, const typename Element::Storage* x, const float* packed,
              const ConvEpilogue& epilogue) {
  using Storage = typename Element::Storage;
  std::unique_ptr<Buffer> padded_image;  // of the whole batch, so not kept by the thread
  const Source<Storage> source = is_narrow<Storage>(conv) ? padded(conv, x, padded_image)
                                                          : Source<Storage>{x,
                                                                            conv.height,
                                                                            conv.width,
                                                                            conv.channels,
                                                                            conv.group_channels(),
                                                                            conv.kernel_height,
                                                                            conv.kernel_width,
                                                                            conv.padding_height,
                                                                            conv.padding_width,
                                                                            false};
  const int64_t panels = divided_up(conv.group_filters(), kTileColumns);
  const int64_t pixels = conv.pixels();
  in_parallel(conv.threads, [&](int part, int parts) {
    const bool by_filters = pixels < int64_t{kSmallTiles} * kTileRows * parts && panels >= parts;
    const Share all_panels{0, panels};
    GemmPart<Element>(conv, source, packed, epilogue)
        .run(by_filters ? Share{0, pixels} : share(pixels, part, parts),
             by_filters ? share(panels, part, parts) : all_panels);
  });
}

template int64_t gemm_packed_words<Single>(const CpuConv&);
template void gemm_pack<Single>(const CpuConv&, const float*, float*);
template void gemm_run<Single>(const CpuConv&, const float*, const float*, const ConvEpilogue&);
#if defined(__AVX512BF16__)
template int64_t gemm_packed_words<Brain>(const CpuConv&);
template void gemm_pack<Brain>(const CpuConv&, const uint16_t*, float*);
template void gemm_run<Brain>(const CpuConv&, const uint16_t*, const float*, const ConvEpilogue&);
#endif

}  // namespace CPU_CAPABILITY
}  // namespace fused_resnet
