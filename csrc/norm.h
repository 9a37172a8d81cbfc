// The types of elements, and what is known of a batch norm once its statistics are.
#pragma once

namespace fused_resnet {

enum class DType { float32, float16, bfloat16 };

constexpr int bytes_of(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

// xhat = (x - mean) * invstd; z = xhat * weight + bias. A null weight is 1, a null bias 0.
struct Norm {
  const float* mean;
  const float* invstd;
  const float* weight;
  const float* bias;
};

}  // namespace fused_resnet
