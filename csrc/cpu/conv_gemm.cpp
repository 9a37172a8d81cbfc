// A convolution as a matrix product: a row for every output pixel, a column for every filter, and as depth the inputs
// under the kernel, in the order (kernel row, kernel column, channel) of NHWC. Rows are gathered for a block of tiles
// and a part of the depth at a time, into memory that stays in the second cache; the whole matrix never exists.
#include <algorithm>
#include <vector>

#include "conv_methods.h"

namespace fused_resnet {
namespace CPU_CAPABILITY {
namespace {

constexpr int kBlockTiles = 8;    // whose inputs, 8 x 14 x 1 KiB, stay in the second cache
constexpr int kBlockPanels = 16;  // whose unfinished sums, 224 KiB with those tiles, do too
constexpr int kSmallRows = 8;     // tiles a thread: with fewer, threads share the filters, to read each weight once

// Where the rows come from: an image, or one with its padding around it.
template <typename Storage>
struct Source {
  const Storage* x;
  int height, width;
  int64_t pixel_stride;  // elements
  int run;               // contiguous elements for each place of the kernel
  int kernel_height, kernel_width;
  int padding_height, padding_width;
};

// Contiguous elements of every row: those of one place of the kernel, or a part of them.
struct Segment {
  int row, column;  // in the image, beside the window's upper left corner
  int first, count;
};

template <typename Element>
class GemmPart {
 public:
  using Storage = typename Element::Storage;

  GemmPart(const CpuConv& conv, const Source<Storage>& source, const float* packed, const ConvEpilogue& epilogue)
      : conv_(conv), source_(source), packed_(packed), epilogue_(epilogue) {
    const int64_t depth = int64_t{source.run} * source.kernel_height * source.kernel_width;
    for (int64_t begin = 0; begin < depth; begin += kDepthWords * Element::kPerWord) {
      chunks_.push_back(segments(begin, std::min(begin + kDepthWords * Element::kPerWord, depth)));
    }
    depth_words_ = divided_up(depth, Element::kPerWord);
  }

  // The outputs of these rows and these panels of one group.
  void run(int group, Share rows, Share panels) {
    const int64_t inputs = kBlockTiles * kTileRows * kRowWords;
    float* const memory = scratch().words(inputs + kBlockTiles * kBlockPanels * kTileSums);
    for (int64_t row = rows.begin; row < rows.end; row += kBlockTiles * kTileRows) {
      const int64_t row_end = std::min(row + kBlockTiles * kTileRows, rows.end);
      for (int64_t panel = panels.begin; panel < panels.end; panel += kBlockPanels) {
        run_block(group, {row, row_end}, {panel, std::min(panel + kBlockPanels, panels.end)}, memory, memory + inputs);
      }
    }
  }

 private:
  static Scratch& scratch() {
    thread_local Scratch scratch;
    return scratch;
  }

  std::vector<Segment> segments(int64_t begin, int64_t end) const {
    std::vector<Segment> found;
    while (begin < end) {
      const int64_t place = begin / source_.run, first = begin % source_.run;
      const int count = static_cast<int>(std::min(source_.run - first, end - begin));
      found.push_back({static_cast<int>(place / source_.kernel_width) * conv_.dilation_height,
                       static_cast<int>(place % source_.kernel_width) * conv_.dilation_width, static_cast<int>(first),
                       count});
      begin += count;
    }
    return found;
  }

  void run_block(int group, Share rows, Share panels, float* inputs, float* sums) const {
    const int64_t count = rows.end - rows.begin;
    const int64_t tiles = divided_up(count, kTileRows);
    const int64_t group_panels = divided_up(conv_.group_filters(), kTileColumns);
    for (size_t chunk = 0; chunk < chunks_.size(); ++chunk) {
      for (int64_t t = 0; t < tiles; ++t) {
        const Share tile = share(count, static_cast<int>(t), static_cast<int>(tiles));
        gather(group, rows.begin + tile.begin, static_cast<int>(tile.end - tile.begin), chunks_[chunk],
               inputs + t * kTileRows * kRowWords);
      }
      const int64_t before = static_cast<int64_t>(chunk) * kDepthWords;
      const int64_t depth = std::min<int64_t>(kDepthWords, depth_words_ - before);
      const bool last = chunk + 1 == chunks_.size();
      for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
        const int64_t column = panel * kTileColumns;
        const int64_t filter = int64_t{group} * conv_.group_filters() + column;
        Tile<Element> work;
        work.b = packed_ + (group * group_panels + panel) * depth_words_ * kTileColumns + before * kTileColumns;
        work.depth = depth;
        work.resume = chunk > 0;
        work.bias = nullptr;
        work.out_stride = conv_.filters;
        work.filters = static_cast<int>(std::min<int64_t>(kTileColumns, conv_.group_filters() - column));
        work.relu = epilogue_.relu;
        float bias[kTileColumns] = {};
        if (last) {
          std::copy_n(epilogue_.bias + filter, work.filters, bias);
          work.bias = bias;
        }
        // The block behind this one is read while this is multiplied, a part of it for each panel.
        const char* ahead = lines_ahead(group, rows.end, chunks_[chunk]);
        const int64_t ahead_step = panel == panels.begin ? kDepthWords * kCacheLine : 0;
        for (int64_t t = 0; t < tiles; ++t, ahead += ahead_step) {
          work.ahead = ahead;
          const Share tile = share(count, static_cast<int>(t), static_cast<int>(tiles));
          const int64_t first = (rows.begin + tile.begin) * conv_.filters + filter;
          work.a = inputs + t * kTileRows * kRowWords;
          work.sums = sums + ((panel - panels.begin) * kBlockTiles + t) * kTileSums;
          work.residual =
              epilogue_.residual == nullptr ? nullptr : static_cast<const Storage*>(epilogue_.residual) + first;
          work.out = static_cast<Storage*>(epilogue_.out) + first;
          multiply(work, static_cast<int>(tile.end - tile.begin));
        }
      }
    }
  }

  // Where the inputs of a pixel of the output begin that are likely not in a cache yet: under the last row of the
  // kernel. It may lie beyond the image, for it is only prefetched.
  const char* lines_ahead(int group, int64_t pixel, const std::vector<Segment>& chunk) const {
    const int64_t out_pixels = int64_t{conv_.out_height} * conv_.out_width;
    const int64_t image = pixel / out_pixels;
    const int64_t row = pixel % out_pixels / conv_.out_width * conv_.stride_height - source_.padding_height;
    const int64_t column = pixel % conv_.out_width * conv_.stride_width - source_.padding_width;
    const int64_t place = (image * source_.height + row + chunk.back().row) * source_.width + column;
    const int64_t element = place * source_.pixel_stride + int64_t{group} * source_.run + chunk.front().first;
    return reinterpret_cast<const char*>(reinterpret_cast<uintptr_t>(source_.x) + element * sizeof(Storage));
  }

  // The inputs of so many pixels of the output, those of a chunk of the depth.
  void gather(int group, int64_t first, int count, const std::vector<Segment>& chunk, float* to) const {
    const int64_t out_pixels = int64_t{conv_.out_height} * conv_.out_width;
    int64_t image = first / out_pixels;
    int row = static_cast<int>(first % out_pixels / conv_.out_width);
    int column = static_cast<int>(first % conv_.out_width);
    const Storage* const x = source_.x + int64_t{group} * source_.run;
    for (int pixel = 0; pixel < count; ++pixel, to += kRowWords) {
      const int top = row * conv_.stride_height - source_.padding_height;
      const int left = column * conv_.stride_width - source_.padding_width;
      const int64_t corner = ((image * source_.height + top) * source_.width + left) * source_.pixel_stride;
      auto* target = reinterpret_cast<Storage*>(to);
      for (const Segment& segment : chunk) {
        const bool inside = static_cast<unsigned>(top + segment.row) < static_cast<unsigned>(source_.height) &&
                            static_cast<unsigned>(left + segment.column) < static_cast<unsigned>(source_.width);
        if (inside) {
          const int64_t offset = (int64_t{segment.row} * source_.width + segment.column) * source_.pixel_stride;
          copy_bytes(target, x + corner + offset + segment.first, segment.count * sizeof(Storage));
        } else {
          std::memset(target, 0, segment.count * sizeof(Storage));
        }
        target += segment.count;
      }
      if constexpr (Element::kPerWord > 1) *target = 0;  // the other half of the last word, which has no weight
      if (++column == conv_.out_width) {
        column = 0;
        if (++row == conv_.out_height) {
          row = 0;
          ++image;
        }
      }
    }
  }

  const CpuConv& conv_;
  const Source<Storage>& source_;
  const float* packed_;
  const ConvEpilogue& epilogue_;
  std::vector<std::vector<Segment>> chunks_;
  int64_t depth_words_;
};

// An image with so few channels is copied with its padding around it: then the places of one row of the kernel are
// contiguous, and no window reaches beyond.
template <typename Storage>
bool is_narrow(const CpuConv& conv) {
  return conv.groups == 1 && conv.channels < kVectorLanes && conv.dilation_width == 1;
}

template <typename Storage>
Source<Storage> padded(const CpuConv& conv, const Storage* x, Scratch& memory) {
  const int height = conv.height + 2 * conv.padding_height, width = conv.width + 2 * conv.padding_width;
  const int64_t row_elements = int64_t{width} * conv.channels;
  auto* const to = reinterpret_cast<Storage*>(
      memory.words(divided_up(conv.images * height * row_elements * sizeof(Storage), sizeof(float))));
  in_parallel(conv.threads, [&](int part, int parts) {
    const Share rows = share(conv.images * height, part, parts);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      Storage* const target = to + row * row_elements;
      const int64_t from = row % height - conv.padding_height;
      std::fill_n(target, row_elements, Storage{0});
      if (from < 0 || from >= conv.height) continue;
      const int64_t elements = int64_t{conv.width} * conv.channels;
      std::copy_n(x + (row / height * conv.height + from) * elements, elements,
                  target + conv.padding_width * conv.channels);
    }
  });
  return {to, height, width, conv.channels, conv.kernel_width * conv.channels, conv.kernel_height, 1, 0, 0};
}

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
  thread_local Scratch padded_image;
  const Source<Storage> source = is_narrow<Storage>(conv) ? padded(conv, x, padded_image)
                                                          : Source<Storage>{x,
                                                                            conv.height,
                                                                            conv.width,
                                                                            conv.channels,
                                                                            conv.group_channels(),
                                                                            conv.kernel_height,
                                                                            conv.kernel_width,
                                                                            conv.padding_height,
                                                                            conv.padding_width};
  const int64_t panels = divided_up(conv.group_filters(), kTileColumns);
  const int64_t rows = conv.pixels();
  in_parallel(conv.threads, [&](int part, int parts) {
    GemmPart<Element> work(conv, source, packed, epilogue);
    const bool by_filters = rows < int64_t{kSmallRows} * kTileRows * parts && panels >= parts;
    const Share my_rows = by_filters ? Share{0, rows} : share(rows, part, parts);
    const Share my_panels = by_filters ? share(panels, part, parts) : Share{0, panels};
    for (int group = 0; group < conv.groups; ++group) work.run(group, my_rows, my_panels);
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
