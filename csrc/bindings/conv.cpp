#include "conv.h"

#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <string>
#include <vector>

#include "address.h"
#include "cpu/conv_training.h"
#include "cpu/packed_conv.h"

namespace py = pybind11;

namespace fused_resnet {
namespace {

using Pair = std::array<int, 2>;

template <typename T>
T* pointer(Address address) {
  return address.pointer<T>();
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

void run(const PackedConv& packed, int64_t images, int height, int width, int threads, Address x, Address residual,
         bool relu, Address out) {
  packed.run(on_images(packed.conv(), images, height, width, threads), pointer<const void>(x),
             pointer<const void>(residual), relu, pointer<void>(out));
}

void run_chain(const ConvChain& chain, Address x, Address out) {
  chain.run(pointer<const void>(x), pointer<void>(out));
}

void max_pool(const CpuConv& pool, int64_t images, int height, int width, int threads, Address x, Address out) {
  conv_kernels().max_pool(on_images(pool, images, height, width, threads), pointer<const void>(x), pointer<void>(out));
}

void average(int64_t images, int channels, int height, int width, DType dtype, int threads, Address x, Address out) {
  const CpuConv pixel = window_of(channels, channels, {1, 1}, {1, 1}, {0, 0}, {1, 1}, 1, dtype);
  conv_kernels().average(on_images(pixel, images, height, width, threads), pointer<const void>(x), pointer<void>(out));
}

// Where the weights lie, in elements.
using Strides = std::array<int64_t, 4>;  // of filter, channel, row and column, as PyTorch has them

ConvWeight weight_of(Address address, const Strides& strides) {
  return {pointer<const void>(address), strides[0], strides[2], strides[3], strides[1]};
}

// Whether a method does a convolution's forward, "input" or "weight" gradient.
bool trains(const CpuConv& conv, ConvMethod method, const std::string& what) {
  if (conv.groups != 1 || conv.dtype != DType::float32 || method == ConvMethod::grouped) return false;
  if (what != "input") return conv_kernels().takes(conv, method);
  return grad_input_takes(conv) && conv_kernels().takes(grad_input_conv(conv), method);
}

// x, or what a norm and a ReLU make of it, with the vectors that say so.
class Input {
 public:
  Input(Address x, const std::optional<Norm>& norm, int channels) : input_{pointer<const void>(x)} {
    if (!norm) return;
    scale_.assign(norm->invstd, norm->invstd + channels);
    for (int c = 0; norm->weight != nullptr && c < channels; ++c) scale_[c] *= norm->weight[c];
    if (norm->bias == nullptr) bias_.resize(channels);
    input_.mean = norm->mean;
    input_.scale = scale_.data();
    input_.bias = norm->bias == nullptr ? bias_.data() : norm->bias;
  }
  const ConvInput& get() const { return input_; }

 private:
  ConvInput input_;
  std::vector<float> scale_, bias_;
};

// A convolution of a training step and its gradients, on images of one size: each by the method that is named.
class TrainingConv {
 public:
  TrainingConv(const CpuConv& conv, int64_t images, int height, int width, int threads, ConvMethod forward,
               ConvMethod grad_input, ConvMethod grad_weight)
      : conv_{on_images(conv, images, height, width, threads)},
        forward_{forward},
        grad_input_{grad_input},
        grad_weight_{grad_weight} {
    if (!trains(conv_, forward, "forward") || !trains(conv_, grad_input, "input") ||
        !trains(conv_, grad_weight, "weight")) {
      throw py::value_error("a method cannot do this in training: ask conv_trains first");
    }
  }

  void forward(Address x, const std::optional<Norm>& norm, Address weight, const Strides& strides, Address out) const {
    conv_forward(conv_, forward_, Input(x, norm, conv_.channels).get(), weight_of(weight, strides), pointer<void>(out));
  }

  void grad_input(Address grad_out, Address weight, const Strides& strides, Address residual, Address out) const {
    conv_grad_input(conv_, grad_input_, pointer<const void>(grad_out), weight_of(weight, strides),
                    pointer<const void>(residual), pointer<void>(out));
  }

  void grad_weight(Address x, const std::optional<Norm>& norm, Address grad_out, Address out) const {
    conv_kernels().grad_weight(conv_, grad_weight_, Input(x, norm, conv_.channels).get(), pointer<const void>(grad_out),
                               pointer<float>(out));
  }

 private:
  CpuConv conv_;
  ConvMethod forward_, grad_input_, grad_weight_;
};

}  // namespace

void define_conv(py::module_& m) {
  using NoGil = py::call_guard<py::gil_scoped_release>;
  py::enum_<ConvMethod>(m, "ConvMethod")
      .value("gemm", ConvMethod::gemm)
      .value("winograd", ConvMethod::winograd)
      .value("grouped", ConvMethod::grouped);
  py::class_<CpuConv>(m, "Conv", "A convolution or a pooling, whatever its image.")
      .def(py::init(&window_of), py::arg("channels"), py::arg("filters"), py::arg("kernel_size"), py::arg("stride"),
           py::arg("padding"), py::arg("dilation"), py::arg("groups"), py::arg("dtype"))
      .def_readonly("groups", &CpuConv::groups);
  m.def("conv_trains", &trains, py::arg("conv"), py::arg("method"), py::arg("what"));
  py::class_<TrainingConv>(m, "TrainingConv", "A convolution of a training step and its gradients.")
      .def(py::init<const CpuConv&, int64_t, int, int, int, ConvMethod, ConvMethod, ConvMethod>(), py::arg("conv"),
           py::arg("images"), py::arg("height"), py::arg("width"), py::arg("threads"), py::arg("forward"),
           py::arg("grad_input"), py::arg("grad_weight"))
      .def("forward", &TrainingConv::forward, NoGil())
      .def("grad_input", &TrainingConv::grad_input, NoGil())
      .def("grad_weight", &TrainingConv::grad_weight, NoGil());
  m.def("conv_takes", [](const CpuConv& conv, ConvMethod method) { return conv_kernels().takes(conv, method); });
  const auto pack = [](ConvMethod method, Address weight, Address bias, const CpuConv& conv) {
    return std::make_shared<PackedConv>(method, pointer<const void>(weight), pointer<const float>(bias), conv);
  };
  py::class_<PackedConv, std::shared_ptr<PackedConv>>(m, "PackedConv", "Weights as one method wants them.")
      .def(py::init(pack), py::arg("method"), py::arg("weight"), py::arg("bias"), py::arg("conv"))
      .def("run", &run, NoGil())
      .def_property_readonly("bytes", &PackedConv::bytes);
  py::class_<ConvChain>(m, "ConvChain", "Convolutions in a row, called once.")
      .def(py::init<int64_t, std::vector<int64_t>>(), py::arg("bytes"), py::arg("offsets"))
      .def("add", [](ConvChain& chain, std::shared_ptr<PackedConv> conv, int64_t images, int height, int width,
                     int threads, int x, int residual, bool relu,
                     int out) { chain.add(std::move(conv), images, height, width, threads, x, residual, relu, out); })
      .def("add_max_pool", &ConvChain::add_max_pool)
      .def("add_average", &ConvChain::add_average)
      .def("run", &run_chain, NoGil());
  m.def("max_pool", &max_pool, NoGil());
  m.def("average", &average, NoGil());
}

}  // namespace fused_resnet
