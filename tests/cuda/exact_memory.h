// Memory for the kernels as sanitized_cases.cpp needs it: of exactly the size that a kernel may touch, so that
// AddressSanitizer reports the first byte too far; NaN before a kernel writes it; and compared afterwards with what it
// should hold.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>

#include "cuda/ops.h"
#include "host_execution/element_bits.h"
#include "plain_reference.h"

namespace fused_resnet {
namespace sanitized {

using plain::Numbers;

// Numbers of one type, on the heap.
class Elements {
 public:
  // NaNs. With `skipped` elements in front of the first its address is not a multiple of 16.
  Elements(DType dtype, std::size_t count, std::size_t skipped = 0)
      : dtype_(dtype), count_(count), skipped_(skipped), bytes_(new unsigned char[(count + skipped) * size()]) {
    std::memset(bytes_.get(), 0xff, (count + skipped) * size());
  }
  // The numbers, rounded.
  Elements(DType dtype, const Numbers& numbers, std::size_t skipped = 0) : Elements(dtype, numbers.size(), skipped) {
    using namespace host_execution;
    for (std::size_t i = 0; i < count_; ++i) {
      const float number = static_cast<float>(numbers[i]);
      const uint16_t bits = dtype == DType::float16 ? half_of_float(number) : bfloat16_of_float(number);
      if (dtype == DType::float32) {
        std::memcpy(address() + 4 * i, &number, 4);
      } else {
        std::memcpy(address() + 2 * i, &bits, 2);
      }
    }
  }

  unsigned char* address() const { return bytes_.get() + skipped_ * size(); }
  float* floats() const { return reinterpret_cast<float*>(address()); }
  Numbers numbers() const {
    using namespace host_execution;
    Numbers numbers(count_);
    for (std::size_t i = 0; i < count_; ++i) {
      uint16_t bits = 0;
      float number = 0.0f;
      std::memcpy(&bits, address() + size() * i, 2);
      if (dtype_ == DType::float32) {
        std::memcpy(&number, address() + 4 * i, 4);
      } else {
        number = dtype_ == DType::float16 ? float_of_half(bits) : float_of_bfloat16(bits);
      }
      numbers[i] = number;
    }
    return numbers;
  }

 private:
  std::size_t size() const { return dtype_ == DType::float32 ? 4 : 2; }

  DType dtype_;
  std::size_t count_, skipped_;
  std::unique_ptr<unsigned char[]> bytes_;
};

// Bytes for a workspace or a mask.
using Bytes = std::unique_ptr<unsigned char[]>;
inline Bytes bytes(std::size_t count) {
  Bytes made(new unsigned char[count]);
  std::memset(made.get(), 0xff, count);
  return made;
}

// Evenly distributed in [low, high).
inline Numbers random_numbers(std::mt19937& random, std::size_t count, double low, double high) {
  Numbers numbers(count);
  for (double& number : numbers) number = low + (high - low) * (random() * 0x1p-32);
  return numbers;
}
inline Elements random_elements(std::mt19937& random, DType dtype, std::size_t count, double low, double high,
                                std::size_t skipped = 0) {
  return Elements(dtype, random_numbers(random, count, low, high), skipped);
}
inline Elements random_floats(std::mt19937& random, std::size_t count, double low, double high) {
  return random_elements(random, DType::float32, count, low, high);
}

// The four vectors of a batch norm.
struct Vectors {
  Elements mean, invstd, weight, bias;

  Vectors(std::mt19937& random, std::size_t channels)
      : mean(random_floats(random, channels, -0.5, 0.5)),
        invstd(random_floats(random, channels, 0.5, 1.5)),
        weight(random_floats(random, channels, -1.5, 1.5)),
        bias(random_floats(random, channels, -0.5, 0.5)) {}
  Norm addresses() const { return {mean.floats(), invstd.floats(), weight.floats(), bias.floats()}; }
  plain::Norm plain() const { return {mean.numbers(), invstd.numbers(), weight.numbers(), bias.numbers()}; }
};

struct Tolerance {
  double relative, absolute;
};
// Of a number computed in float32 from numbers of a few units, and then rounded to the type: twice the rounding.
inline Tolerance tolerance_of(DType dtype) {
  if (dtype == DType::float32) return {1e-5, 1e-5};
  return dtype == DType::float16 ? Tolerance{0x1p-10, 1e-4} : Tolerance{0x1p-7, 1e-4};
}

inline void expect_near(const std::string& what, const Numbers& actual, const Numbers& expected,
                        const Tolerance& tolerance) {
  if (actual.size() != expected.size()) throw std::runtime_error(what + " has another size");
  for (std::size_t i = 0; i < actual.size(); ++i) {
    const double allowed = tolerance.relative * std::fabs(expected[i]) + tolerance.absolute;
    if (actual[i] == expected[i] || std::fabs(actual[i] - expected[i]) <= allowed) continue;  // not so of a NaN
    throw std::runtime_error("mismatch: " + what + "[" + std::to_string(i) + "] is " + std::to_string(actual[i]) +
                             ", but has to be " + std::to_string(expected[i]));
  }
}

}  // namespace sanitized
}  // namespace fused_resnet
