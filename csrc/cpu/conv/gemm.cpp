// A convolution as a matrix product: a row for every output pixel, a column for every filter, and as depth the inputs
// under the kernel, in the order (kernel row, kernel column, channel) of NHWC. Rows are gathered for a block of tiles
// and a part of the depth at a time, into memory that stays in the second cache; the whole matrix never exists.
#include "gather.h"

namespace fused_resnet {
namespace CPU_CAPABILITY {
namespace {

constexpr int kBlockTiles = 8;  // whose inputs, 8 x 14 x 1 KiB, stay in the second cache
// Whose unfinished sums with those tiles, 224 and 192 KiB, do too.
constexpr int kBlockPanels = kVectorLanes == 16 ? 16 : 64;
constexpr int kThreadParts = 16;   // at best, so that threads which are not equally fast end together
constexpr int kPartFilters = 256;  // of one part at least: its inputs are gathered for them alone

constexpr int64_t kWord = sizeof(float), kPanelBytes = kTileColumns * kWord;  // for each word of depth
constexpr bool kLookByRows = kStepWords > 1;                                  // measured with AVX2 only

// With AVX2 it would be one instruction of 22, for tiles that mostly find them there.
constexpr bool kFetchWeights = kStepWords == 1;

// Pixels of the output whose rows are multiplied together.
struct RowTile {
  Share pixels;
  Share depth;  // in words: the rest is padding for all of them
};

// All pixels, in tiles of kTileRows at most.
template <typename Element>
class RowTiles {
 public:
  RowTiles(const CpuConv& conv, const Gather<Element>& rows) : conv_(conv), rows_(rows) {
    if (conv.padding_height > 0 && conv.out_width <= kTileRows && 2 * conv.out_width >= kTileRows) cut_image();
    count_ = of_image_.empty() ? divided_up(conv.pixels(), kTileRows) : conv.images * of_image_.size();
  }

  int64_t count() const { return count_; }

  RowTile operator[](int64_t index) const {
    if (of_image_.empty()) {
      const Share pixels = share(conv_.pixels(), index, count_);
      return {pixels, rows_.depth_inside(pixels)};
    }
    const int64_t tiles = of_image_.size();
    RowTile tile = of_image_[index % tiles];
    tile.pixels.begin += index / tiles * image_pixels();
    tile.pixels.end += index / tiles * image_pixels();
    return tile;
  }

 private:
  int64_t image_pixels() const { return int64_t{conv_.out_height} * conv_.out_width; }

  // Where an image's row is no longer than a tile, the first and the last of them have tiles of their own: a third of a
  // 3x3 kernel lies beyond the image there, and is not multiplied.
  void cut_image() {
    const int64_t ends[] = {conv_.out_width, image_pixels() - conv_.out_width, image_pixels()};
    int64_t begin = 0;
    for (const int64_t end : ends) {
      if (end <= begin) continue;
      const int64_t tiles = divided_up(end - begin, kTileRows);
      for (int64_t i = 0; i < tiles; ++i) {
        const Share some = share(end - begin, i, tiles);
        const Share pixels{begin + some.begin, begin + some.end};
        of_image_.push_back({pixels, rows_.depth_inside(pixels)});
      }
      begin = end;
    }
  }

  const CpuConv& conv_;
  const Gather<Element>& rows_;
  std::vector<RowTile> of_image_;  // if these are not the same for every image: none
  int64_t count_;
};

// The product in parts, which any thread may compute in any order: some tiles by some panels.
template <typename Element>
class GemmParts {
 public:
  using Storage = typename Element::Storage;

  GemmParts(const CpuConv& conv, const Source<Storage>& source, const ConvInput& input, const float* packed,
            const ConvEpilogue& epilogue)
      : conv_(conv),
        rows_(conv, source, input),
        tiles_(conv, rows_),
        packed_(packed),
        epilogue_(epilogue),
        panels_(divided_up(conv.group_filters(), kTileColumns)),
        blocks_(divided_up(tiles_.count(), kBlockTiles)) {
    const int64_t threads = conv.threads;
    // As many parts for each thread, unless the blocks are so few that each has its weights to read once more.
    if (blocks_ >= threads) blocks_ = std::min(tiles_.count(), divided_up(blocks_, threads) * threads);
    const int64_t most = std::max<int64_t>(conv.group_filters() / kPartFilters, blocks_ < threads ? threads : 1);
    const int64_t wanted = divided_up(kThreadParts * threads, blocks_ * conv.groups);
    panel_parts_ = std::max(std::min({wanted, most, panels_}), divided_up(panels_, kBlockPanels));
    const int64_t inputs = int64_t{conv.images} * source.height * source.width * source.run;
    weights_outside_ = inputs < conv.group_filters() * rows_.depth_words() * Element::kPerWord;
  }

  int64_t count() const { return conv_.groups * blocks_ * panel_parts_; }

  void run(int64_t part) const {
    const int64_t in_group = part % (blocks_ * panel_parts_);
    // What is larger, weights or inputs, is read once.
    const int64_t block = weights_outside_ ? in_group % blocks_ : in_group / panel_parts_;
    const int64_t panels = weights_outside_ ? in_group / blocks_ : in_group % panel_parts_;
    const Share mine = share(tiles_.count(), block, blocks_);
    std::vector<RowTile> tiles;
    for (int64_t i = mine.begin; i < mine.end; ++i) tiles.push_back(tiles_[i]);
    run_block(part / (blocks_ * panel_parts_), tiles, share(panels_, panels, panel_parts_));
  }

 private:
  void run_block(int group, const std::vector<RowTile>& tiles, Share panels) const {
    thread_local Scratch scratch;
    constexpr int64_t kInputs = kTileRows * kRowWords;
    const int64_t count = tiles.size();
    float* const inputs = scratch.words(kBlockTiles * kInputs + kBlockTiles * kBlockPanels * kTileSums);
    float* const sums = inputs + kBlockTiles * kInputs;
    // All tiles together have the next panel's weights brought nearer; each of them also inputs that are gathered next,
    // some rows with every panel.
    const int64_t weights_step = divided_up(kPanelBytes, count);
    const int64_t panel_rows = by_rows() ? divided_up(kTileRows, panels.end - panels.begin) : kTileRows;
    const int64_t inputs_step = by_rows() ? panel_rows * kWord : kCacheLine / kStepWords;
    const int64_t row_bytes = int64_t{conv_.stride_width} * conv_.channels * sizeof(Storage);
    for (int64_t chunk = 0; chunk < rows_.chunks(); ++chunk) {
      const char* next_inputs[kBlockTiles];
      for (int64_t t = 0; t < count; ++t) {
        rows_.gather(group, tiles[t].pixels, chunk, inputs + t * kInputs);
        next_inputs[t] = inputs_behind(group, tiles, t, chunk);
      }
      const int64_t before = chunk * kDepthWords;
      const bool last = chunk + 1 == rows_.chunks();
      for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
        const int64_t filter = int64_t{group} * conv_.group_filters() + panel * kTileColumns;
        const float* const weights =
            packed_ + ((group * panels_ + panel) * rows_.depth_words() + before) * kTileColumns;
        const int64_t words_on = panel + 1 < panels.end ? rows_.depth_words() : last ? 0 : kDepthWords;
        const auto* const next_weights = reinterpret_cast<const char*>(weights + words_on * kTileColumns);
        const int64_t row = (panel - panels.begin) * panel_rows;
        float bias[kTileColumns] = {};
        Tile<Element> work;
        work.filters = static_cast<int>(std::min<int64_t>(kTileColumns, conv_.group_filters() - panel * kTileColumns));
        work.bias = bias;
        work.resume = chunk > 0;
        work.out_stride = conv_.filters;
        work.relu = epilogue_.relu;
        if (epilogue_.bias != nullptr) std::copy_n(epilogue_.bias + filter, work.filters, bias);
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
          work.weights_ahead = {next_weights + t * kDepthWords * weights_step, weights_step};
          work.inputs_ahead = {next_inputs[t], row < kTileRows ? inputs_step : 0};
          next_inputs[t] += panel_rows * row_bytes;
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

  // Whether a tile brings nearer what takes its own place next; else they do together what lies behind the block.
  bool by_rows() const { return kLookByRows && conv_.kernel_height == 1 && conv_.kernel_width == 1; }

  // Where the inputs begin that a tile brings nearer.
  const char* inputs_behind(int group, const std::vector<RowTile>& tiles, int64_t tile, int64_t chunk) const {
    const int64_t behind = tiles.back().pixels.end;
    if (!by_rows()) return rows_.ahead(group, behind, chunk) + tile * kDepthWords * kCacheLine / kStepWords;
    const bool last = chunk + 1 == rows_.chunks();
    const int64_t pixel = tiles[tile].pixels.begin + (last ? behind - tiles.front().pixels.begin : 0);
    return rows_.ahead(group, pixel, last ? 0 : chunk + 1);
  }

  const CpuConv& conv_;
  Gather<Element> rows_;
  RowTiles<Element> tiles_;
  const float* packed_;
  const ConvEpilogue& epilogue_;
  int64_t panels_;                // of a group
  int64_t blocks_, panel_parts_;  // the parts are these by those
  bool weights_outside_;
};

}  // namespace

template <typename Element>
int64_t gemm_packed_words(const CpuConv& conv) {
  const int64_t depth = int64_t{conv.group_channels()} * conv.kernel_height * conv.kernel_width;
  const int64_t panels = divided_up(conv.group_filters(), kTileColumns);
  return conv.groups * panels * kTileColumns * divided_up(depth, Element::kPerWord);
}

template <typename Element>
void gemm_pack(const CpuConv& conv, const ConvWeight& weight, float* packed) {
  using Storage = typename Element::Storage;
  std::vector<int64_t> places;  // in the order of the depth
  for (int row = 0; row < conv.kernel_height; ++row) {
    for (int column = 0; column < conv.kernel_width; ++column) {
      for (int channel = 0; channel < conv.group_channels(); ++channel) {
        places.push_back(weight.at(0, row, column, channel));
      }
    }
  }
  const int64_t depth = places.size(), words = divided_up(depth, Element::kPerWord);
  const int64_t filters = conv.group_filters(), panels = divided_up(filters, kTileColumns);
  in_parallel_over(conv.groups * panels, std::max(conv.threads, 1), [&](int64_t part) {
    const int64_t first = part % panels * kTileColumns, columns = std::min<int64_t>(kTileColumns, filters - first);
    const auto* const from =
        static_cast<const Storage*>(weight.data) + (part / panels * filters + first) * weight.filter;
    auto* to = reinterpret_cast<Storage*>(packed + part * words * kTileColumns);
    if (Element::kPerWord == 1 && columns == kTileColumns && weight.filter == 1) {
      for (const int64_t place : places) to = std::copy_n(from + place, kTileColumns, to);
      return;
    }
    if constexpr (Element::kPerWord == 1) {
      // Channels of a filter side by side, as channels_last has them: a square of lanes at a time.
      if (columns == kTileColumns && weight.channel == 1 && conv.group_channels() % kVectorLanes == 0) {
        for (int64_t k = 0; k < depth; k += kVectorLanes, to += kVectorLanes * kTileColumns) {
          for (int vector = 0; vector < kTileVectors; ++vector) {
            Vector square[kVectorLanes];
            const auto* const filters_of_it = from + places[k] + vector * kVectorLanes * weight.filter;
            for (int i = 0; i < kVectorLanes; ++i) square[i] = Element::load(filters_of_it + i * weight.filter);
            transpose(square);
            for (int i = 0; i < kVectorLanes; ++i) {
              Element::store(to + i * kTileColumns + vector * kVectorLanes, square[i]);
            }
          }
        }
        return;
      }
    }
    for (int64_t k = 0; k < words * Element::kPerWord; k += Element::kPerWord) {
      for (int64_t column = 0; column < kTileColumns; ++column) {
        for (int64_t i = k; i < k + Element::kPerWord; ++i) {
          *to++ = column < columns && i < depth ? from[places[i] + column * weight.filter] : Storage{0};
        }
      }
    }
  });
}

template <typename Element>
void gemm_run(const CpuConv& conv, const ConvInput& input, const float* packed, const ConvEpilogue& epilogue) {
  std::unique_ptr<Buffer> padded_image;
  const Source<typename Element::Storage> source = source_of<typename Element::Storage>(conv, input, padded_image);
  const GemmParts<Element> parts(conv, source, input, packed, epilogue);
  in_parallel_over(parts.count(), conv.threads, [&](int64_t part) { parts.run(part); });
}

template int64_t gemm_packed_words<Single>(const CpuConv&);
template void gemm_pack<Single>(const CpuConv&, const ConvWeight&, float*);
template void gemm_run<Single>(const CpuConv&, const ConvInput&, const float*, const ConvEpilogue&);
#if defined(__AVX512BF16__)
template int64_t gemm_packed_words<Brain>(const CpuConv&);
template void gemm_pack<Brain>(const CpuConv&, const ConvWeight&, float*);
template void gemm_run<Brain>(const CpuConv&, const ConvInput&, const float*, const ConvEpilogue&);
#endif

}  // namespace CPU_CAPABILITY
}  // namespace fused_resnet
