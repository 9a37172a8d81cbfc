// A tile of outputs in registers: rows of pixels by columns of filters, and the product that fills it.
//
// A row of `a` holds one pixel's inputs in the order of the weights; a panel `b` holds kTileColumns filters for each
// input. Both are counted in words of 4 bytes: one float32, or a pair of bfloat16, which one instruction multiplies and
// adds. The rows are kRowWords apart, an odd number of cache lines, so that they do not compete for the same sets.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#if defined(__AVX2__)
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
constexpr int kStepWords = 1;
#elif defined(__AVX2__)
constexpr int kVectorLanes = 8;
constexpr int kTileRows = 6;  // 12 sums, 2 weights, 1 input
constexpr int kStepWords = 4;
#else
constexpr int kVectorLanes = 4;
constexpr int kTileRows = 6;
constexpr int kStepWords = 4;
#endif
// kStepWords: of depth, in one round of the loop, which looks ahead once: 12 products hide fewer other instructions
// than 28 do, above all where two threads share a core.
constexpr int kTileVectors = 2;
constexpr int kTileColumns = kTileVectors * kVectorLanes;
constexpr int kTileSums = kTileRows * kTileColumns;
constexpr int kDepthWords = 256;  // of a product: 14 rows of it are half of the first cache
constexpr int kRowWords = kDepthWords + 16;
constexpr int kCacheLine = 64;                     // bytes
constexpr int kPrefetchWords = 32 * kTileColumns;  // of weights: past the end of a page, where the processor's own ends

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
  static float widen(float stored) { return stored; }
  static Vector load(const float* from) { return load_vector(from); }
  static void store(float* to, Vector vector) { store_vector(to, vector); }
  static void store_two(float* to, Vector first, Vector second) {
    store(to, first);
    store(to + kVectorLanes, second);
  }
  static Vector multiply_add(Vector sum, Vector a, Vector b) { return sum + a * b; }
};

#if defined(__AVX512BF16__)
struct Brain {
  using Storage = uint16_t;
  static constexpr int kPerWord = 2;
  static float widen(uint16_t stored) { return BFloat16::load(stored); }
  static Vector load(const uint16_t* from) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    return reinterpret_cast<Vector>(_mm512_slli_epi32(wide, 16));
  }
  static void store(uint16_t* to, Vector vector) {
    const __m256bh rounded = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(vector));
    std::memcpy(to, &rounded, sizeof(rounded));
  }
  static void store_two(uint16_t* to, Vector first, Vector second) {
    const __m512bh rounded = _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(second), reinterpret_cast<__m512>(first));
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

// Rows to columns: lane i of rows[j] becomes lane j of rows[i].
inline void transpose(Vector (&rows)[kVectorLanes]) {
#if defined(__AVX512F__)
  __m512 twos[16], fours[16];
  for (int i = 0; i < 16; i += 2) {
    const auto a = reinterpret_cast<__m512>(rows[i]), b = reinterpret_cast<__m512>(rows[i + 1]);
    twos[i] = _mm512_unpacklo_ps(a, b);
    twos[i + 1] = _mm512_unpackhi_ps(a, b);
  }
  for (int i = 0; i < 16; i += 4) {
    fours[i] = _mm512_shuffle_ps(twos[i], twos[i + 2], 0x44);
    fours[i + 1] = _mm512_shuffle_ps(twos[i], twos[i + 2], 0xee);
    fours[i + 2] = _mm512_shuffle_ps(twos[i + 1], twos[i + 3], 0x44);
    fours[i + 3] = _mm512_shuffle_ps(twos[i + 1], twos[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {  // what is left is a transposition of four times four quarters
    const __m512 first = _mm512_shuffle_f32x4(fours[i], fours[i + 4], 0x44);
    const __m512 second = _mm512_shuffle_f32x4(fours[i + 8], fours[i + 12], 0x44);
    const __m512 third = _mm512_shuffle_f32x4(fours[i], fours[i + 4], 0xee);
    const __m512 fourth = _mm512_shuffle_f32x4(fours[i + 8], fours[i + 12], 0xee);
    rows[i] = reinterpret_cast<Vector>(_mm512_shuffle_f32x4(first, second, 0x88));
    rows[i + 4] = reinterpret_cast<Vector>(_mm512_shuffle_f32x4(first, second, 0xdd));
    rows[i + 8] = reinterpret_cast<Vector>(_mm512_shuffle_f32x4(third, fourth, 0x88));
    rows[i + 12] = reinterpret_cast<Vector>(_mm512_shuffle_f32x4(third, fourth, 0xdd));
  }
#elif defined(__AVX2__)
  __m256 twos[8], fours[8];
  for (int i = 0; i < 8; i += 2) {
    const auto a = reinterpret_cast<__m256>(rows[i]), b = reinterpret_cast<__m256>(rows[i + 1]);
    twos[i] = _mm256_unpacklo_ps(a, b);
    twos[i + 1] = _mm256_unpackhi_ps(a, b);
  }
  for (int i = 0; i < 8; i += 4) {
    fours[i] = _mm256_shuffle_ps(twos[i], twos[i + 2], 0x44);
    fours[i + 1] = _mm256_shuffle_ps(twos[i], twos[i + 2], 0xee);
    fours[i + 2] = _mm256_shuffle_ps(twos[i + 1], twos[i + 3], 0x44);
    fours[i + 3] = _mm256_shuffle_ps(twos[i + 1], twos[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    rows[i] = reinterpret_cast<Vector>(_mm256_permute2f128_ps(fours[i], fours[i + 4], 0x20));
    rows[i + 4] = reinterpret_cast<Vector>(_mm256_permute2f128_ps(fours[i], fours[i + 4], 0x31));
  }
#else
  float all[kVectorLanes][kVectorLanes];
  for (int i = 0; i < kVectorLanes; ++i) store_vector(all[i], rows[i]);
  for (int i = 0; i < kVectorLanes; ++i) {
    float column[kVectorLanes];
    for (int j = 0; j < kVectorLanes; ++j) column[j] = all[j][i];
    rows[i] = load_vector(column);
  }
#endif
}

// max(value, 0), except that a NaN stays a NaN, as in torch.relu.
inline Vector relu_of(Vector value) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vector>(_mm512_max_ps(_mm512_setzero_ps(), reinterpret_cast<__m512>(value)));
#elif defined(__AVX2__)
  return reinterpret_cast<Vector>(_mm256_max_ps(_mm256_setzero_ps(), reinterpret_cast<__m256>(value)));
#else
  return value <= Vector{} ? Vector{} : value;
#endif
}

// Memory that is brought nearer while a tile is multiplied, `step` bytes for each word of depth.
struct Ahead {
  const char* from;
  int64_t step;
};

// What is done with the sums of a tile. Of each row, `filters` outputs exist, 1 to kTileColumns.
template <typename Element>
struct Tile {
  const float* a;                             // rows of inputs, kRowWords apart
  const float* b;                             // a panel of weights: `depth` words for each of kTileColumns filters
  int64_t depth;                              // in words
  float* sums;                                // kTileSums of the depth before this one, or for the depth behind it
  bool resume;                                // these are added to the sums
  const float* bias;                          // of kTileColumns filters; unread where `out` is null
  const typename Element::Storage* residual;  // of the first output, or null
  typename Element::Storage* out;             // the first output; null: the sums are stored, nothing else
  int64_t out_stride;                         // elements from one row to the next, of the residual's too
  int filters;
  bool relu;
  Ahead weights_ahead, inputs_ahead;  // of what comes after this tile
};

// The epilogue of one row.
template <typename Element, bool residual, bool relu>
inline void finish(const Tile<Element>& tile, int row, Vector first, Vector second) {
  const int64_t offset = row * tile.out_stride;
  if (tile.filters == kTileColumns) {
    if constexpr (residual) {
      first += Element::load(tile.residual + offset);
      second += Element::load(tile.residual + offset + kVectorLanes);
    }
    Element::store_two(tile.out + offset, relu ? relu_of(first) : first, relu ? relu_of(second) : second);
    return;
  }
  const Vector both[kTileVectors] = {first, second};
  for (int vector = 0; vector < kTileVectors; ++vector) {
    const int lanes = std::min(tile.filters - vector * kVectorLanes, kVectorLanes);
    if (lanes <= 0) return;
    const int64_t place = offset + vector * kVectorLanes;
    Vector value = both[vector];
    if constexpr (residual) value += load_some<Element>(tile.residual + place, lanes);
    store_some<Element>(tile.out + place, relu ? relu_of(value) : value, lanes);
  }
}

// With AVX2 a panel of outputs is one cache line of each row. While it is multiplied, those of the next panel come
// nearer: in front of few channels there is too little to multiply to wait for its own.
constexpr int kOutputsAhead = kStepWords == 1 ? 0 : kTileColumns;

// The outputs of a row, which come one cache line after the other, wanted for writing.
template <typename Storage>
inline void prefetch_row(Storage* row) {
  constexpr bool kWritten = !std::is_const_v<Storage>;
  __builtin_prefetch(row, kWritten);
  if (kTileColumns * sizeof(Storage) > kCacheLine) __builtin_prefetch(row + kTileColumns - 1, kWritten);
}

template <typename Element, int rows>
inline void prefetch_outputs(const Tile<Element>& tile) {
  for (int row = 0; row < rows; ++row) {
    const int64_t offset = row * tile.out_stride + kOutputsAhead;
    if (tile.residual != nullptr) prefetch_row(tile.residual + offset);
    prefetch_row(tile.out + offset);
  }
}

// The sums of a tile: inputs(row, k) is a row's input at k words of the depth. Where `fetch_weights`, they are brought
// into the first cache in front of their use; the processor does so itself, but not across pages.
template <typename Element, bool fetch_weights, int rows, typename Inputs>
__attribute__((always_inline)) inline void add_products(Vector (&sum)[rows][kTileVectors], const Inputs& inputs,
                                                        const float* b, int64_t depth, Ahead weights_ahead,
                                                        Ahead inputs_ahead) {
  const auto add = [&](int64_t k) __attribute__((always_inline)) {
    const float* const weights = b + k * kTileColumns;
    const Vector first = load_vector(weights), second = load_vector(weights + kVectorLanes);
    if (fetch_weights) __builtin_prefetch(weights + kPrefetchWords);
    if (fetch_weights && kTileColumns * sizeof(float) > kCacheLine)
      __builtin_prefetch(weights + kPrefetchWords + kVectorLanes);
#pragma GCC unroll 14
    for (int row = 0; row < rows; ++row) {
      const Vector input = broadcast(inputs(row, k));
      sum[row][0] = Element::multiply_add(sum[row][0], input, first);
      sum[row][1] = Element::multiply_add(sum[row][1], input, second);
    }
  };
  int64_t k = 0;
  for (; k + kStepWords <= depth; k += kStepWords) {
#pragma GCC unroll 4
    for (int i = 0; i < kStepWords; ++i) {
      if (i == 0) __builtin_prefetch(weights_ahead.from + k * weights_ahead.step, 0, 2);
      if (i == kStepWords / 2) __builtin_prefetch(inputs_ahead.from + (k + i) * inputs_ahead.step, 0, 2);
      add(k + i);
    }
  }
  for (; k < depth; ++k) add(k);
}

// The epilogue of all rows.
template <typename Element, int rows>
__attribute__((always_inline)) inline void finish_tile(const Tile<Element>& tile,
                                                       const Vector (&sum)[rows][kTileVectors]) {
  const Vector bias = load_vector(tile.bias), bias2 = load_vector(tile.bias + kVectorLanes);
  const auto finish_all = [&](auto residual, auto relu) {
#pragma GCC unroll 14
    for (int row = 0; row < rows; ++row) {
      finish<Element, decltype(residual)::value, decltype(relu)::value>(tile, row, sum[row][0] + bias,
                                                                        sum[row][1] + bias2);
    }
  };
  if (tile.residual != nullptr && tile.relu) return finish_all(std::true_type{}, std::true_type{});
  if (tile.residual != nullptr) return finish_all(std::true_type{}, std::false_type{});
  if (tile.relu) return finish_all(std::false_type{}, std::true_type{});
  finish_all(std::false_type{}, std::false_type{});
}

template <typename Element, bool fetch_weights, int rows>
void multiply(const Tile<Element>& tile) {
  Vector sum[rows][kTileVectors];
#pragma GCC unroll 14
  for (int row = 0; row < rows; ++row) sum[row][0] = sum[row][1] = Vector{};
  if (tile.out != nullptr) prefetch_outputs<Element, rows>(tile);
  const float* const a = tile.a;
  add_products<Element, fetch_weights>(
      sum, [a](int row, int64_t k) __attribute__((always_inline)) { return a[row * kRowWords + k]; }, tile.b,
      tile.depth, tile.weights_ahead, tile.inputs_ahead);
  // Added behind the products, as the bias is: sums of fewer and smaller numbers are rounded less.
  if (tile.resume) {
#pragma GCC unroll 14
    for (int row = 0; row < rows; ++row) {
      sum[row][0] += load_vector(tile.sums + row * kTileColumns);
      sum[row][1] += load_vector(tile.sums + row * kTileColumns + kVectorLanes);
    }
  }
  if (tile.out == nullptr) {
#pragma GCC unroll 14
    for (int row = 0; row < rows; ++row) {
      store_vector(tile.sums + row * kTileColumns, sum[row][0]);
      store_vector(tile.sums + row * kTileColumns + kVectorLanes, sum[row][1]);
    }
    return;
  }
  finish_tile<Element, rows>(tile, sum);
}

template <typename Element, bool fetch_weights, int... rows>
inline void multiply_rows(const Tile<Element>& tile, int count, std::integer_sequence<int, rows...>) {
  using Function = void (*)(const Tile<Element>&);
  static constexpr Function kFunctions[] = {multiply<Element, fetch_weights, rows + 1>...};
  kFunctions[count - 1](tile);
}

// Multiplies the first `rows` rows, 1 to kTileRows.
template <typename Element, bool fetch_weights>
void multiply(const Tile<Element>& tile, int rows) {
  multiply_rows<Element, fetch_weights>(tile, rows, std::make_integer_sequence<int, kTileRows>{});
}

}  // namespace CPU_CAPABILITY
}  // namespace fused_resnet
