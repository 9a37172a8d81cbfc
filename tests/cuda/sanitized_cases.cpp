// The launchers of csrc/cuda/ops.h, called with memory of exactly the size that they may touch and compared with plain
// loops. `sanitized_cases CASE [seeds]` exits with 0 if that is so for each of as many orders of blocks and threads
// and as many inputs; it says what is not. Without a case it lists them. test_sanitizers.py compiles it with each
// sanitizer, test_planted_bugs.py with kernels that are wrong.
#include <control.h>

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>

#include "exact_memory.h"

using namespace fused_resnet;
using namespace fused_resnet::sanitized;
using cuda::Call;
using cuda::Matrix;

// An activation, `skipped` elements behind an address that vectors could be loaded from.
struct Shape {
  DType dtype;
  std::size_t rows, channels, skipped;

  std::size_t size() const { return rows * channels; }
  Matrix matrix() const { return {static_cast<int64_t>(rows), static_cast<int>(channels), dtype}; }
  Call call(const char* op) const { return {op, {1, matrix().channels, 1, matrix().rows, dtype, 0, nullptr}}; }
  Elements nothing() const { return Elements(dtype, size(), skipped); }
};
// The device has 3 multiprocessors, so 12 parts of the rows fill it.
constexpr Shape kShapes[] = {
    {DType::float16, 1000, 72, 0},   // vectors; idle lanes; parts of one tile, of two, and of two less some rows
    {DType::bfloat16, 333, 136, 0},  // vectors; a warp is one row; slices where the vectors are of 4
    {DType::float32, 1100, 24, 0},   // vectors of 4, two lanes for each byte of a mask
    {DType::bfloat16, 700, 13, 0},   // element by element
    {DType::float16, 200, 24, 1},    // the same for the address's sake; slices
    {DType::float32, 1, 8, 0},       // one row
};

template <typename Body>
static void for_each_shape(const Body& body) {
  for (const Shape& shape : kShapes) {
    try {
      body(shape);
    } catch (const std::runtime_error& error) {
      throw std::runtime_error(std::to_string(shape.rows) + " rows of " + std::to_string(shape.channels) +
                               " channels: " + error.what());
    }
  }
}

static Elements activation(std::mt19937& random, const Shape& shape, double low = -1.5, double high = 2.0) {
  return random_elements(random, shape.dtype, shape.size(), low, high, shape.skipped);
}

static void expect_mask(const Bytes& mask, const Shape& shape, const Numbers& z) {
  for (std::size_t i = 0; i < z.size(); ++i) {
    const std::size_t row = i / shape.channels, channel = i % shape.channels;
    const std::size_t byte = row * static_cast<std::size_t>(cuda::mask_stride(shape.matrix().channels)) + channel / 8;
    const bool bit = mask[byte] >> channel % 8 & 1;
    if (std::fabs(z[i]) > 1e-4 && bit != (z[i] > 0.0)) {
      throw std::runtime_error("mismatch: the mask of row " + std::to_string(row) + ", channel " +
                               std::to_string(channel) + " is " + std::to_string(bit));
    }
  }
}
static std::size_t mask_bytes(const Shape& shape) {
  return shape.rows * static_cast<std::size_t>(cuda::mask_stride(shape.matrix().channels));
}

// What comes of statistics. Running ones begin with 1.
struct Found {
  Elements mean, invstd, running_mean, running_var;

  explicit Found(std::size_t channels)
      : mean(DType::float32, channels),
        invstd(DType::float32, channels),
        running_mean(DType::float32, Numbers(channels, 1.0)),
        running_var(DType::float32, Numbers(channels, 1.0)) {}
  void expect(const plain::Statistics& expected) const {
    expect_near("mean", mean.numbers(), expected.mean, {1e-6, 1e-6});
    expect_near("invstd", invstd.numbers(), expected.invstd, {1e-5, 0.0});
    expect_near("running_mean", running_mean.numbers(), plain::scaled(expected.mean, {0.1}, {0.9}), {1e-6, 1e-6});
    const Numbers variance = plain::scaled(expected.unbiased_variance, {0.1}, {0.9});
    expect_near("running_var", running_var.numbers(), variance, {1e-5, 0.0});
  }
};

static void bn_stats(std::mt19937& random) {
  for_each_shape([&](const Shape& shape) {
    const bool large_mean = shape.dtype == DType::float32;  // 3,000 times the standard deviation
    const Elements x = activation(random, shape, large_mean ? 3000.0 : -1.5, large_mean ? 3003.5 : 2.0);
    const Found found(shape.channels);
    const Bytes workspace = bytes(cuda::bn_workspace_bytes(shape.matrix(), 0));
    cuda::bn_stats(shape.call("bn_stats"), shape.matrix(), x.address(), found.mean.floats(), found.invstd.floats(),
                   found.running_mean.floats(), found.running_var.floats(), 0.1, 1e-5, workspace.get());
    found.expect(plain::statistics(x.numbers(), shape.channels, 1e-5));
  });
}

static void bn_stats_apply(std::mt19937& random) {
  for_each_shape([&](const Shape& shape) {
    for (const bool masked : {true, false}) {
      const Elements x = activation(random, shape), residual = activation(random, shape), out = shape.nothing();
      const Elements weight = random_floats(random, shape.channels, -1.5, 1.5);
      const Elements bias = random_floats(random, shape.channels, -0.5, 0.5);
      const Found found(shape.channels);
      const Bytes workspace = bytes(cuda::bn_workspace_bytes(shape.matrix(), 0)), mask = bytes(mask_bytes(shape));
      cuda::bn_stats_apply(shape.call("bn_stats_apply"), shape.matrix(), x.address(),
                           masked ? residual.address() : nullptr, weight.floats(), bias.floats(), found.mean.floats(),
                           found.invstd.floats(), found.running_mean.floats(), found.running_var.floats(), 0.1, 1e-5,
                           masked, out.address(), masked ? mask.get() : nullptr, workspace.get());
      const plain::Statistics statistics = plain::statistics(x.numbers(), shape.channels, 1e-5);
      found.expect(statistics);
      const Numbers z =
          plain::normalized(x.numbers(), {statistics.mean, statistics.invstd, weight.numbers(), bias.numbers()});
      const Numbers sum = masked ? plain::added(z, residual.numbers()) : z;
      expect_near("out", out.numbers(), plain::rectified(sum, masked), tolerance_of(shape.dtype));
      if (masked) expect_mask(mask, shape, sum);
    }
  });
}

// With a residual, a ReLU and its mask; and without.
static void bn_apply(std::mt19937& random) {
  for_each_shape([&](const Shape& shape) {
    for (const bool masked : {true, false}) {
      const Elements x = activation(random, shape), residual = activation(random, shape), out = shape.nothing();
      const Vectors norm(random, shape.channels);
      const Bytes mask = bytes(mask_bytes(shape));
      cuda::bn_apply(shape.call("bn_apply"), shape.matrix(), x.address(), norm.addresses(),
                     masked ? residual.address() : nullptr, masked, out.address(), masked ? mask.get() : nullptr);
      Numbers z = plain::normalized(x.numbers(), norm.plain());
      if (masked) z = plain::added(z, residual.numbers());
      expect_near("out", out.numbers(), plain::rectified(z, masked), tolerance_of(shape.dtype));
      if (masked) expect_mask(mask, shape, z);
    }
  });
}
static void bn_apply_dual(std::mt19937& random) {
  for_each_shape([&](const Shape& shape) {
    const Elements x = activation(random, shape), x2 = activation(random, shape), out = shape.nothing();
    const Vectors norm(random, shape.channels), norm2(random, shape.channels);
    const Bytes mask = bytes(mask_bytes(shape));
    cuda::bn_apply_dual(shape.call("bn_apply_dual"), shape.matrix(), x.address(), norm.addresses(), x2.address(),
                        norm2.addresses(), true, out.address(), mask.get());
    const Numbers z =
        plain::added(plain::normalized(x.numbers(), norm.plain()), plain::normalized(x2.numbers(), norm2.plain()));
    expect_near("out", out.numbers(), plain::rectified(z, true), tolerance_of(shape.dtype));
    expect_mask(mask, shape, z);
  });
}

// What a backward pass is called with, and the dz that is to come of it, for one of the forms of the ReLU.
enum class Form { kNone, kOfX, kOfOut, kBits };
struct Backward {
  Elements x, grad_out, out;
  Vectors norm;
  Bytes mask;
  Numbers expected_dz;

  Backward(std::mt19937& random, const Shape& shape, Form form)
      : x(activation(random, shape)),
        grad_out(shape.nothing()),
        out(activation(random, shape, -1.0, 1.0)),
        norm(random, shape.channels),
        mask(bytes(mask_bytes(shape))) {
    for (std::size_t i = 0; i < mask_bytes(shape); ++i) mask[i] = static_cast<unsigned char>(random());
    Numbers gradient = random_numbers(random, shape.size(), -1.0, 1.0);
    const Numbers z = plain::normalized(x.numbers(), norm.plain()), given = out.numbers();
    // No gradient where the sign of z depends on roundings.
    for (std::size_t i = 0; i < z.size(); ++i) gradient[i] = std::fabs(z[i]) < 1e-4 ? 0.0 : gradient[i];
    grad_out = Elements(shape.dtype, gradient, shape.skipped);
    expected_dz = grad_out.numbers();
    const std::size_t stride = static_cast<std::size_t>(cuda::mask_stride(shape.matrix().channels));
    for (std::size_t i = 0; i < z.size(); ++i) {
      const std::size_t row = i / shape.channels, channel = i % shape.channels;
      const bool bit = mask[row * stride + channel / 8] >> channel % 8 & 1;
      const bool stopped = (form == Form::kOfX && z[i] <= 0.0) || (form == Form::kOfOut && given[i] <= 0.0) ||
                           (form == Form::kBits && !bit);
      if (stopped) expected_dz[i] = 0.0;
    }
  }
  const unsigned char* mask_of(Form form) const { return form == Form::kBits ? mask.get() : nullptr; }
};

static void bn_grad_stats(std::mt19937& random) {
  for_each_shape([&](const Shape& shape) {
    for (const Form form : {Form::kNone, Form::kOfX, Form::kOfOut, Form::kBits}) {
      const Backward given(random, shape, form);
      const Elements dz = shape.nothing();
      const Elements sum_dz(DType::float32, shape.channels), sum_dz_xhat(DType::float32, shape.channels);
      const Bytes workspace = bytes(cuda::bn_workspace_bytes(shape.matrix(), 0));
      cuda::bn_grad_stats(shape.call("bn_grad_stats"), shape.matrix(), given.grad_out.address(), given.x.address(),
                          form == Form::kOfOut ? given.out.address() : nullptr, given.mask_of(form),
                          given.norm.addresses(), form != Form::kNone, dz.address(), sum_dz.floats(),
                          sum_dz_xhat.floats(), workspace.get());
      const plain::Sums sums = plain::gradient_sums(given.expected_dz, given.x.numbers(), given.norm.plain());
      const Tolerance of_a_sum{0.0, 1e-6 * static_cast<double>(shape.rows) + 1e-6};
      expect_near("dz", dz.numbers(), given.expected_dz, {0.0, 0.0});
      expect_near("sum_dz", sum_dz.numbers(), sums.dz, of_a_sum);
      expect_near("sum_dz_xhat", sum_dz_xhat.numbers(), sums.dz_xhat, of_a_sum);
    }
  });
}

static void bn_grad_apply(std::mt19937& random) {
  for_each_shape([&](const Shape& shape) {
    for (const Form form : {Form::kNone, Form::kOfX, Form::kBits}) {
      const bool constant = form == Form::kBits;
      const Backward given(random, shape, form);
      const Elements dz = shape.nothing(), grad_x = shape.nothing();
      const double most = 0.5 * static_cast<double>(shape.rows);
      const Elements sum_dz = random_floats(random, shape.channels, -most, most);
      const Elements sum_dz_xhat = random_floats(random, shape.channels, -most, most);
      cuda::bn_grad_apply(shape.call("bn_grad_apply"), shape.matrix(), given.grad_out.address(), given.x.address(),
                          given.mask_of(form), given.norm.addresses(), constant ? nullptr : sum_dz.floats(),
                          constant ? nullptr : sum_dz_xhat.floats(), form != Form::kNone, dz.address(),
                          grad_x.address());
      expect_near("dz", dz.numbers(), given.expected_dz, {0.0, 0.0});
      const plain::Sums sums{sum_dz.numbers(), sum_dz_xhat.numbers()};
      expect_near("grad_x", grad_x.numbers(),
                  plain::gradient_of_x(given.expected_dz, given.x.numbers(), given.norm.plain(), sums, constant),
                  tolerance_of(shape.dtype));
    }
  });
}

static void avgpool(std::mt19937& random) {
  for (const Shape& shape : {Shape{DType::float16, 2 * 49, 72, 0}, Shape{DType::float32, 3 * 35, 13, 0},
                             Shape{DType::bfloat16, 2 * 3, 264, 0}, Shape{DType::float16, 2 * 49, 8, 1}}) {
    const std::size_t images = shape.rows % 3 == 0 && shape.rows > 6 ? 3 : 2;
    const Elements x = activation(random, shape), out(shape.dtype, images * shape.channels, shape.skipped);
    cuda::avgpool(shape.call("avgpool"), shape.matrix(), static_cast<int64_t>(images), x.address(), out.address());
    expect_near("out", out.numbers(), plain::mean_of_images(x.numbers(), images, shape.channels),
                tolerance_of(shape.dtype));
  }
}

static void check_conv(std::mt19937& random, const ConvShape& shape, DType dtype, const cuda::ConvChoice& choice,
                       bool whole) {
  const std::size_t filters = static_cast<std::size_t>(shape.filters), outputs = shape.pixels * filters;
  const std::size_t images = shape.pixels / shape.out_height / shape.out_width;
  const Elements x = random_elements(random, dtype, images * shape.height * shape.width * shape.channels, -1.0, 1.0);
  const std::size_t taps = static_cast<std::size_t>(shape.kernel_height * shape.kernel_width);
  const Elements weight = random_elements(random, dtype, filters * taps * shape.channels, -0.2, 0.2);
  const Elements scale = random_floats(random, filters, 0.5, 1.5), shift = random_floats(random, filters, -0.5, 0.5);
  const Elements residual = random_elements(random, dtype, outputs, -1.0, 1.0), out(dtype, outputs);
  const Bytes workspace = bytes(cuda::conv_workspace_bytes(shape, choice));
  const Call call{"conv_bn_act",
                  {static_cast<int64_t>(images), shape.channels, shape.height, shape.width, dtype, 0, nullptr}};
  cuda::conv_bn_act(call, shape, dtype, choice, x.address(), weight.address(), whole ? scale.floats() : nullptr,
                    whole ? shift.floats() : nullptr, whole ? residual.address() : nullptr, whole, out.address(),
                    choice.splits == 1 ? nullptr : workspace.get());
  const Numbers sums = plain::convolution(x.numbers(), weight.numbers(), shape);
  const Numbers z =
      whole ? plain::added(plain::scaled(sums, scale.numbers(), shift.numbers()), residual.numbers()) : sums;
  expect_near("out", out.numbers(), plain::rectified(z, whole), tolerance_of(dtype));
}

// pixels; height, width, channels; out_height, out_width, filters; kernel; stride; padding; dilation.
// Tails of the tile in both directions and of the channels of a step; 8 steps, more than there are stages.
constexpr ConvShape kPadded{2 * 9 * 8, 9, 8, 72, 9, 8, 72, 2, 2, 1, 1, 1, 1, 2, 2};
// One step, and for 3 splits no second one.
constexpr ConvShape kPointwise{1 * 4 * 3, 7, 5, 8, 4, 3, 8, 1, 1, 2, 2, 0, 0, 1, 1};
// Two tiles of filters, a kernel that is not square, and one step for each of 3 splits.
constexpr ConvShape kWide{1 * 5 * 5, 5, 5, 16, 5, 5, 136, 1, 3, 1, 1, 0, 1, 1, 1};

static std::function<void(std::mt19937&)> conv_of(int tile, int splits) {
  return [=](std::mt19937& random) {
    if (tile >= cuda::conv_tiles()) throw std::runtime_error("there is no such tile");
    check_conv(random, kPadded, DType::float16, {tile, splits}, true);
    check_conv(random, kPointwise, DType::bfloat16, {tile, splits}, true);
    check_conv(random, kWide, DType::float16, {tile, splits}, false);
  };
}

// An image of 37x35 pixels: five blocks make the 4 tiles of each of 2 images. NCHW, or NHWC where x is of bytes.
template <bool kOfBytes>
static void stem(std::mt19937& random) {
  const DType dtype = kOfBytes ? DType::bfloat16 : DType::float16;
  const int images = 2, height = 37, width = 35, filters = kOfBytes ? 64 : 128;
  StemShape shape{images, height, width, 19, 18, 10, 9, filters, {3 * height * width, height * width, width, 1}};
  if (kOfBytes) shape.strides[1] = 1, shape.strides[2] = 3 * width, shape.strides[3] = 3;
  const std::size_t size = std::size_t{3} * images * height * width;
  Numbers given = random_numbers(random, size, -1.0, 1.0);
  given[20 * width + 20] = INFINITY;  // in the patches of some pixels, and just beside those of others
  const Elements x(dtype, given);
  const Bytes raw = bytes(size);
  const PixelScale pixel_scale{{0.015625f, 0.0078125f, 0.03125f}, {-1.0f, -0.5f, -2.0f}};  // sums are exact

  const Numbers pixels = x.numbers();
  Numbers nhwc(size);
  for (std::size_t i = 0; i < size; ++i) {
    const int64_t channel = i % 3, place = i / 3, image = place / (height * width);
    const int64_t from = image * shape.strides[0] + channel * shape.strides[1] +
                         place / width % height * shape.strides[2] + place % width * shape.strides[3];
    raw[i] = static_cast<unsigned char>(random());  // from == i: these are NHWC
    nhwc[i] = kOfBytes ? raw[i] * pixel_scale.scale[channel] + pixel_scale.shift[channel] : pixels[from];
  }
  nhwc = Elements(dtype, nhwc).numbers();
  const Elements weight = random_elements(random, dtype, std::size_t{49} * 3 * filters, -0.2, 0.2);
  const Elements scale = random_floats(random, filters, 0.5, 1.5), shift = random_floats(random, filters, -0.5, 0.5);
  const Elements out(dtype, std::size_t{1} * images * 10 * 9 * filters);
  cuda::stem({"stem", {images, 3, height, width, dtype, 0, nullptr}}, shape, dtype,
             kOfBytes ? static_cast<const void*>(raw.get()) : x.address(), kOfBytes ? &pixel_scale : nullptr,
             weight.address(), scale.floats(), shift.floats(), out.address());
  const ConvShape conv{images * 19 * 18, height, width, 3, 19, 18, filters, 7, 7, 2, 2, 3, 3, 1, 1};
  const Numbers z = plain::scaled(plain::convolution(nhwc, weight.numbers(), conv), scale.numbers(), shift.numbers());
  expect_near("out", out.numbers(), plain::max_pool(plain::rectified(z, true), images, 19, 18, filters, 10, 9),
              tolerance_of(dtype));
}

int main(int count, char** arguments) {
  std::map<std::string, std::function<void(std::mt19937&)>> cases = {{"bn_stats", bn_stats},
                                                                     {"bn_stats_apply", bn_stats_apply},
                                                                     {"bn_apply", bn_apply},
                                                                     {"bn_apply_dual", bn_apply_dual},
                                                                     {"bn_grad_stats", bn_grad_stats},
                                                                     {"bn_grad_apply", bn_grad_apply},
                                                                     {"avgpool", avgpool},
                                                                     {"stem", stem<false>},
                                                                     {"stem_of_bytes", stem<true>}};
  for (int tile = 0; tile < cuda::conv_tiles(); ++tile) {
    for (const int splits : {1, 3}) {
      cases["conv_tile_" + std::to_string(tile) + "_splits_" + std::to_string(splits)] = conv_of(tile, splits);
    }
  }
  const auto found = cases.find(count > 1 ? arguments[1] : "");
  if (found == cases.end()) {
    for (const auto& [name, unused] : cases) std::printf("%s\n", name.c_str());
    return 2;
  }
  host_execution::set_device({3, 232448, 233472, 9, 0});
  const int seeds = count > 2 ? std::atoi(arguments[2]) : 1;
  for (int seed = 0; seed < seeds; ++seed) {
    try {
      host_execution::set_seed(static_cast<uint64_t>(seed));
      std::mt19937 random(static_cast<unsigned>(seed));
      found->second(random);
    } catch (const std::runtime_error& error) {
      std::fprintf(stderr, "%s, seed %d: %s\n", arguments[1], seed, error.what());
      return 1;
    }
  }
  return 0;
}
