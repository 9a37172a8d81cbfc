// A stand-in for CUDA's header of this name, for kernels that g++ compiles and tests/cuda/host_execution runs: what a
// kernel says to the machine is in device_names.h, here is what the host says to the runtime. Names, error codes and
// checks are CUDA's; a launch runs to its end before cudaLaunchKernelEx returns.
//
// Not here, so that its use does not compile: __shared__ (shared memory is dynamic_shared_memory() of device.cuh
// alone).
#pragma once

#include <cstddef>
#include <cstdint>
#include <tuple>
#include <type_traits>
#include <utility>

#include "device_names.h"

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorNoDevice = 100,
  cudaErrorInvalidDevice = 101,
  cudaErrorInvalidResourceHandle = 400,
  cudaErrorLaunchFailure = 719,
  cudaErrorCooperativeLaunchTooLarge = 720,
};
const char* cudaGetErrorName(cudaError_t error);
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();  // of this OS thread; forgets it
cudaError_t cudaPeekAtLastError();

// Any value is a stream. One made by cudaStreamCreate belongs to the device that was current: launching on it while
// another is current is cudaErrorInvalidResourceHandle. Values made up by a test belong to every device.
struct CUstream_st;
using cudaStream_t = CUstream_st*;
cudaError_t cudaStreamCreate(cudaStream_t* stream);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaDeviceSynchronize();

// The current device is this OS thread's, as in CUDA.
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaDriverGetVersion(int* version);

enum cudaDeviceAttr {
  cudaDevAttrMaxThreadsPerBlock = 1,
  cudaDevAttrMaxSharedMemoryPerBlock = 8,
  cudaDevAttrWarpSize = 10,
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrMaxThreadsPerMultiProcessor = 39,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrCooperativeLaunch = 95,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);

enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9,
};

enum cudaLaunchAttributeID {
  cudaLaunchAttributeIgnore = 0,
  cudaLaunchAttributeCooperative = 2,
  cudaLaunchAttributeProgrammaticStreamSerialization = 6,
};
union cudaLaunchAttributeValue {
  char padding[64];
  int cooperative;
  int programmaticStreamSerializationAllowed;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace fused_resnet {
namespace host_execution {

// What one thread of a launch runs: call(arguments).
struct Body {
  void (*call)(void* arguments);
  void* arguments;
};
cudaError_t launch(const cudaLaunchConfig_t* config, const void* kernel, Body body);
cudaError_t set_function_attribute(const void* kernel, cudaFuncAttribute attribute, int value);
cudaError_t occupancy(int* blocks, const void* kernel, int block_threads, size_t shared_bytes);

}  // namespace host_execution
}  // namespace fused_resnet

// A limit that is set holds for one kernel on the device that is current.
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute attribute, int value) {
  return fused_resnet::host_execution::set_function_attribute(reinterpret_cast<const void*>(kernel), attribute, value);
}
// By threads, by blocks and by shared memory; registers are not known here.
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel* kernel, int block_threads,
                                                          size_t shared_bytes) {
  return fused_resnet::host_execution::occupancy(blocks, reinterpret_cast<const void*>(kernel), block_threads,
                                                 shared_bytes);
}

// Runs the kernel to its end. What goes wrong inside it is thrown as std::runtime_error (control.h: throw_errors).
template <typename... Expected, typename... Actual>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Expected...), Actual&&... arguments) {
  static_assert(sizeof...(Expected) == sizeof...(Actual), "the kernel takes another number of arguments");
  struct Call {
    void (*kernel)(Expected...);
    std::tuple<std::decay_t<Expected>...> arguments;
  } call{kernel, std::tuple<std::decay_t<Expected>...>(std::forward<Actual>(arguments)...)};
  const fused_resnet::host_execution::Body body{[](void* address) {
                                                  const Call& of = *static_cast<const Call*>(address);
                                                  std::apply(of.kernel, of.arguments);
                                                },
                                                &call};
  return fused_resnet::host_execution::launch(config, reinterpret_cast<const void*>(kernel), body);
}
