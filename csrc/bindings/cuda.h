// The CUDA half of the table of contents.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

namespace fused_resnet {

// Adds the submodule `cuda`, if the CUDA kernels were built.
void define_cuda(pybind11::module_& parent);

}  // namespace fused_resnet
