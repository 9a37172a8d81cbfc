// The CUDA kernels as fused_resnet._C.cuda: addresses become pointers, and sizes that no kernel can take are refused.
#include "cuda.h"

#ifdef FUSED_RESNET_CUDA
#include <limits>
#include <string>

#include "cuda/ops.h"
#endif

namespace py = pybind11;

namespace fused_resnet {

#ifdef FUSED_RESNET_CUDA
namespace {

using cuda::Call;
using cuda::Matrix;
using cuda::Place;
using Address = uintptr_t;
using Pair = std::pair<int, int>;

template <typename T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

Place place_of(int64_t images, int64_t channels, int64_t height, int64_t width, DType dtype, int device,
               Address stream) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  constexpr int64_t kMostChannels = 1 << 26;  // a thread's rows of one tile lie within 2^31 elements
  for (const int64_t size : {images, channels, height, width}) {
    if (size < 1 || size > kMost) throw py::value_error("images, channels, height and width must be 1 to 2^31 - 1");
  }
  if (channels > kMostChannels) throw py::value_error("channels must be at most 2^26");
  return {images, channels, height, width, dtype, device, pointer(stream)};
}

Matrix matrix(const Place& place) {
  return {place.images * place.height * place.width, static_cast<int>(place.channels), place.dtype};
}

void bn_stats(const Place& place, Address x, Address mean, Address invstd, Address running_mean, Address running_var,
              double momentum, double eps, Address workspace) {
  cuda::bn_stats({"bn_stats", place}, matrix(place), pointer(x), pointer<float>(mean), pointer<float>(invstd),
                 pointer<float>(running_mean), pointer<float>(running_var), momentum, eps, pointer(workspace));
}

// Addresses one by one and no objects of them: each object would cost a call as much as the rest of it.
Norm norm_of(Address mean, Address invstd, Address weight, Address bias) {
  return {pointer<float>(mean), pointer<float>(invstd), pointer<float>(weight), pointer<float>(bias)};
}

void bn_apply(const Place& place, Address x, Address mean, Address invstd, Address weight, Address bias,
              Address residual, bool relu, Address out, Address mask) {
  cuda::bn_apply({"bn_apply", place}, matrix(place), pointer(x), norm_of(mean, invstd, weight, bias), pointer(residual),
                 relu, pointer(out), pointer<uint8_t>(mask));
}

void bn_apply_dual(const Place& place, Address x, Address mean, Address invstd, Address weight, Address bias,
                   Address x2, Address mean2, Address invstd2, Address weight2, Address bias2, bool relu, Address out,
                   Address mask) {
  cuda::bn_apply_dual({"bn_apply_dual", place}, matrix(place), pointer(x), norm_of(mean, invstd, weight, bias),
                      pointer(x2), norm_of(mean2, invstd2, weight2, bias2), relu, pointer(out), pointer<uint8_t>(mask));
}

void bn_stats_apply(const Place& place, Address x, Address residual, Address weight, Address bias, Address mean,
                    Address invstd, Address running_mean, Address running_var, double momentum, double eps, bool relu,
                    Address out, Address mask, Address workspace) {
  cuda::bn_stats_apply({"bn_stats_apply", place}, matrix(place), pointer(x), pointer(residual), pointer<float>(weight),
                       pointer<float>(bias), pointer<float>(mean), pointer<float>(invstd), pointer<float>(running_mean),
                       pointer<float>(running_var), momentum, eps, relu, pointer(out), pointer<uint8_t>(mask),
                       pointer(workspace));
}

void bn_grad_stats(const Place& place, Address grad_out, Address x, Address out, Address mask, Address mean,
                   Address invstd, Address weight, Address bias, bool relu, Address dz, Address sum_dz,
                   Address sum_dz_xhat, Address workspace) {
  cuda::bn_grad_stats({"bn_grad_stats", place}, matrix(place), pointer(grad_out), pointer(x), pointer(out),
                      pointer<uint8_t>(mask), norm_of(mean, invstd, weight, bias), relu, pointer(dz),
                      pointer<float>(sum_dz), pointer<float>(sum_dz_xhat), pointer(workspace));
}

void bn_grad_apply(const Place& place, Address grad_out, Address x, Address mask, Address mean, Address invstd,
                   Address weight, Address bias, Address sum_dz, Address sum_dz_xhat, bool relu, Address dz,
                   Address grad_x) {
  cuda::bn_grad_apply({"bn_grad_apply", place}, matrix(place), pointer(grad_out), pointer(x), pointer<uint8_t>(mask),
                      norm_of(mean, invstd, weight, bias), pointer<float>(sum_dz), pointer<float>(sum_dz_xhat), relu,
                      pointer(dz), pointer(grad_x));
}

ConvShape conv_shape(const Place& x, int filters, const Pair& kernel_size, const Pair& stride, const Pair& padding,
                     const Pair& dilation) {
  const auto out_size = [](int64_t size, int kernel, int step, int pad, int apart) {
    return static_cast<int>((size + 2 * pad - int64_t{apart} * (kernel - 1) - 1) / step + 1);
  };
  const Pair out = {out_size(x.height, kernel_size.first, stride.first, padding.first, dilation.first),
                    out_size(x.width, kernel_size.second, stride.second, padding.second, dilation.second)};
  if (out.first >= 1 && out.second >= 1 && x.images * out.first * out.second > std::numeric_limits<int32_t>::max()) {
    throw py::value_error("conv_bn_act takes at most 2^31 - 1 output pixels");
  }
  if (out.first < 1 || out.second < 1 || filters < 8 || filters % 8 != 0 || x.channels % 8 != 0) {
    throw py::value_error("conv_bn_act takes channels and filters in multiples of 8, and at least one output pixel");
  }
  return {x.images * out.first * out.second,
          static_cast<int>(x.height),
          static_cast<int>(x.width),
          static_cast<int>(x.channels),
          out.first,
          out.second,
          filters,
          kernel_size.first,
          kernel_size.second,
          stride.first,
          stride.second,
          padding.first,
          padding.second,
          dilation.first,
          dilation.second};
}

void conv_bn_act(const Place& place, const ConvShape& shape, const cuda::ConvChoice& choice, Address x, Address weight,
                 Address scale, Address shift, Address residual, bool relu, Address out, Address workspace) {
  for (const Address address : {x, weight, scale, shift, residual, out, workspace}) {
    if (address % 16 != 0) throw py::value_error("conv_bn_act takes addresses in multiples of 16 bytes");
  }
  if (choice.splits > 1 && workspace == 0) throw py::value_error("conv_bn_act with splits takes a workspace");
  cuda::conv_bn_act({"conv_bn_act", place}, shape, place.dtype, choice, pointer(x), pointer(weight),
                    pointer<float>(scale), pointer<float>(shift), pointer(residual), relu, pointer(out),
                    pointer(workspace));
}

void stem(const Place& place, const std::array<int64_t, 4>& strides, int filters, Address x,
          const std::optional<PixelScale>& pixel_scale, Address weight, Address scale, Address shift, Address out) {
  if (place.channels != 3 || filters < 64 || filters % 64 != 0) {
    throw py::value_error("stem takes images of 3 channels, and filters in multiples of 64");
  }
  if (weight % 2 != 0 || out % 16 != 0) throw py::value_error("stem writes to addresses in multiples of 16 bytes");
  const auto half = [](int64_t size) { return static_cast<int>((size - 1) / 2 + 1); };  // both windows do
  const int conv_height = half(place.height), conv_width = half(place.width);
  const StemShape shape{static_cast<int>(place.images),
                        static_cast<int>(place.height),
                        static_cast<int>(place.width),
                        conv_height,
                        conv_width,
                        half(conv_height),
                        half(conv_width),
                        filters,
                        {strides[0], strides[1], strides[2], strides[3]}};
  cuda::stem({"stem", place}, shape, place.dtype, pointer(x), pixel_scale ? &*pixel_scale : nullptr, pointer(weight),
             pointer<float>(scale), pointer<float>(shift), pointer(out));
}

void avgpool(const Place& place, Address x, Address out) {
  cuda::avgpool({"avgpool", place}, matrix(place), place.images, pointer(x), pointer(out));
}

}  // namespace

void define_cuda(py::module_& parent) {
  py::module_ m = parent.def_submodule("cuda", "The CUDA kernels. Private: use fused_resnet.ops.");
  py::class_<Place>(m, "Place", py::module_local())
      .def(py::init(&place_of), py::arg("images"), py::arg("channels"), py::arg("height"), py::arg("width"),
           py::arg("dtype"), py::arg("device"), py::arg("stream"));
  py::class_<ConvShape>(m, "ConvShape", py::module_local())
      .def(py::init(&conv_shape), py::arg("x"), py::arg("filters"), py::arg("kernel_size"), py::arg("stride"),
           py::arg("padding"), py::arg("dilation"))
      .def_readonly("out_height", &ConvShape::out_height)
      .def_readonly("out_width", &ConvShape::out_width)
      .def_property_readonly("steps", &cuda::conv_steps);
  py::class_<cuda::ConvChoice>(m, "ConvChoice", py::module_local())
      .def(py::init<int, int>(), py::arg("tile"), py::arg("splits"))
      .def_readonly("tile", &cuda::ConvChoice::tile)
      .def_readonly("splits", &cuda::ConvChoice::splits);
  py::class_<PixelScale>(m, "PixelScale", py::module_local())
      .def(py::init([](const std::array<float, 3>& scale, const std::array<float, 3>& shift) {
             return PixelScale{{scale[0], scale[1], scale[2]}, {shift[0], shift[1], shift[2]}};
           }),
           py::arg("scale"), py::arg("shift"));

  using NoGil = py::call_guard<py::gil_scoped_release>;
  m.attr("CONV_TILES") = cuda::conv_tiles();
  m.def("mask_stride", &cuda::mask_stride, py::arg("channels"));
  m.def("bn_workspace_bytes", [](const Place& place) { return cuda::bn_workspace_bytes(matrix(place), place.device); });
  m.def("fits_on_chip", [](const Place& place) { return cuda::fits_on_chip(matrix(place), place.device); });
  m.def("choose_conv", &cuda::choose_conv, py::arg("shape"), py::arg("device"));
  m.def("conv_workspace_bytes", &cuda::conv_workspace_bytes, py::arg("shape"), py::arg("choice"));
  m.def("bn_stats", &bn_stats, NoGil());
  m.def("bn_apply", &bn_apply, NoGil());
  m.def("bn_apply_dual", &bn_apply_dual, NoGil());
  m.def("bn_stats_apply", &bn_stats_apply, NoGil());
  m.def("bn_grad_stats", &bn_grad_stats, NoGil());
  m.def("bn_grad_apply", &bn_grad_apply, NoGil());
  m.def("conv_bn_act", &conv_bn_act, NoGil());
  m.def("stem", &stem, NoGil());
  m.def("avgpool", &avgpool, NoGil());
}

#else

void define_cuda(py::module_&) {}

#endif

}  // namespace fused_resnet
