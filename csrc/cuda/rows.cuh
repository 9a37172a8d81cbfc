// How a grid covers an NHWC activation, seen as a row-major matrix of rows x channels.
//
// Of a block's threads `lanes` stand side by side along the channels, each with one Vector of a row, and the others in
// the rows below: `layer` rows at once. A tile is one or several layers. Block (i, j) owns the i-th slice of channels
// and, of its tiles, j, j + gridDim.y, ...: the grid sweeps the matrix from one end to the other, so that the next
// pass, which sweeps it the other way, finds in the L2 cache what this one touched last.
#pragma once

#include <type_traits>

#include "vector.cuh"

namespace fused_resnet {

constexpr int kThreads = 256;
constexpr int kBlocksPerMultiprocessor = 4;  // 1,024 threads of at most 64 registers

struct Rows {
  int64_t rows;
  int channels;
  int lanes;  // a power of two, at most 32
  int layer;  // threads of a block / lanes
};

// Where a thread stands: its channels, the same in every row, and its row within a layer.
template <int kCount>
struct Position {
  int lane, row, channel;
  bool inside;  // false beside the last channel: such a thread only takes part in barriers and warp operations

  __device__ __forceinline__ explicit Position(const Rows& shape)
      : lane(threadIdx.x & (shape.lanes - 1)),
        row(threadIdx.x / shape.lanes),
        channel((blockIdx.x * shape.lanes + lane) * kCount),
        inside(channel < shape.channels) {}
};

// A number of rows that the compiler knows.
template <int kRows>
using Count = std::integral_constant<int, kRows>;

// Takes a thread's rows of a tile, kRows of them a layer apart from `first` on: rows(Count<kRows>(), first, inside)
// where the whole tile lies in the matrix, so that nothing is asked row by row; else rows(Count<1>(), row, inside) for
// each, all threads of the block together, `inside` telling who has a row there.
template <int kRows, typename Position, typename Body>
__device__ __forceinline__ void take_tile(const Rows& shape, const Position& place, int64_t tile, const Body& rows) {
  const int64_t first = tile * (shape.layer * kRows) + place.row;
  if ((tile + 1) * (shape.layer * kRows) <= shape.rows) {
    rows(Count<kRows>(), first, place.inside);
  } else {
#pragma unroll 1
    for (int k = 0; k < kRows; ++k) {
      const int64_t row = first + k * shape.layer;
      rows(Count<1>(), row, place.inside && row < shape.rows);
    }
  }
}

// How the rows are dealt out to the blocks of a slice: what each has, without a division on the device.
struct Deal {
  int parts;
  int longer;  // the parts below this have one tile more than the others
  int tile_rows;
  int last;         // the part that has the last tile,
  int missing;      // which lacks as many rows
  int64_t shorter;  // rows of the parts that have a tile less

  static Deal of(int64_t rows, int tile_rows, int parts) {
    const int64_t tiles = (rows + tile_rows - 1) / tile_rows;
    return {parts,
            static_cast<int>(tiles % parts),
            tile_rows,
            static_cast<int>((tiles - 1) % parts),
            static_cast<int>(tiles * tile_rows - rows),
            tiles / parts * tile_rows};
  }
  __device__ __forceinline__ double rows_of(int part) const {
    return static_cast<double>(shorter + (part < longer ? tile_rows : 0) - (part == last ? missing : 0));
  }
};

}  // namespace fused_resnet
