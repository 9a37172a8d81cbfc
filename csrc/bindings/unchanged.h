#pragma once

#include <pybind11/pybind11.h>

namespace fused_resnet {

// Adds Unchanged.
void define_unchanged(pybind11::module_& m);

}  // namespace fused_resnet
