// What both ways to the gradient of a convolution's weights share. It is a matrix product: a row for every filter, a
// column for every place under the kernel (or, by Winograd's method, for every channel), and as depth the pixels of the
// output (or windows of them).
#pragma once

#include <algorithm>
#include <utility>

#include "methods.h"

namespace fused_resnet {
namespace CPU_CAPABILITY {

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

}  // namespace CPU_CAPABILITY
}  // namespace fused_resnet
