// 16-bit floating-point numbers to float32 and back, rounded to nearest even. As on the device, every NaN narrows to
// 0x7fff.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace fused_resnet {
namespace host_execution {

inline uint32_t bits_of_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}
inline float float_of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline float float_of_half(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16;
  const uint32_t exponent = (half >> 10) & 31u;
  const uint32_t mantissa = half & 0x3ffu;
  if (exponent == 0) return float_of_bits(sign | bits_of_float(static_cast<float>(mantissa) * 0x1p-24f));
  if (exponent == 31) return float_of_bits(sign | 0x7f800000u | (mantissa << 13) | (mantissa != 0 ? 0x400000u : 0u));
  return float_of_bits(sign | (exponent + 112) << 23 | mantissa << 13);
}

inline uint16_t half_of_float(float value) {
  const uint32_t bits = bits_of_float(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t rounded;
  if (magnitude > 0x7f800000u) return 0x7fff;
  if (magnitude >= 0x47800000u) {  // 65536 and more
    rounded = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below the smallest normal number, 2^-14: in units of 2^-24
    rounded = static_cast<uint32_t>(std::nearbyint(float_of_bits(magnitude) * 0x1p24f));
  } else {
    rounded = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  return static_cast<uint16_t>(sign | rounded);
}

inline float float_of_bfloat16(uint16_t value) { return float_of_bits(uint32_t{value} << 16); }

inline uint16_t bfloat16_of_float(float value) {
  const uint32_t bits = bits_of_float(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

}  // namespace host_execution
}  // namespace fused_resnet
