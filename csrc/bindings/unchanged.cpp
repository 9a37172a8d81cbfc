// Whether dicts still hold what they held: thousands of pointers compared at every call of a frozen network, where a
// loop in Python would cost as much as a convolution.
#include "unchanged.h"

#include <vector>

namespace py = pybind11;

namespace fused_resnet {
namespace {

class Unchanged {
 public:
  explicit Unchanged(const py::list& dicts) {
    for (const py::handle item : dicts) {
      const auto each = item.cast<py::dict>();
      dicts_.push_back(each);
      sizes_.push_back(PyDict_GET_SIZE(each.ptr()));
      for (const auto& [key, value] : each) {
        values_.push_back(py::reinterpret_borrow<py::object>(value));
      }
    }
  }

  bool holds() const {
    size_t seen = 0;
    for (size_t i = 0; i < dicts_.size(); ++i) {
      PyObject* const dict = dicts_[i].ptr();
      if (PyDict_GET_SIZE(dict) != sizes_[i]) return false;
      PyObject* value = nullptr;
      for (Py_ssize_t place = 0; PyDict_Next(dict, &place, nullptr, &value);) {
        if (value != values_[seen++].ptr()) return false;
      }
    }
    return true;
  }

 private:
  std::vector<py::dict> dicts_;
  std::vector<Py_ssize_t> sizes_;
  std::vector<py::object> values_;  // kept, so that nothing new can have their addresses
};

}  // namespace

void define_unchanged(py::module_& m) {
  py::class_<Unchanged>(m, "Unchanged").def(py::init<const py::list&>()).def("holds", &Unchanged::holds);
}

}  // namespace fused_resnet
