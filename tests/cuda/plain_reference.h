// What the kernels of csrc/cuda compute, as plain loops in double precision: no tiles, no vectors, no second pass.
// Activations are NHWC, as matrices (rows, channels) where the position of a pixel does not matter.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "conv_shape.h"

namespace fused_resnet {
namespace plain {

using Numbers = std::vector<double>;

struct Statistics {
  Numbers mean, invstd, unbiased_variance;
};
inline Statistics statistics(const Numbers& x, std::size_t channels, double eps) {
  const std::size_t rows = x.size() / channels;
  Statistics found{Numbers(channels), Numbers(channels), Numbers(channels)};
  for (std::size_t channel = 0; channel < channels; ++channel) {
    double sum = 0.0, squares = 0.0;
    for (std::size_t row = 0; row < rows; ++row) sum += x[row * channels + channel];
    const double mean = sum / rows;
    for (std::size_t row = 0; row < rows; ++row) squares += std::pow(x[row * channels + channel] - mean, 2.0);
    found.mean[channel] = mean;
    found.invstd[channel] = 1.0 / std::sqrt(squares / rows + eps);
    found.unbiased_variance[channel] = squares / std::max<std::size_t>(rows - 1, 1);
  }
  return found;
}

// A batch norm whose statistics are known; one number for each channel.
struct Norm {
  Numbers mean, invstd, weight, bias;

  double of(double x, std::size_t channel) const {
    return (x - mean[channel]) * invstd[channel] * weight[channel] + bias[channel];
  }
};

inline Numbers normalized(const Numbers& x, const Norm& norm) {
  const std::size_t channels = norm.mean.size();
  Numbers z(x.size());
  for (std::size_t i = 0; i < x.size(); ++i) z[i] = norm.of(x[i], i % channels);
  return z;
}
inline Numbers added(const Numbers& a, const Numbers& b) {
  Numbers sum(a.size());
  for (std::size_t i = 0; i < a.size(); ++i) sum[i] = a[i] + b[i];
  return sum;
}
inline Numbers rectified(const Numbers& z, bool relu) {
  Numbers out(z);
  for (double& number : out) number = relu && number < 0.0 ? 0.0 : number;
  return out;
}

struct Sums {
  Numbers dz, dz_xhat;
};
// Over the rows, of dz and of dz * xhat.
inline Sums gradient_sums(const Numbers& dz, const Numbers& x, const Norm& norm) {
  const std::size_t channels = norm.mean.size();
  Sums sums{Numbers(channels), Numbers(channels)};
  for (std::size_t i = 0; i < x.size(); ++i) {
    const std::size_t channel = i % channels;
    sums.dz[channel] += dz[i];
    sums.dz_xhat[channel] += dz[i] * (x[i] - norm.mean[channel]) * norm.invstd[channel];
  }
  return sums;
}
// The gradient of x, whose statistics are constant or those of these very rows.
inline Numbers gradient_of_x(const Numbers& dz, const Numbers& x, const Norm& norm, const Sums& sums, bool constant) {
  const std::size_t channels = norm.mean.size();
  const double rows = static_cast<double>(x.size() / channels);
  Numbers gradient(x.size());
  for (std::size_t i = 0; i < x.size(); ++i) {
    const std::size_t channel = i % channels;
    const double xhat = (x[i] - norm.mean[channel]) * norm.invstd[channel];
    const double through_statistics = (sums.dz[channel] + xhat * sums.dz_xhat[channel]) / rows;
    const double of_xhat = dz[i] - (constant ? 0.0 : through_statistics);
    gradient[i] = norm.weight[channel] * norm.invstd[channel] * of_xhat;
  }
  return gradient;
}

// act(conv(x, weight) * scale + shift + residual), (pixels, filters); weight is (filters, R, S, channels).
inline Numbers convolution(const Numbers& x, const Numbers& weight, const ConvShape& shape) {
  Numbers sums(static_cast<std::size_t>(shape.pixels) * shape.filters);
  for (std::size_t place = 0; place < sums.size(); ++place) {
    const int64_t pixel = static_cast<int64_t>(place) / shape.filters;
    const int filter = static_cast<int>(place) % shape.filters;
    const int out_column = static_cast<int>(pixel % shape.out_width);
    const int out_row = static_cast<int>(pixel / shape.out_width % shape.out_height);
    const int64_t image = pixel / shape.out_width / shape.out_height;
    double sum = 0.0;
    for (int tap = 0; tap < shape.kernel_height * shape.kernel_width; ++tap) {
      const int down = tap / shape.kernel_width * shape.dilation_height;
      const int right = tap % shape.kernel_width * shape.dilation_width;
      const int row = out_row * shape.stride_height - shape.padding_height + down;
      const int column = out_column * shape.stride_width - shape.padding_width + right;
      if (row < 0 || row >= shape.height || column < 0 || column >= shape.width) continue;
      const double* const from = &x[((image * shape.height + row) * shape.width + column) * shape.channels];
      const int64_t taps = int64_t{shape.kernel_height} * shape.kernel_width;
      const double* const factors = &weight[(filter * taps + tap) * shape.channels];
      for (int channel = 0; channel < shape.channels; ++channel) sum += from[channel] * factors[channel];
    }
    sums[place] = sum;
  }
  return sums;
}
inline Numbers scaled(const Numbers& sums, const Numbers& scale, const Numbers& shift) {
  Numbers z(sums.size());
  for (std::size_t i = 0; i < z.size(); ++i) z[i] = sums[i] * scale[i % scale.size()] + shift[i % scale.size()];
  return z;
}

// The largest of 3x3, with a stride of 2 and a padding of 1.
inline Numbers max_pool(const Numbers& x, int images, int height, int width, int channels, int out_height,
                        int out_width) {
  Numbers out;
  for (int place = 0; place < images * out_height * out_width * channels; ++place) {
    const int channel = place % channels, pixel = place / channels;
    const int middle_column = pixel % out_width * 2, middle_row = pixel / out_width % out_height * 2;
    const int image = pixel / out_width / out_height;
    double largest = -INFINITY;
    for (int row = std::max(middle_row - 1, 0); row < std::min(middle_row + 2, height); ++row) {
      for (int column = std::max(middle_column - 1, 0); column < std::min(middle_column + 2, width); ++column) {
        largest = std::max(largest, x[((int64_t{image} * height + row) * width + column) * channels + channel]);
      }
    }
    out.push_back(largest);
  }
  return out;
}

// The mean of each channel over the pixels of an image.
inline Numbers mean_of_images(const Numbers& x, std::size_t images, std::size_t channels) {
  Numbers means(images * channels);
  const std::size_t pixels = x.size() / images / channels;
  for (std::size_t i = 0; i < x.size(); ++i) means[i / (pixels * channels) * channels + i % channels] += x[i] / pixels;
  return means;
}

}  // namespace plain
}  // namespace fused_resnet
