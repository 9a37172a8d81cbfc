// The table of contents of fused_resnet._C. Tensors are checked and allocated in fused_resnet/ops/backends; what
// arrives here is addresses, sizes and numbers, so this file builds without PyTorch and works with every version.
#include <pybind11/pybind11.h>

#include <vector>

#include "address.h"
#include "conv.h"
#include "cpu/bn_act.h"
#include "cpu/buffers.h"
#include "cpu/dispatch.h"
#include "cuda.h"
#include "types.h"
#include "unchanged.h"

#ifndef FUSED_RESNET_VERSION
#define FUSED_RESNET_VERSION "unknown"
#endif
#ifndef FUSED_RESNET_COMPILER
#define FUSED_RESNET_COMPILER "unknown"
#endif
#ifndef FUSED_RESNET_CUDA_TARGETS
#define FUSED_RESNET_CUDA_TARGETS ""
#endif

namespace py = pybind11;

namespace fused_resnet {
namespace {

void* pointer(Address address) { return address.pointer<void>(); }
float* floats(Address address) { return address.pointer<float>(); }

void check(const Activation& shape) {
  if (shape.images < 1 || shape.channels < 1 || shape.pixels < 1 || shape.threads < 1) {
    throw py::value_error("images, channels, pixels and threads must be positive");
  }
}

void bn_stats(const Activation& shape, Address x, Address mean, Address invstd, Address running_mean,
              Address running_var, double momentum, double eps) {
  check(shape);
  std::vector<double> variance(shape.channels);
  bn_act_kernels().stats(shape, pointer(x), floats(mean), variance.data());
  bn_finalize(shape.channels, shape.count(), momentum, eps, floats(mean), variance.data(), floats(invstd),
              floats(running_mean), floats(running_var));
}

void bn_apply(const Activation& shape, Address x, const Norm& norm, Address residual, bool relu, Address out) {
  check(shape);
  bn_act_kernels().apply(shape, pointer(x), norm, pointer(residual), relu, pointer(out));
}

void bn_apply_dual(const Activation& shape, Address x, const Norm& norm, Address x2, const Norm& norm2, bool relu,
                   Address out) {
  check(shape);
  bn_act_kernels().apply_dual(shape, pointer(x), norm, pointer(x2), norm2, relu, pointer(out));
}

void bn_grad_stats(const Activation& shape, Address grad_out, Address x, Address out, Address dz, const Norm& norm,
                   bool relu, Address sum_dz, Address sum_dz_xhat) {
  check(shape);
  bn_act_kernels().grad_stats(shape, pointer(grad_out), pointer(x), pointer(out), pointer(dz), norm, relu,
                              floats(sum_dz), floats(sum_dz_xhat));
}

void bn_grad_apply(const Activation& shape, Address grad_out, Address x, const Norm& norm, Address sum_dz,
                   Address sum_dz_xhat, bool relu, Address grad_x) {
  check(shape);
  bn_act_kernels().grad_apply(shape, pointer(grad_out), pointer(x), norm, floats(sum_dz), floats(sum_dz_xhat), relu,
                              pointer(grad_x));
}

py::dict build_info() {
  py::dict info;
  info["version"] = FUSED_RESNET_VERSION;
  info["compiler"] = FUSED_RESNET_COMPILER;
  info["cpu_capability"] = cpu_capability_name();
#ifdef _OPENMP
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
  info["cuda_targets"] = FUSED_RESNET_CUDA_TARGETS;
  return info;
}

}  // namespace
}  // namespace fused_resnet

PYBIND11_MODULE(_C, m) {
  namespace fr = fused_resnet;
  m.doc() = "Compiled kernels of fused_resnet. Private: use fused_resnet.ops.";
  m.def("build_info", &fr::build_info, "How this extension was built, and the CPU kernels it runs here.");

  fr::define_types(m);
  fr::define_unchanged(m);
  py::class_<fr::Activation>(m, "Activation")
      .def(py::init<int64_t, int64_t, int64_t, bool, fr::DType, int>(), py::arg("images"), py::arg("channels"),
           py::arg("pixels"), py::arg("channels_last"), py::arg("dtype"), py::arg("threads"));

  using NoGil = py::call_guard<py::gil_scoped_release>;
  m.def("kept_bytes", &fr::kept_bytes, "Bytes of freed buffers that wait to be used again.");
  m.def("limit_kept_buffers", &fr::limit_kept_buffers, "Keeps no more bytes of them than this.");
  m.def("release_kept_buffers", &fr::release_kept_buffers, "Gives them back to the system.");
  m.def("bn_stats", &fr::bn_stats, NoGil());
  m.def("bn_apply", &fr::bn_apply, NoGil());
  m.def("bn_apply_dual", &fr::bn_apply_dual, NoGil());
  m.def("bn_grad_stats", &fr::bn_grad_stats, NoGil());
  m.def("bn_grad_apply", &fr::bn_grad_apply, NoGil());
  fr::define_conv(m);
  fr::define_cuda(m);
}
