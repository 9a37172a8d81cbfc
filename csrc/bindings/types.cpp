#include "types.h"

#include "norm.h"

namespace py = pybind11;

namespace fused_resnet {

void define_types(py::module_& m) {
  // Local: the tests load a second module that has the same type (tests/cuda/host_module.cpp).
  py::enum_<DType>(m, "DType", py::module_local())
      .value("float32", DType::float32)
      .value("float16", DType::float16)
      .value("bfloat16", DType::bfloat16);
}

}  // namespace fused_resnet
