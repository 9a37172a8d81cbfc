#include "rows.h"

#include <algorithm>

namespace fused_resnet {
namespace cuda {

int lanes_of(int channels, int vector) {
  const int64_t groups = ceil_div(channels, vector);
  int lanes = 1;
  while (lanes < 32 && lanes < groups) lanes *= 2;
  // 96 groups of 32 lanes are 3 full slices; 12 groups are 3 of 4 rather than one of 16 with a quarter idle, but never
  // less than a memory sector of 32 bytes.
  for (int fewer = lanes; fewer >= 4; fewer /= 2) {
    if (ceil_div(groups, fewer) * fewer * 8 <= groups * 9) return fewer;
  }
  return lanes;
}

Cover cover(const Matrix& shape, int vector, int rows_per_thread, int waves, int device, bool whole_warps) {
  const int lanes = whole_warps ? 32 : lanes_of(shape.channels, vector);
  const int layer = kThreads / lanes;
  const int64_t slices = ceil_div(shape.channels, int64_t{lanes} * vector);
  const int64_t tiles = ceil_div(shape.rows, int64_t{layer} * rows_per_thread);
  const int64_t blocks = int64_t{properties_of(device).multiprocessors} * kBlocksPerMultiprocessor * waves;
  const int64_t parts = std::clamp<int64_t>(blocks / slices, 1, std::min<int64_t>(tiles, 65535));
  return {{shape.rows, shape.channels, lanes, layer}, static_cast<int>(slices), static_cast<int>(parts)};
}

}  // namespace cuda
}  // namespace fused_resnet
