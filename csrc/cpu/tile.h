// A tile of outputs in registers: rows of pixels by columns of filters, and the product that fills it.
//
// A row of `a` holds one pixel's inputs in the order of the weights; a panel `b` holds kTileColumns filters for each
// input. Both are counted in words of 4 bytes: one float32, or a pair of bfloat16, which one instruction multiplies and
// adds. The rows are kRowWords apart, an odd number of cache lines, so that they do not compete for the same sets.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#if defined(__AVX512F__)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // in the header itself: gcc's bug 105593
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#endif

#include "element.h"

namespace fused_resnet {
namespace CPU_CAPABILITY {

#if defined(__AVX512F__)
constexpr int kVectorLanes = 16;
constexpr int kTileRows = 14;  // divides every image size of a ResNet at 224x224; 28 sums, 2 weights, 1 input
#elif defined(__AVX2__)
constexpr int kVectorLanes = 8;
constexpr int kTileRows = 6;
#else
constexpr int kVectorLanes = 4;
constexpr int kTileRows = 6;
#endif
constexpr int kTileVectors = 2;
constexpr int kTileColumns = kTileVectors * kVectorLanes;
constexpr int kTileSums = kTileRows * kTileColumns;
constexpr int kDepthWords = 256;  // of a product: 14 rows of it are half of the first cache
constexpr int kRowWords = kDepthWords + 16;
constexpr int kCacheLine = 64;                     // bytes
constexpr int kPrefetchWords = 32 * kTileColumns;  // of weights: a page, at whose end the processor's own prefetch ends

using Vector = float __attribute__((vector_size(kVectorLanes * sizeof(float))));

inline Vector load_vector(const float* from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof(vector));
  return vector;
}
inline void store_vector(float* to, Vector vector) { std::memcpy(to, &vector, sizeof(vector)); }
inline Vector broadcast(float value) { return value - Vector{}; }  // +: would turn -0 into 0, so gcc would add

// Elements of memory by the vector, and the product of two words.
struct Single {
  using Storage = float;
  static constexpr int kPerWord = 1;
  static Vector load(const float* from) { return load_vector(from); }
  static void store(float* to, Vector vector) { store_vector(to, vector); }
  static Vector multiply_add(Vector sum, Vector a, Vector b) { return sum + a * b; }
};

#if defined(__AVX512BF16__)
struct Brain {
  using Storage = uint16_t;
  static constexpr int kPerWord = 2;
  static Vector load(const uint16_t* from) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    return reinterpret_cast<Vector>(_mm512_slli_epi32(wide, 16));
  }
  static void store(uint16_t* to, Vector vector) {
    const __m256bh rounded = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(vector));
    std::memcpy(to, &rounded, sizeof(rounded));
  }
  static Vector multiply_add(Vector sum, Vector a, Vector b) {
    return reinterpret_cast<Vector>(
        _mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b)));
  }
};
#endif

// The first `lanes` of a vector, and zeros; lanes is 1 to kVectorLanes.
template <typename Element>
Vector load_some(const typename Element::Storage* from, int lanes) {
  typename Element::Storage whole[kVectorLanes] = {};
  std::memcpy(whole, from, lanes * sizeof(whole[0]));
  return Element::load(whole);
}
template <typename Element>
void store_some(typename Element::Storage* to, Vector vector, int lanes) {
  typename Element::Storage whole[kVectorLanes];
  Element::store(whole, vector);
  std::memcpy(to, whole, lanes * sizeof(whole[0]));
}

// max(value, 0), except that a NaN stays a NaN, as in torch.relu.
inline Vector relu_of(Vector value) { return value <= Vector{} ? Vector{} : value; }

// What is done with the sums of a tile. Of each row, `filters` outputs exist, 1 to kTileColumns.
template <typename Element>
struct Tile {
  const float* a;                             // rows of inputs, kRowWords apart
  const float* b;                             // a panel of weights: `depth` words for each of kTileColumns filters
  int64_t depth;                              // in words
  float* sums;                                // kTileSums of the depth before this one, or for the depth behind it
  bool resume;                                // the sums begin with these; else with 0
  const float* bias;                          // of kTileColumns filters; null: the sums are stored, nothing else
  const typename Element::Storage* residual;  // of the first output, or null
  typename Element::Storage* out;             // the first output
  int64_t out_stride;                         // elements from one row to the next, of the residual's too
  int filters;
  bool relu;
  const char* ahead;  // a cache line for each word of depth that a later tile will read; never null
};

template <typename Element>
inline void finish(const Tile<Element>& tile, int row, int vector, Vector value) {
  const int64_t offset = row * tile.out_stride + vector * kVectorLanes;
  const int lanes = tile.filters - vector * kVectorLanes;
  if (lanes >= kVectorLanes) {
    if (tile.residual != nullptr) value += Element::load(tile.residual + offset);
    Element::store(tile.out + offset, tile.relu ? relu_of(value) : value);
  } else if (lanes > 0) {
    if (tile.residual != nullptr) value += load_some<Element>(tile.residual + offset, lanes);
    store_some<Element>(tile.out + offset, tile.relu ? relu_of(value) : value, lanes);
  }
}

// The outputs of a row, which come one cache line after the other, wanted for writing.
template <typename Storage>
inline void prefetch_row(Storage* row) {
  constexpr bool kWritten = !std::is_const_v<Storage>;
  __builtin_prefetch(row, kWritten);
  __builtin_prefetch(row + kTileColumns - 1, kWritten);
}

template <typename Element, int rows>
void multiply(const Tile<Element>& tile) {
  Vector sum[rows][kTileVectors];
  if (tile.resume) {
#pragma GCC unroll 28
    for (int i = 0; i < rows * kTileVectors; ++i)
      sum[i / kTileVectors][i % kTileVectors] = load_vector(tile.sums + i * kVectorLanes);
  } else {
#pragma GCC unroll 28
    for (int i = 0; i < rows * kTileVectors; ++i) sum[i / kTileVectors][i % kTileVectors] = Vector{};
  }
  if (tile.bias != nullptr) {
    for (int row = 0; row < rows; ++row) {
      const int64_t offset = row * tile.out_stride;
      if (tile.residual != nullptr) prefetch_row(tile.residual + offset);
      prefetch_row(tile.out + offset);
    }
  }
  const char* const ahead = tile.ahead;
  const float* const a = tile.a;
  const float* b = tile.b;
  for (int64_t k = 0; k < tile.depth; ++k, b += kTileColumns) {
    const Vector first = load_vector(b), second = load_vector(b + kVectorLanes);
    __builtin_prefetch(b + kPrefetchWords);
    __builtin_prefetch(b + kPrefetchWords + kVectorLanes);
    __builtin_prefetch(ahead + k * kCacheLine, 0, 2);
#pragma GCC unroll 14
    for (int row = 0; row < rows; ++row) {
      const Vector input = broadcast(a[row * kRowWords + k]);
      sum[row][0] = Element::multiply_add(sum[row][0], input, first);
      sum[row][1] = Element::multiply_add(sum[row][1], input, second);
    }
  }
  if (tile.bias == nullptr) {
#pragma GCC unroll 28
    for (int i = 0; i < rows * kTileVectors; ++i)
      store_vector(tile.sums + i * kVectorLanes, sum[i / kTileVectors][i % kTileVectors]);
    return;
  }
  const Vector first = load_vector(tile.bias), second = load_vector(tile.bias + kVectorLanes);
#pragma GCC unroll 14
  for (int row = 0; row < rows; ++row) {
    finish(tile, row, 0, sum[row][0] + first);
    finish(tile, row, 1, sum[row][1] + second);
  }
}

template <typename Element, int... rows>
inline void multiply_rows(const Tile<Element>& tile, int count, std::integer_sequence<int, rows...>) {
  using Function = void (*)(const Tile<Element>&);
  static constexpr Function kFunctions[] = {multiply<Element, rows + 1>...};
  kFunctions[count - 1](tile);
}

// Multiplies the first `rows` rows, 1 to kTileRows.
template <typename Element>
void multiply(const Tile<Element>& tile, int rows) {
  multiply_rows(tile, rows, std::make_integer_sequence<int, kTileRows>{});
}

}  // namespace CPU_CAPABILITY
}  // namespace fused_resnet
