// What all launches share.
#include "launch.h"

#include <array>
#include <mutex>
#include <stdexcept>

namespace fused_resnet {
namespace cuda {
namespace {

constexpr int kMostDevices = 64;
constexpr int kDriverThatCapturesOverlaps = 12030;

[[noreturn]] void fail(const std::string& what, int device, cudaError_t error) {
  static_cast<void>(cudaGetLastError());
  throw std::runtime_error(what + " on CUDA device " + std::to_string(device) + ": " + cudaGetErrorName(error) + " (" +
                           cudaGetErrorString(error) + ")");
}

DeviceProperties ask(int device) {
  const auto attribute = [&](cudaDeviceAttr name) {
    int value = 0;
    const cudaError_t error = cudaDeviceGetAttribute(&value, name, device);
    if (error != cudaSuccess) fail("cudaDeviceGetAttribute", device, error);
    return value;
  };
  int driver = 0;
  const cudaError_t error = cudaDriverGetVersion(&driver);
  if (error != cudaSuccess) fail("cudaDriverGetVersion", device, error);
  return {attribute(cudaDevAttrMultiProcessorCount), attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
          attribute(cudaDevAttrComputeCapabilityMajor) >= 9 && driver >= kDriverThatCapturesOverlaps};
}

}  // namespace

const DeviceProperties& properties_of(int device) {
  static std::array<std::once_flag, kMostDevices> asked;
  static std::array<DeviceProperties, kMostDevices> properties;
  if (device < 0 || device >= kMostDevices)
    throw std::runtime_error("device " + std::to_string(device) + " is unknown");
  std::call_once(asked[device], [&] { properties[device] = ask(device); });
  return properties[device];
}

DeviceGuard::DeviceGuard(const Call& call) : before_(call.place.device), now_(call.place.device) {
  check(call, cudaGetDevice(&before_));
  if (before_ != now_) check(call, cudaSetDevice(now_));
}

DeviceGuard::~DeviceGuard() {
  if (before_ != now_) static_cast<void>(cudaSetDevice(before_));
}

std::string described(const Call& call) {
  const Place& place = call.place;
  const char* const names[] = {"float32", "float16", "bfloat16"};
  std::string sizes;
  for (const int64_t size : {place.images, place.channels, place.height, place.width}) {
    sizes += (sizes.empty() ? "" : ", ") + std::to_string(size);
  }
  return std::string(call.op) + " of (" + sizes + ") " + names[static_cast<int>(place.dtype)];
}

void check(const Call& call, cudaError_t error) {
  if (error != cudaSuccess) fail(described(call), call.place.device, error);
}

}  // namespace cuda
}  // namespace fused_resnet
