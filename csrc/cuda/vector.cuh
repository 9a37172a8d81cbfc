// Several consecutive elements of a row, moved by one instruction and computed with as float32.
#pragma once

#include "device.cuh"

namespace fused_resnet {

// kCount elements of type T as they lie in memory: 16 or 8 bytes, or one element.
template <typename T, int kCount>
struct Vector {
  static constexpr int kWords = static_cast<int>(kCount * sizeof(T) / sizeof(uint32_t));
  static_assert(kWords == 4 || kWords == 2, "16 or 8 bytes");
  uint32_t words[kWords];

  static constexpr int kPerWord = kCount / kWords;

  // Elements kPerWord * i and the next one, if a word holds two.
  __device__ __forceinline__ void unpack_word(int i, float (&values)[kPerWord]) const {
    if constexpr (kPerWord == 1) {
      values[0] = __uint_as_float(words[i]);
    } else {
      values[0] = widen(T{static_cast<uint16_t>(words[i])});
      values[1] = widen(T{static_cast<uint16_t>(words[i] >> 16)});
    }
  }
  __device__ __forceinline__ void unpack(float (&values)[kCount]) const {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      float word[kPerWord];
      unpack_word(i, word);
#pragma unroll
      for (int k = 0; k < kPerWord; ++k) values[i * kPerWord + k] = word[k];
    }
  }

  __device__ __forceinline__ static Vector pack(const float (&values)[kCount]) {
    Vector packed;
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      if constexpr (sizeof(T) == sizeof(float)) {
        packed.words[i] = __float_as_uint(values[i]);
      } else {
        packed.words[i] = narrow_2<T>(values[2 * i], values[2 * i + 1]);
      }
    }
    return packed;
  }
};

template <typename T>
struct Vector<T, 1> {
  static constexpr int kWords = 1, kPerWord = 1;
  T element;
  __device__ __forceinline__ void unpack_word(int, float (&values)[1]) const { values[0] = widen(element); }
  __device__ __forceinline__ void unpack(float (&values)[1]) const { values[0] = widen(element); }
  __device__ __forceinline__ static Vector pack(const float (&values)[1]) { return {narrow<T>(values[0])}; }
};

// What a load or store says about the cache. kOnce: nobody reads this again soon.
enum class Reuse { kLikely, kOnce };

template <int kCount, Reuse kReuse = Reuse::kLikely, typename T>
__device__ __forceinline__ Vector<T, kCount> load_vector(const T* address) {
  if constexpr (kCount == 1) {
    return {*address};
  } else if constexpr (Vector<T, kCount>::kWords == 4) {
    const uint4* const from = reinterpret_cast<const uint4*>(address);
    const uint4 loaded = kReuse == Reuse::kOnce ? load_once(from) : *from;
    return {{loaded.x, loaded.y, loaded.z, loaded.w}};
  } else {
    const uint2* const from = reinterpret_cast<const uint2*>(address);
    const uint2 loaded = kReuse == Reuse::kOnce ? load_once(from) : *from;
    return {{loaded.x, loaded.y}};
  }
}

template <typename T, int kCount>
__device__ __forceinline__ void store_vector(T* address, const Vector<T, kCount>& vector) {
  if constexpr (kCount == 1) {
    *address = vector.element;
  } else if constexpr (Vector<T, kCount>::kWords == 4) {
    *reinterpret_cast<uint4*>(address) = {vector.words[0], vector.words[1], vector.words[2], vector.words[3]};
  } else {
    *reinterpret_cast<uint2*>(address) = {vector.words[0], vector.words[1]};
  }
}

// kCount consecutive float32 values of a per-channel vector, `missing` where there is none. `channel` is a multiple of
// kCount, the vector aligned to 16 bytes where kCount > 1.
template <int kCount>
__device__ __forceinline__ void load_channels(const float* vector, int channel, float missing,
                                              float (&values)[kCount]) {
  if (vector == nullptr) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = missing;
  } else if constexpr (kCount == 1) {
    values[0] = vector[channel];
  } else {
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      const float4 loaded = *reinterpret_cast<const float4*>(vector + channel + i);
      values[i] = loaded.x;
      values[i + 1] = loaded.y;
      values[i + 2] = loaded.z;
      values[i + 3] = loaded.w;
    }
  }
}

// max(value, 0), except that a NaN stays a NaN, as in torch.relu.
__device__ __forceinline__ float relu_of(float value) { return value <= 0.0f ? 0.0f : value; }

}  // namespace fused_resnet
