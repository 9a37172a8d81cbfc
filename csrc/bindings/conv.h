// The convolutions of csrc/cpu/conv.h for Python.
#pragma once

#include <pybind11/pybind11.h>

namespace fused_resnet {

// Adds PackedConv, ConvMethod and max_pool.
void define_conv(pybind11::module_& m);

}  // namespace fused_resnet
