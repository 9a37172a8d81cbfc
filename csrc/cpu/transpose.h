// Rows to columns.
#pragma once

#include <algorithm>

#include "tile.h"

namespace fused_resnet {
namespace CPU_CAPABILITY {

// to[lane * stride + i] = rows[i][lane].
inline void transpose(const Vector (&rows)[kVectorLanes], float* to, int64_t stride) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  __m256 pairs[8], fours[8];
  for (int i = 0; i < 8; i += 2) {
    const auto a = reinterpret_cast<__m256>(rows[i]), b = reinterpret_cast<__m256>(rows[i + 1]);
    pairs[i] = _mm256_unpacklo_ps(a, b);
    pairs[i + 1] = _mm256_unpackhi_ps(a, b);
  }
  for (int i = 0; i < 8; i += 4) {
    fours[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
    fours[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
    fours[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
    fours[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(to + i * stride, _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x20));
    _mm256_storeu_ps(to + (i + 4) * stride, _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x31));
  }
#else
  float all[kVectorLanes][kVectorLanes];
  for (int i = 0; i < kVectorLanes; ++i) store_vector(all[i], rows[i]);
  for (int lane = 0; lane < kVectorLanes; ++lane) {
    for (int i = 0; i < kVectorLanes; ++i) to[lane * stride + i] = all[i][lane];
  }
#endif
}

// to[column * to_stride + row] = from[row * from_stride + column]. `to` has room for kVectorLanes rows more.
inline void transpose(const float* from, int64_t from_stride, int64_t rows, int64_t columns, float* to,
                      int64_t to_stride) {
  for (int64_t row = 0; row < rows; row += kVectorLanes) {
    const int64_t some = std::min<int64_t>(kVectorLanes, rows - row);
    int64_t column = 0;
    for (; some == kVectorLanes && column + kVectorLanes <= columns; column += kVectorLanes) {
      Vector block[kVectorLanes];
      for (int i = 0; i < kVectorLanes; ++i) block[i] = load_vector(from + (row + i) * from_stride + column);
      transpose(block, to + column * to_stride + row, to_stride);
    }
    for (; column < columns; ++column) {
      for (int64_t i = 0; i < some; ++i) to[column * to_stride + row + i] = from[(row + i) * from_stride + column];
    }
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace fused_resnet
