// The choice of grids for passes over a matrix (rows.cuh), and of the types a kernel is compiled for.
#pragma once

#include "launch.h"
#include "rows.cuh"

namespace fused_resnet {
namespace cuda {

// A slice of channels for each x, parts of the rows for each y.
struct Cover {
  Rows rows;
  int slices;
  int parts;
};

// `vector` elements for each thread. Rows are dealt out in tiles of `rows_per_thread` layers, to as many blocks as
// `waves` times fill the device.
Cover cover(const Matrix& shape, int vector, int rows_per_thread, int waves, int device, bool whole_warps = false);

// Threads along the channels: a power of two that leaves few of them beside the last channel.
int lanes_of(int channels, int vector);

template <typename T>
struct Type {
  using Element = T;
};

// Calls body(Type<T>, std::integral_constant<int, n>) with n = kVector, at most 16 bytes, where `vectors`, else 1.
template <int kVector, typename Body>
void with_vector(DType dtype, bool vectors, const Body& body) {
  const auto of_type = [&](auto type) {
    constexpr int kMost = 16 / sizeof(typename decltype(type)::Element);
    constexpr int kTaken = kVector < kMost ? kVector : kMost;
    if (vectors) {
      body(type, std::integral_constant<int, kTaken>());
    } else {
      body(type, std::integral_constant<int, 1>());
    }
  };
  switch (dtype) {
    case DType::float32:
      return of_type(Type<float>());
    case DType::float16:
      return of_type(Type<Half>());
    case DType::bfloat16:
      return of_type(Type<BFloat16>());
  }
}

inline int element_size(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

// Whether each thread can take `vector` elements of a row, at all these addresses.
inline bool vectors_fit(const Matrix& shape, int vector, std::initializer_list<const void*> addresses) {
  return shape.channels % vector == 0 && aligned(addresses);
}

}  // namespace cuda
}  // namespace fused_resnet
