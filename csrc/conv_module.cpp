#include "conv_module.h"

#include <algorithm>
#include <array>

#include "buffers.h"
#include "conv.h"

namespace py = pybind11;

namespace fused_resnet {
namespace {

using Address = uintptr_t;
using Pair = std::array<int, 2>;

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

Pair pair_of(const py::sequence& numbers) {
  if (numbers.size() != 2) throw py::value_error("each of kernel_size, stride, padding and dilation must be a pair");
  return {numbers[0].cast<int>(), numbers[1].cast<int>()};
}

int output_size(int size, int kernel, int stride, int padding, int dilation) {
  return (size + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1;
}

// What a convolution or a pooling is, whatever its image.
CpuConv window_of(int channels, int filters, const Pair& kernel_size, const Pair& stride, const Pair& padding,
                  const Pair& dilation, int groups, DType dtype) {
  const bool sizes = channels >= 1 && filters >= 1 && groups >= 1 && channels % groups == 0 && filters % groups == 0;
  if (!sizes) throw py::value_error("channels and filters must be positive multiples of groups");
  for (int i = 0; i < 2; ++i) {
    if (kernel_size[i] < 1 || stride[i] < 1 || dilation[i] < 1 || padding[i] < 0) {
      throw py::value_error("kernel_size, stride and dilation must be positive, padding not negative");
    }
  }
  CpuConv conv{};
  conv.channels = channels;
  conv.filters = filters;
  conv.kernel_height = kernel_size[0];
  conv.kernel_width = kernel_size[1];
  conv.stride_height = stride[0];
  conv.stride_width = stride[1];
  conv.padding_height = padding[0];
  conv.padding_width = padding[1];
  conv.dilation_height = dilation[0];
  conv.dilation_width = dilation[1];
  conv.groups = groups;
  conv.dtype = dtype;
  return conv;
}

// The same on images of this size.
CpuConv on_images(CpuConv conv, int64_t images, int height, int width, int threads) {
  conv.images = images;
  conv.height = height;
  conv.width = width;
  conv.out_height =
      output_size(height, conv.kernel_height, conv.stride_height, conv.padding_height, conv.dilation_height);
  conv.out_width = output_size(width, conv.kernel_width, conv.stride_width, conv.padding_width, conv.dilation_width);
  conv.threads = threads;
  if (images < 1 || height < 1 || width < 1 || threads < 1 || conv.out_height < 1 || conv.out_width < 1) {
    throw py::value_error("images, height, width and threads must be positive, and so must the output's sizes");
  }
  return conv;
}

// Weights laid out for one method, which this keeps.
class PackedConv {
 public:
  PackedConv(ConvMethod method, Address weight, Address bias, const CpuConv& conv)
      : method_(method), conv_(conv), packed_(checked_bytes(method, conv)), bias_(bias_bytes(conv)) {
    conv_kernels().pack(conv_, method_, pointer<const void>(weight), packed_.data());
    std::copy_n(pointer<const float>(bias), conv.filters, static_cast<float*>(bias_.data()));
  }

  void run(int64_t images, int height, int width, int threads, Address x, Address residual, bool relu,
           Address out) const {
    const ConvEpilogue epilogue{static_cast<const float*>(bias_.data()), pointer<const void>(residual), relu,
                                pointer<void>(out)};
    conv_kernels().run(on_images(conv_, images, height, width, threads), method_, pointer<const void>(x),
                       packed_.data(), epilogue);
  }

  int64_t bytes() const { return packed_.bytes() + bias_.bytes(); }

 private:
  static int64_t checked_bytes(ConvMethod method, const CpuConv& conv) {
    if (!conv_kernels().takes(conv, method)) {
      throw py::value_error("this method cannot do this convolution on this processor: ask conv_takes first");
    }
    return conv_kernels().packed_bytes(conv, method);
  }
  static int64_t bias_bytes(const CpuConv& conv) { return conv.filters * static_cast<int64_t>(sizeof(float)); }

  ConvMethod method_;
  CpuConv conv_;
  Buffer packed_, bias_;
};

}  // namespace

void define_conv(py::module_& m) {
  py::enum_<ConvMethod>(m, "ConvMethod")
      .value("gemm", ConvMethod::gemm)
      .value("winograd", ConvMethod::winograd)
      .value("grouped", ConvMethod::grouped);
  const auto conv_of = [](int channels, int filters, const py::sequence& kernel_size, const py::sequence& stride,
                          const py::sequence& padding, const py::sequence& dilation, int groups, DType dtype) {
    return window_of(channels, filters, pair_of(kernel_size), pair_of(stride), pair_of(padding), pair_of(dilation),
                     groups, dtype);
  };
  py::class_<CpuConv>(m, "Conv", "A convolution or a pooling, whatever its image.")
      .def(py::init(conv_of), py::arg("channels"), py::arg("filters"), py::arg("kernel_size"), py::arg("stride"),
           py::arg("padding"), py::arg("dilation"), py::arg("groups"), py::arg("dtype"));
  using NoGil = py::call_guard<py::gil_scoped_release>;
  m.def("conv_takes", [](const CpuConv& conv, ConvMethod method) { return conv_kernels().takes(conv, method); });
  py::class_<PackedConv>(m, "PackedConv", "Weights of a convolution as one method wants them.")
      .def(py::init<ConvMethod, Address, Address, const CpuConv&>(), py::arg("method"), py::arg("weight"),
           py::arg("bias"), py::arg("conv"))
      .def("run", &PackedConv::run, NoGil())
      .def_property_readonly("bytes", &PackedConv::bytes);
  m.def(
      "max_pool",
      [](const CpuConv& pool, int64_t images, int height, int width, int threads, Address x, Address out) {
        conv_kernels().max_pool(on_images(pool, images, height, width, threads), pointer<const void>(x),
                                pointer<void>(out));
      },
      NoGil());
}

}  // namespace fused_resnet
