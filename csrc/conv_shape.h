// The sizes of a convolution, and of a whole stem.
#pragma once

#include <cstdint>

namespace fused_resnet {

struct ConvShape {
  int64_t pixels;  // of the output: images * out_height * out_width
  int height, width, channels;
  int out_height, out_width, filters;
  int kernel_height, kernel_width;
  int stride_height, stride_width, padding_height, padding_width, dilation_height, dilation_width;
};

struct StemShape {
  int images, height, width;
  int conv_height, conv_width;  // of the convolution's output
  int out_height, out_width;    // of the pooling's
  int filters;                  // a multiple of 64
  int64_t strides[4];           // of x, in elements: image, channel, row, column
};

// What makes a number in the range that the network was trained on of a byte: byte * scale + shift for each channel.
struct PixelScale {
  float scale[3], shift[3];
};

}  // namespace fused_resnet
