// Convolutions whose weights are laid out already: one, and many in a row.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "buffers.h"
#include "conv.h"

namespace fused_resnet {

// `conv` on images of this size. Throws std::invalid_argument if a size is not positive, the output's included.
CpuConv on_images(CpuConv conv, int64_t images, int height, int width, int threads);

// Weights and bias as one method wants them.
class PackedConv {
 public:
  // weight: (filters, kernel_height, kernel_width, group_channels) of the dtype; it stays there, unchanged, as long as
  // this, for Winograd's method reads it again where its own numbers overflow. bias is copied. Throws
  // std::invalid_argument if the method cannot do the convolution on this processor.
  PackedConv(ConvMethod method, const void* weight, const float* bias, const CpuConv& conv);

  void run(const CpuConv& conv, const void* x, const void* residual, bool relu, void* out) const;

  const CpuConv& conv() const { return conv_; }
  int64_t bytes() const { return packed_.bytes() + bias_.bytes(); }

 private:
  ConvMethod method_;
  CpuConv conv_;
  ConvWeight weight_;
  Buffer packed_, bias_;
};

// The convolutions of blocks in a row, or of a network with its poolings, called once. Activations have numbers: 0 is
// the input, 1 the output, others lie in memory of the chain's for the time of a call.
class ConvChain {
 public:
  // Of that memory: how large it is, and where in it activations 2, 3, ... lie. One that nobody reads any more may lie
  // where a later one does.
  ConvChain(int64_t bytes, std::vector<int64_t> offsets) : bytes_(bytes), offsets_(std::move(offsets)) {}

  // residual: an activation, or -1. The residual's memory may be the output's, no other's.
  void add(std::shared_ptr<const PackedConv> conv, int64_t images, int height, int width, int threads, int x,
           int residual, bool relu, int out);
  void add_max_pool(const CpuConv& window, int64_t images, int height, int width, int threads, int x, int out);
  // The mean of each channel of an image; of `pixel` only channels and dtype matter.
  void add_average(const CpuConv& pixel, int64_t images, int height, int width, int threads, int x, int out);
  void run(const void* x, void* out) const;

 private:
  enum class Kind { conv, max_pool, average };
  struct Step {
    Kind kind;
    std::shared_ptr<const PackedConv> packed;  // of a convolution
    CpuConv conv;
    int x, residual;
    bool relu;
    int out;
  };

  struct Place {
    int64_t begin, end;  // in the chain's memory; nothing of it for its input and output
  };
  // Throws std::invalid_argument if so many bytes do not fit there.
  Place place(int activation, int64_t bytes) const;
  void add_step(Step step);

  int64_t bytes_;
  std::vector<int64_t> offsets_;
  std::vector<Step> steps_;
};

}  // namespace fused_resnet
