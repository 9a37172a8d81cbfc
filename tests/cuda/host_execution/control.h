// How a test sets up the machine that host_execution pretends to be, and what it asks it afterwards.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <string>
#include <vector>

namespace fused_resnet {
namespace host_execution {

// The order in which blocks and threads run follows from the seed and from the launches since it was set.
void set_seed(uint64_t seed);

// Every device is alike. The default is an H200, and two of them.
struct Device {
  int multiprocessors;
  int shared_per_block_optin;
  int shared_per_multiprocessor;
  int major;
  int minor;
};
void set_device(const Device& device);
void set_device_count(int count);

// The next cudaLaunchKernelEx returns the error and runs nothing.
void fail_next_launch(cudaError_t error);
// While set, launches are checked and recorded, but nothing runs.
void skip_launches(bool skip);
// What goes wrong inside a kernel is thrown as std::runtime_error; or, if not set, cudaLaunchKernelEx returns
// cudaErrorLaunchFailure, and last_message() says what it was.
void throw_errors(bool thrown);
const std::string& last_message();

// The launches that passed their checks, since the last clear_launches().
struct Launch {
  dim3 grid;
  dim3 block;
  size_t shared_bytes;
  cudaStream_t stream;
  bool cooperative;
  int device;
};
const std::vector<Launch>& launches();
void clear_launches();

}  // namespace host_execution
}  // namespace fused_resnet

// The same for ctypes.
extern "C" {
void host_execution_set_seed(uint64_t seed);
void host_execution_set_device(int multiprocessors, int shared_per_block_optin, int shared_per_multiprocessor,
                               int major, int minor);
void host_execution_set_device_count(int count);
void host_execution_fail_next_launch(int error);
void host_execution_skip_launches(int skip);
void host_execution_throw_errors(int thrown);
const char* host_execution_last_message();
int64_t host_execution_launch_count();
// values[0..9]: grid x, y, z; block x, y, z; shared bytes; stream; cooperative; device. Zero if there is no such
// launch.
int host_execution_launch(int64_t index, int64_t* values);
void host_execution_clear_launches();
}
