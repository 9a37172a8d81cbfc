// The CUDA half of fused_resnet._C as a module of its own, its kernels executed on the CPU (host_execution).
#include <pybind11/pybind11.h>

#include "bindings/cuda.h"
#include "bindings/types.h"

PYBIND11_MODULE(_C_on_host, m) {
  fused_resnet::define_types(m);
  fused_resnet::define_cuda(m);
}
