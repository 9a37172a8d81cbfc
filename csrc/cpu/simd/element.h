// One element in memory as a float32 in a register, and back with round-to-nearest-even. Branch-free, so that the
// loops around them become vector code under any compiler and for any instruction set.
//
// Like everything in csrc/cpu, this lives in a namespace of its own per CPU_CAPABILITY: were it shared, the linker
// would keep one copy, perhaps the one made of instructions that the processor does not have.
#pragma once

#include <cstdint>
#include <cstring>

namespace fused_resnet {
namespace CPU_CAPABILITY {

template <typename To, typename From>
inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

struct Float32 {
  using Storage = float;
  static float load(float stored) { return stored; }
  static float store(float value) { return value; }
};

struct BFloat16 {
  using Storage = uint16_t;
  static float load(uint16_t stored) { return bits_as<float>(static_cast<uint32_t>(stored) << 16); }
  static uint16_t store(float value) {
    const uint32_t bits = bits_as<uint32_t>(value);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const uint32_t quiet_nan = (bits >> 16) | 0x40u;  // rounding could carry a NaN into infinity
    return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded);
  }
};

struct Float16 {
  using Storage = uint16_t;
  static float load(uint16_t stored) {
    const uint32_t sign = static_cast<uint32_t>(stored & 0x8000u) << 16;
    const uint32_t magnitude = static_cast<uint32_t>(stored & 0x7fffu) << 13;
    const float rebiased = bits_as<float>(magnitude) * bits_as<float>(0x77800000u);  // 2^112: normal and subnormal
    const uint32_t special = magnitude | 0x7f800000u;                                // infinity and NaN
    return bits_as<float>(sign | (magnitude >= 0x0f800000u ? special : bits_as<uint32_t>(rebiased)));
  }
  static uint16_t store(float value) {
    const uint32_t bits = bits_as<uint32_t>(value);
    const uint32_t magnitude = bits & 0x7fffffffu;
    const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
    // Adding 0.5 leaves a subnormal half in the low bits of the sum, rounded by the adder.
    const uint32_t subnormal = bits_as<uint32_t>(bits_as<float>(magnitude) + 0.5f) - 0x3f000000u;
    const uint32_t normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
    const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
    return static_cast<uint16_t>(((bits >> 16) & 0x8000u) | (magnitude >= 0x47800000u ? special : finite));
  }
};

// max(value, 0), except that a NaN stays a NaN, as in torch.relu.
inline float relu_of(float value) { return value <= 0.0f ? 0.0f : value; }

}  // namespace CPU_CAPABILITY
}  // namespace fused_resnet
