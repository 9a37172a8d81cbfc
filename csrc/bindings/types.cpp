#include "types.h"

#include <cstdint>

#include "norm.h"

namespace py = pybind11;

namespace fused_resnet {
namespace {

const float* floats(uintptr_t address) { return reinterpret_cast<const float*>(address); }

Norm norm_of(uintptr_t mean, uintptr_t invstd, uintptr_t weight, uintptr_t bias) {
  return {floats(mean), floats(invstd), floats(weight), floats(bias)};
}

}  // namespace

void define_types(py::module_& m) {
  // Local: the tests load a second module that has the same types (tests/cuda/host_module.cpp).
  py::enum_<DType>(m, "DType", py::module_local())
      .value("float32", DType::float32)
      .value("float16", DType::float16)
      .value("bfloat16", DType::bfloat16);
  py::class_<Norm>(m, "Norm", py::module_local())
      .def(py::init(&norm_of), py::arg("mean"), py::arg("invstd"), py::arg("weight"), py::arg("bias"));
}

}  // namespace fused_resnet
