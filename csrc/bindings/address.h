// Python's tensors as the addresses that the kernels take, for as long as a call lasts. Sizes, dtypes, layouts and
// devices are settled in Python; here only that there is memory at all. Nothing of PyTorch is used but two methods.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>

#include "norm.h"

namespace fused_resnet {

// Of a tensor's first element; null for None. A number is taken as it is.
struct Address {
  uintptr_t value = 0;

  template <typename T>
  T* pointer() const {
    return reinterpret_cast<T*>(value);
  }
};

}  // namespace fused_resnet

namespace pybind11::detail {

template <>
struct type_caster<fused_resnet::Address> {
  PYBIND11_TYPE_CASTER(fused_resnet::Address, const_name("Tensor | int | None"));

  bool load(handle source, bool) {
    if (source.is_none()) return true;
    if (PyLong_Check(source.ptr())) {
      value.value = PyLong_AsUnsignedLongLong(source.ptr());
      return !failed();
    }
    static PyObject* const data_ptr = PyUnicode_InternFromString("data_ptr");
    const object found = reinterpret_steal<object>(PyObject_CallMethodNoArgs(source.ptr(), data_ptr));
    if (!found || !PyLong_Check(found.ptr())) {
      PyErr_Clear();
      return false;
    }
    value.value = PyLong_AsUnsignedLongLong(found.ptr());
    if (failed()) return false;
    // A subclass that wraps others has none, nor has a tensor whose storage was freed: neither is None.
    if (value.value == 0 && source.attr("numel")().cast<int64_t>() > 0) {
      throw std::runtime_error("the native backend takes tensors with memory of their own; got a " +
                               std::string(Py_TYPE(source.ptr())->tp_name) + " that has none, or whose was freed");
    }
    return true;
  }

 private:
  static bool failed() {
    if (PyErr_Occurred() == nullptr) return false;
    PyErr_Clear();
    return true;
  }
};

// (mean, invstd, weight, bias), each a vector of float32; weight and bias may be None.
template <>
struct type_caster<fused_resnet::Norm> {
  PYBIND11_TYPE_CASTER(fused_resnet::Norm, const_name("tuple[Tensor, Tensor, Tensor | None, Tensor | None]"));

  bool load(handle source, bool convert) {
    if (!PyTuple_Check(source.ptr()) || PyTuple_GET_SIZE(source.ptr()) != 4) return false;
    const float* vectors[4];
    for (int i = 0; i < 4; ++i) {
      type_caster<fused_resnet::Address> address;
      if (!address.load(PyTuple_GET_ITEM(source.ptr(), i), convert)) return false;
      vectors[i] = static_cast<fused_resnet::Address&>(address).pointer<const float>();
    }
    value = {vectors[0], vectors[1], vectors[2], vectors[3]};
    return vectors[0] != nullptr && vectors[1] != nullptr;
  }
};

}  // namespace pybind11::detail
