// How kernels are started: on whose stream, with how much of what, and what an error says.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <initializer_list>
#include <string>
#include <utility>

#include "ops.h"

namespace fused_resnet {
namespace cuda {

struct DeviceProperties {
  int multiprocessors;
  int shared_memory;  // bytes that a block may have
  bool overlaps;      // a launch may start while the one in front drains, in a CUDA graph too
};

// Asked of the driver once for each device.
const DeviceProperties& properties_of(int device);

// Makes the stream's device the current one, and the one before it again at the end.
class DeviceGuard {
 public:
  explicit DeviceGuard(const Call& call);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_, now_;
};

// "bn_stats of (2, 64, 56, 56) float16".
std::string described(const Call& call);

// Throws std::runtime_error that names the op, the shape and the error; leaves no error behind for others to find.
void check(const Call& call, cudaError_t error);

struct Grid {
  dim3 blocks;
  int threads;
  std::size_t shared_bytes = 0;
  bool cooperative = false;
};

constexpr std::size_t kSharedBytesUnasked = 48 * 1024;

// Starts the kernel and throws what went wrong, but for one error: false where a cooperative grid does not fit on what
// this process may use of the device.
template <typename... Parameters, typename... Arguments>
bool launch_if_it_fits(const Call& call, const Grid& grid, void (*kernel)(Parameters...), Arguments&&... arguments) {
  const DeviceProperties& properties = properties_of(call.place.device);
  if (grid.shared_bytes > kSharedBytesUnasked) {
    // All that there is, not what this launch needs: the limit is the kernel's, and another thread may launch it too.
    check(call, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, properties.shared_memory));
  }
  // From sm_90 on a kernel may be set up while the one in front of it drains (wait_for_previous_grid).
  cudaLaunchAttribute attribute{};
  if (grid.cooperative) {
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  } else {
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid.blocks;
  config.blockDim = dim3(grid.threads);
  config.dynamicSmemBytes = grid.shared_bytes;
  config.stream = static_cast<cudaStream_t>(call.place.stream);
  config.attrs = &attribute;
  config.numAttrs = grid.cooperative || properties.overlaps ? 1 : 0;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
  if (grid.cooperative && error == cudaErrorCooperativeLaunchTooLarge) {
    static_cast<void>(cudaGetLastError());
    return false;
  }
  check(call, error);
  return true;
}

template <typename... Parameters, typename... Arguments>
void launch(const Call& call, const Grid& grid, void (*kernel)(Parameters...), Arguments&&... arguments) {
  static_cast<void>(launch_if_it_fits(call, grid, kernel, std::forward<Arguments>(arguments)...));
}

inline bool aligned(std::initializer_list<const void*> addresses) {
  for (const void* address : addresses) {
    if (reinterpret_cast<uintptr_t>(address) % 16 != 0) return false;
  }
  return true;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace cuda
}  // namespace fused_resnet
