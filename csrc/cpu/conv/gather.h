// The rows of the matrix that conv_gemm.cpp multiplies: of every output pixel the inputs under the kernel.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/buffers.h"
#include "methods.h"

namespace fused_resnet {
namespace CPU_CAPABILITY {

// Where the rows come from: an image, or one with its padding around it.
template <typename Storage>
struct Source {
  const Storage* x;
  int height, width;
  int64_t pixel_stride;  // elements
  int run;               // contiguous elements for each place of the kernel
  int kernel_height, kernel_width;
  int padding_height, padding_width;
  bool overrun;  // kOverrun bytes behind any element may be read
};
constexpr int kOverrun = 64;

// Contiguous elements of every row.
struct Segment {
  int row, column;  // of their pixel, beside the window's upper left corner
  int64_t offset;   // from that corner's first element
  int64_t count;
  int64_t channel;  // of the group
};

// A part of the depth.
struct Chunk {
  std::vector<Segment> of_places;  // of the kernel
  std::vector<Segment> of_rows;    // of the kernel, for windows inside the image; empty if these are not contiguous
};

template <typename Element>
class Gather {
 public:
  using Storage = typename Element::Storage;

  Gather(const CpuConv& conv, const Source<Storage>& source, const ConvInput& input)
      : conv_(conv), source_(source), input_(input) {
    const bool contiguous = source.run == source.pixel_stride && conv.dilation_width == 1;
    depth_ = int64_t{source.run} * source.kernel_height * source.kernel_width;
    for (int64_t begin = 0; begin < depth_; begin += kDepthWords * Element::kPerWord) {
      const int64_t end = std::min(begin + kDepthWords * Element::kPerWord, depth_);
      chunks_.push_back({segments(begin, end, source.run), {}});
      if (contiguous) chunks_.back().of_rows = segments(begin, end, int64_t{source.run} * source.kernel_width);
    }
  }

  int64_t chunks() const { return static_cast<int64_t>(chunks_.size()); }
  int64_t depth_words() const { return divided_up(depth_, Element::kPerWord); }

  // What of the depth, in words, is not beyond the image above or below for all of these pixels.
  Share depth_inside(Share pixels) const {
    const int64_t out_pixels = int64_t{conv_.out_height} * conv_.out_width;
    const int64_t row_elements = int64_t{source_.run} * source_.kernel_width;
    const int64_t last = pixels.end - 1;
    if (pixels.begin / out_pixels != last / out_pixels || row_elements % Element::kPerWord != 0)
      return {0, depth_words()};
    const int64_t top = pixels.begin % out_pixels / conv_.out_width * conv_.stride_height - source_.padding_height;
    const int64_t last_top = last % out_pixels / conv_.out_width * conv_.stride_height - source_.padding_height;
    int64_t begin = 0, end = source_.kernel_height;  // rows of the kernel
    while (begin < end && last_top + begin * conv_.dilation_height < 0) ++begin;
    while (end > begin && top + (end - 1) * conv_.dilation_height >= source_.height) --end;
    return {begin * row_elements / Element::kPerWord, end * row_elements / Element::kPerWord};
  }

  // Of these pixels of the output the inputs of a chunk, kRowWords apart.
  void gather(int group, Share pixels, int64_t chunk, float* to) const {
    const int64_t out_pixels = int64_t{conv_.out_height} * conv_.out_width;
    int64_t image = pixels.begin / out_pixels;
    int row = static_cast<int>(pixels.begin % out_pixels / conv_.out_width);
    int column = static_cast<int>(pixels.begin % conv_.out_width);
    const Storage* const x = source_.x + int64_t{group} * source_.run;
    const auto& [of_places, of_rows] = chunks_[chunk];
    const int window_height = (source_.kernel_height - 1) * conv_.dilation_height + 1;
    const int window_width = (source_.kernel_width - 1) * conv_.dilation_width + 1;
    for (int64_t pixel = pixels.begin; pixel < pixels.end; ++pixel, to += kRowWords) {
      const int top = row * conv_.stride_height - source_.padding_height;
      const int left = column * conv_.stride_width - source_.padding_width;
      const int64_t corner = ((image * source_.height + top) * source_.width + left) * source_.pixel_stride;
      auto* const target = reinterpret_cast<Storage*>(to);
      Storage* behind;
      if (input_.mean != nullptr) {
        behind = normalise(x, corner, int64_t{group} * source_.run, top, left, of_places, target);
      } else if (top >= 0 && left >= 0 && top + window_height <= source_.height &&
                 left + window_width <= source_.width) {
        behind = copy_inside(x + corner, of_rows.empty() ? of_places : of_rows, target);
      } else {
        behind = copy_across_border(x, corner, top, left, of_places, target);
      }
      if constexpr (Element::kPerWord > 1) *behind = 0;  // the other half of the last word, which has no weight
      if (++column == conv_.out_width) {
        column = 0;
        if (++row == conv_.out_height) {
          row = 0;
          ++image;
        }
      }
    }
  }

  // Where the inputs of a pixel of the output lie that are likely not in a cache yet: under the last place of the
  // kernel in this chunk. It may be beyond the image, for it is only prefetched.
  const char* ahead(int group, int64_t pixel, int64_t chunk) const {
    const int64_t out_pixels = int64_t{conv_.out_height} * conv_.out_width;
    const int64_t image = pixel / out_pixels;
    const int64_t row = pixel % out_pixels / conv_.out_width * conv_.stride_height - source_.padding_height;
    const int64_t column = pixel % conv_.out_width * conv_.stride_width - source_.padding_width;
    const int64_t corner = ((image * source_.height + row) * source_.width + column) * source_.pixel_stride;
    const int64_t element = corner + chunks_[chunk].of_places.back().offset + int64_t{group} * source_.run;
    return reinterpret_cast<const char*>(reinterpret_cast<uintptr_t>(source_.x) + element * sizeof(Storage));
  }

 private:
  // From `begin` to `end` of the depth, cut where one of `run` elements ends.
  std::vector<Segment> segments(int64_t begin, int64_t end, int64_t run) const {
    std::vector<Segment> found;
    while (begin < end) {
      const int64_t place = begin / source_.run;
      const int64_t count = std::min(run - begin % run, end - begin);
      const int row = static_cast<int>(place / source_.kernel_width) * conv_.dilation_height;
      const int column = static_cast<int>(place % source_.kernel_width) * conv_.dilation_width;
      const int64_t pixel = int64_t{row} * source_.width + column;
      found.push_back({row, column, pixel * source_.pixel_stride + begin % source_.run, count, begin % source_.run});
      begin += count;
    }
    return found;
  }

  Storage* copy_inside(const Storage* corner, const std::vector<Segment>& segments, Storage* to) const {
    if (source_.overrun) {
      for (const Segment& segment : segments) {
        copy_and_more(to, corner + segment.offset, segment.count * sizeof(Storage));
        to += segment.count;
      }
    } else {
      for (const Segment& segment : segments) {
        copy_bytes(to, corner + segment.offset, segment.count * sizeof(Storage));
        to += segment.count;
      }
    }
    return to;
  }

  // `corner` may lie beyond the image.
  Storage* copy_across_border(const Storage* x, int64_t corner, int top, int left, const std::vector<Segment>& segments,
                              Storage* to) const {
    for (const Segment& segment : segments) {
      const bool inside = static_cast<unsigned>(top + segment.row) < static_cast<unsigned>(source_.height) &&
                          static_cast<unsigned>(left + segment.column) < static_cast<unsigned>(source_.width);
      if (inside) {
        copy_bytes(to, x + corner + segment.offset, segment.count * sizeof(Storage));
      } else {
        std::memset(to, 0, segment.count * sizeof(Storage));
      }
      to += segment.count;
    }
    return to;
  }

  // With the norm and ReLU in front of the convolution; `corner` may lie beyond the image.
  Storage* normalise(const Storage* x, int64_t corner, int64_t first_channel, int top, int left,
                     const std::vector<Segment>& segments, Storage* to) const {
    for (const Segment& segment : segments) {
      const bool inside = static_cast<unsigned>(top + segment.row) < static_cast<unsigned>(source_.height) &&
                          static_cast<unsigned>(left + segment.column) < static_cast<unsigned>(source_.width);
      if (!inside) {
        to = std::fill_n(to, segment.count, Storage{0});
        continue;
      }
      const Storage* const from = x + corner + segment.offset;
      for (int64_t i = 0; i < segment.count; i += kVectorLanes) {
        const int lanes = static_cast<int>(std::min<int64_t>(kVectorLanes, segment.count - i));
        const Vector value = normalised<Element>(input_, from + i, first_channel + segment.channel + i, lanes);
        if (lanes == kVectorLanes) {
          Element::store(to + i, value);
        } else {
          store_some<Element>(to + i, value, lanes);
        }
      }
      to += segment.count;
    }
    return to;
  }

  // Copies up to kOverrun bytes more, which the next segment, or nobody, overwrites: a row has kRowWords. Stores with a
  // mask are slow on some processors.
  static void copy_and_more(void* to, const void* from, int64_t bytes) {
    for (int64_t done = 0; done < bytes; done += kOverrun) {
      std::memcpy(static_cast<char*>(to) + done, static_cast<const char*>(from) + done, kOverrun);
    }
  }

  const CpuConv& conv_;
  const Source<Storage>& source_;
  const ConvInput& input_;
  int64_t depth_;
  std::vector<Chunk> chunks_;
};

// An image with so few channels is copied with its padding around it: then the places of one row of the kernel are
// contiguous, and no window reaches beyond.
template <typename Storage>
bool is_narrow(const CpuConv& conv) {
  const auto fits = [](int size, int padding, int out, int stride, int reach) {
    return padding >= 0 && (out - 1) * stride + reach <= size + 2 * padding;
  };
  return conv.groups == 1 && conv.channels < kVectorLanes && conv.dilation_width == 1 &&
         fits(conv.height, conv.padding_height, conv.out_height, conv.stride_height,
              (conv.kernel_height - 1) * conv.dilation_height + 1) &&
         fits(conv.width, conv.padding_width, conv.out_width, conv.stride_width, conv.kernel_width);
}

template <typename Storage>
Source<Storage> padded(const CpuConv& conv, const Storage* x, std::unique_ptr<Buffer>& memory) {
  const int height = conv.height + 2 * conv.padding_height, width = conv.width + 2 * conv.padding_width;
  const int64_t row_elements = int64_t{width} * conv.channels;
  memory = std::make_unique<Buffer>(conv.images * height * row_elements * sizeof(Storage) + kOverrun);
  auto* const to = static_cast<Storage*>(memory->data());
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
  return {to, height, width, conv.channels, conv.kernel_width * conv.channels, conv.kernel_height, 1, 0, 0, true};
}

// `memory` holds the padded image, if there is one: of the whole batch, so not kept by a thread.
template <typename Storage>
Source<Storage> source_of(const CpuConv& conv, const ConvInput& input, std::unique_ptr<Buffer>& memory) {
  const auto* const x = static_cast<const Storage*>(input.x);
  if (input.mean == nullptr && is_narrow<Storage>(conv)) return padded(conv, x, memory);
  return {x,
          conv.height,
          conv.width,
          conv.channels,
          conv.group_channels(),
          conv.kernel_height,
          conv.kernel_width,
          conv.padding_height,
          conv.padding_width,
          false};
}

}  // namespace CPU_CAPABILITY
}  // namespace fused_resnet
