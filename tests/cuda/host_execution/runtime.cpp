// CUDA's runtime as far as a launch needs it: devices, limits, errors, and the checks before a kernel runs.
#include <cxxabi.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <mutex>
#include <set>
#include <stdexcept>
#include <utility>

#include "control.h"
#include "engine.h"

struct CUstream_st {
  int device;
};

namespace fused_resnet {
namespace host_execution {

constexpr size_t kSharedWithoutAsking = 48 * 1024;

struct Machine {
  Device device = {132, 232448, 233472, 9, 0};
  int device_count = 2;
  cudaError_t next_launch = cudaSuccess;
  bool skip = false;
  bool throws = true;
  std::string message;
  std::vector<Launch> launches;
  std::map<std::pair<int, const void*>, size_t> allowed_shared;
  std::set<cudaStream_t> streams;
  std::mutex launching;  // one launch at a time
};
static Machine machine;
static thread_local int current_device = 0;
static thread_local cudaError_t last_error = cudaSuccess;

static cudaError_t report(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

static int threads_per_multiprocessor() {
  const int capability = 10 * machine.device.major + machine.device.minor;
  if (capability == 75) return 1024;
  return capability == 86 || capability == 87 || capability == 89 || capability >= 120 ? 1536 : 2048;
}

static size_t allowed_shared(const void* kernel) {
  const auto found = machine.allowed_shared.find({current_device, kernel});
  return std::max(kSharedWithoutAsking, found == machine.allowed_shared.end() ? 0 : found->second);
}

cudaError_t set_function_attribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || value > machine.device.shared_per_block_optin) return report(cudaErrorInvalidValue);
  machine.allowed_shared[{current_device, kernel}] = static_cast<size_t>(value);
  return cudaSuccess;
}

cudaError_t occupancy(int* blocks, const void* kernel, int block_threads, size_t shared_bytes) {
  if (blocks == nullptr || block_threads < 1) return report(cudaErrorInvalidValue);
  *blocks = 0;
  if (block_threads > 1024 || shared_bytes > allowed_shared(kernel)) return cudaSuccess;
  const size_t reserved = machine.device.major >= 8 ? 1024 : 0;  // of every block, by the system
  const int by_threads = threads_per_multiprocessor() / ((block_threads + 31) / 32 * 32);
  const size_t by_shared =
      static_cast<size_t>(machine.device.shared_per_multiprocessor) / std::max<size_t>(shared_bytes + reserved, 1);
  *blocks = static_cast<int>(std::min<size_t>({static_cast<size_t>(by_threads), by_shared, 32}));
  return cudaSuccess;
}

static cudaError_t check(const cudaLaunchConfig_t& config, const void* kernel, bool cooperative) {
  const dim3 grid = config.gridDim, block = config.blockDim;
  if (current_device >= machine.device_count) return cudaErrorInvalidDevice;
  if (grid.x < 1 || grid.y < 1 || grid.z < 1 || block.x < 1 || block.y < 1 || block.z < 1) {
    return cudaErrorInvalidConfiguration;
  }
  if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) return cudaErrorInvalidConfiguration;
  if (block.x > 1024 || block.y > 1024 || block.z > 64) return cudaErrorInvalidConfiguration;
  const unsigned threads = block.x * block.y * block.z;
  if (threads > 1024) return cudaErrorInvalidConfiguration;
  if (config.dynamicSmemBytes > allowed_shared(kernel)) return cudaErrorInvalidValue;
  if (config.dynamicSmemBytes > static_cast<size_t>(machine.device.shared_per_block_optin)) {
    return cudaErrorInvalidValue;
  }
  if (machine.streams.count(config.stream) > 0 && config.stream->device != current_device) {
    return cudaErrorInvalidResourceHandle;
  }
  if (cooperative) {
    int blocks = 0;
    occupancy(&blocks, kernel, static_cast<int>(threads), config.dynamicSmemBytes);
    const uint64_t fit = static_cast<uint64_t>(blocks) * static_cast<uint64_t>(machine.device.multiprocessors);
    if (uint64_t{grid.x} * grid.y * grid.z > fit) return cudaErrorCooperativeLaunchTooLarge;
  }
  return cudaSuccess;
}

static std::string name_of_kernel(const void* kernel) {
  Dl_info information;
  if (dladdr(kernel, &information) == 0 || information.dli_sname == nullptr) return "kernel";
  int status = 0;
  char* readable = abi::__cxa_demangle(information.dli_sname, nullptr, nullptr, &status);
  const std::string name = status == 0 ? readable : information.dli_sname;
  std::free(readable);
  return name;
}

cudaError_t launch(const cudaLaunchConfig_t* config, const void* kernel, Body body) {
  const std::lock_guard<std::mutex> lock(machine.launching);
  bool cooperative = false;
  for (unsigned i = 0; i < config->numAttrs; i++) {
    if (config->attrs[i].id == cudaLaunchAttributeCooperative) cooperative = config->attrs[i].val.cooperative != 0;
  }
  const cudaError_t planned = std::exchange(machine.next_launch, cudaSuccess);
  if (planned != cudaSuccess) return report(planned);
  const cudaError_t error = check(*config, kernel, cooperative);
  if (error != cudaSuccess) return report(error);
  machine.launches.push_back(
      {config->gridDim, config->blockDim, config->dynamicSmemBytes, config->stream, cooperative, current_device});
  if (machine.skip || run_launch(*config, cooperative, body, name_of_kernel(kernel))) return cudaSuccess;
  machine.message = engine.message;
  if (machine.throws) throw std::runtime_error(machine.message);
  return report(cudaErrorLaunchFailure);
}

void set_seed(uint64_t seed) { engine.random = (seed + 1) * 0x9e3779b97f4a7c15u | 1; }
void set_device(const Device& device) { machine.device = device; }
void set_device_count(int count) { machine.device_count = count; }
void fail_next_launch(cudaError_t error) { machine.next_launch = error; }
void skip_launches(bool skip) { machine.skip = skip; }
void throw_errors(bool thrown) { machine.throws = thrown; }
const std::string& last_message() { return machine.message; }
const std::vector<Launch>& launches() { return machine.launches; }
void clear_launches() { machine.launches.clear(); }

}  // namespace host_execution
}  // namespace fused_resnet

using namespace fused_resnet::host_execution;

struct NamedError {
  cudaError_t error;
  const char* name;
  const char* text;
};
constexpr NamedError kErrors[] = {
    {cudaSuccess, "cudaSuccess", "no error"},
    {cudaErrorInvalidValue, "cudaErrorInvalidValue", "invalid argument"},
    {cudaErrorMemoryAllocation, "cudaErrorMemoryAllocation", "out of memory"},
    {cudaErrorInvalidConfiguration, "cudaErrorInvalidConfiguration", "invalid configuration argument"},
    {cudaErrorInvalidDeviceFunction, "cudaErrorInvalidDeviceFunction", "invalid device function"},
    {cudaErrorNoDevice, "cudaErrorNoDevice", "no CUDA-capable device is detected"},
    {cudaErrorInvalidDevice, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {cudaErrorInvalidResourceHandle, "cudaErrorInvalidResourceHandle", "invalid resource handle"},
    {cudaErrorLaunchFailure, "cudaErrorLaunchFailure", "unspecified launch failure"},
    {cudaErrorCooperativeLaunchTooLarge, "cudaErrorCooperativeLaunchTooLarge", "too many blocks in cooperative launch"},
};
const char* cudaGetErrorName(cudaError_t error) {
  for (const NamedError& known : kErrors) {
    if (known.error == error) return known.name;
  }
  return "unrecognized error code";
}
const char* cudaGetErrorString(cudaError_t error) {
  for (const NamedError& known : kErrors) {
    if (known.error == error) return known.text;
  }
  return "unrecognized error code";
}
cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return last_error; }

cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  *stream = new CUstream_st{current_device};
  machine.streams.insert(*stream);
  return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  if (machine.streams.erase(stream) == 0) return report(cudaErrorInvalidResourceHandle);
  delete stream;
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }

cudaError_t cudaGetDevice(int* device) {
  if (machine.device_count == 0) return report(cudaErrorNoDevice);
  *device = current_device;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  if (machine.device_count == 0) return report(cudaErrorNoDevice);
  if (device < 0 || device >= machine.device_count) return report(cudaErrorInvalidDevice);
  current_device = device;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int* count) {
  *count = machine.device_count;
  return machine.device_count == 0 ? report(cudaErrorNoDevice) : cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device < 0 || device >= machine.device_count) return report(cudaErrorInvalidDevice);
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
      *value = 1024;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = static_cast<int>(kSharedWithoutAsking);
      return cudaSuccess;
    case cudaDevAttrWarpSize:
      *value = 32;
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = machine.device.multiprocessors;
      return cudaSuccess;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *value = threads_per_multiprocessor();
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = machine.device.major;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = machine.device.minor;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = machine.device.shared_per_multiprocessor;
      return cudaSuccess;
    case cudaDevAttrCooperativeLaunch:
      *value = machine.device.major >= 6 ? 1 : 0;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = machine.device.shared_per_block_optin;
      return cudaSuccess;
  }
  return report(cudaErrorInvalidValue);
}

extern "C" {
void host_execution_set_seed(uint64_t seed) { set_seed(seed); }
void host_execution_set_device(int multiprocessors, int shared_per_block_optin, int shared_per_multiprocessor,
                               int major, int minor) {
  set_device({multiprocessors, shared_per_block_optin, shared_per_multiprocessor, major, minor});
}
void host_execution_set_device_count(int count) { set_device_count(count); }
void host_execution_fail_next_launch(int error) { fail_next_launch(static_cast<cudaError_t>(error)); }
void host_execution_skip_launches(int skip) { skip_launches(skip != 0); }
void host_execution_throw_errors(int thrown) { throw_errors(thrown != 0); }
const char* host_execution_last_message() { return last_message().c_str(); }
int64_t host_execution_launch_count() { return static_cast<int64_t>(launches().size()); }
int host_execution_launch(int64_t index, int64_t* values) {
  if (index < 0 || index >= host_execution_launch_count()) return 0;
  const Launch& of = launches()[static_cast<size_t>(index)];
  const int64_t all[] = {of.grid.x,
                         of.grid.y,
                         of.grid.z,
                         of.block.x,
                         of.block.y,
                         of.block.z,
                         static_cast<int64_t>(of.shared_bytes),
                         static_cast<int64_t>(reinterpret_cast<intptr_t>(of.stream)),
                         of.cooperative ? 1 : 0,
                         of.device};
  std::copy(std::begin(all), std::end(all), values);
  return 1;
}
void host_execution_clear_launches() { clear_launches(); }
}
