// What the CPU's half and CUDA's half of fused_resnet._C have in common.
#pragma once

#include <pybind11/pybind11.h>

namespace fused_resnet {

// Adds DType.
void define_types(pybind11::module_& m);

}  // namespace fused_resnet
