// The choice of a convolution's tile, and its launch.
#include "conv.cuh"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <stdexcept>

#include "rows.h"

namespace fused_resnet {
namespace cuda {
namespace {

using Large = ConvTile<128, 128, 2, 4, 3>;
using Tall = ConvTile<128, 64, 2, 2, 3>;
using Small = ConvTile<64, 64, 2, 2, 3>;

struct Candidate {
  int pixels, filters;
  std::size_t shared_bytes;
};
constexpr Candidate kTiles[] = {{Large::kPixels, Large::kFilters, sizeof(Large::Shared)},
                                {Tall::kPixels, Tall::kFilters, sizeof(Tall::Shared)},
                                {Small::kPixels, Small::kFilters, sizeof(Small::Shared)}};

// What a choice costs, in clock cycles of a multiprocessor. The constants are assumptions, from data sheets and what is
// known of mma.sync; none was measured on a device yet.
constexpr double kProductsPerCycle = 700.0;   // multiply-adds, 70% of an A100's
constexpr double kStepLatency = 250.0;        // of a step whose copies are on their way
constexpr double kBlockLatency = 1500.0;      // first copy, epilogue
constexpr double kCacheBytesPerCycle = 24.0;  // of the L2 cache, for each multiprocessor
constexpr double kBytesPerCycle = 12.0;       // of memory, for each multiprocessor
constexpr double kLaunchCycles = 3000.0;      // one more launch

double predicted_cycles(const ConvShape& shape, const Candidate& tile, int steps, int splits, int device) {
  const DeviceProperties& properties = properties_of(device);
  const int steps_of_split = static_cast<int>(ceil_div(steps, splits));
  const double blocks = static_cast<double>(ceil_div(shape.pixels, tile.pixels)) *
                        ceil_div(shape.filters, tile.filters) * ceil_div(steps, steps_of_split);
  const double resident = std::max<int>(1, properties.shared_memory / static_cast<int>(tile.shared_bytes));
  const double products = tile.pixels * tile.filters * static_cast<double>(kConvDepth) / kProductsPerCycle;
  const double a_block = std::max(products, (tile.pixels + tile.filters) * kConvDepth * 2.0 / kCacheBytesPerCycle);
  const double busiest = std::ceil(blocks / properties.multiprocessors);  // blocks that one multiprocessor runs
  const double rounds = std::ceil(busiest / resident);
  const double cycles = std::max(busiest * steps_of_split * a_block, rounds * steps_of_split * kStepLatency);
  const double outputs = static_cast<double>(shape.pixels) * shape.filters;
  const double partials =
      splits > 1 ? 2.0 * 4.0 * splits * outputs / (kBytesPerCycle * properties.multiprocessors) : 0.0;
  return cycles + rounds * kBlockLatency + partials + (splits > 1 ? kLaunchCycles : 0.0);
}

template <typename T, typename Tile>
void run(const Call& call, const ConvShape& shape, int splits, int steps_of_split, const void* x, const void* weight,
         const Epilogue<T>& epilogue, float* partial_sums) {
  const int64_t tiles = ceil_div(shape.pixels, Tile::kPixels) * ceil_div(shape.filters, Tile::kFilters);
  if (tiles > 0x7fffffff) throw std::runtime_error(described(call) + " has too many tiles");
  launch(call, {dim3(static_cast<unsigned>(tiles), 1, splits), Tile::kThreads, sizeof(typename Tile::Shared)},
         conv_bn_act_kernel<T, Tile>, static_cast<const T*>(x), static_cast<const T*>(weight), shape, steps_of_split,
         epilogue, partial_sums);
}

template <typename T>
void conv(const Call& call, const ConvShape& shape, const ConvChoice& choice, const void* x, const void* weight,
          const float* scale, const float* shift, const void* residual, bool relu, void* out, void* workspace) {
  const DeviceGuard guard(call);
  const Epilogue<T> epilogue{scale, shift, static_cast<const T*>(residual), static_cast<T*>(out), relu};
  const int steps_of_split = static_cast<int>(ceil_div(conv_steps(shape), choice.splits));
  const int splits = static_cast<int>(ceil_div(conv_steps(shape), steps_of_split));
  const auto with_tile = [&](auto pass) {
    pass(call, shape, splits, steps_of_split, x, weight, epilogue, static_cast<float*>(workspace));
  };
  switch (choice.tile) {
    case 0:
      with_tile(run<T, Large>);
      break;
    case 1:
      with_tile(run<T, Tall>);
      break;
    default:
      with_tile(run<T, Small>);
  }
  if (splits == 1) return;
  const int64_t blocks = ceil_div(shape.pixels * (shape.filters / 8), 256);
  launch(call, {dim3(static_cast<unsigned>(blocks)), 256}, conv_finish_kernel<T>, static_cast<float*>(workspace),
         splits, shape.pixels, shape.filters, epilogue);
}

}  // namespace

int conv_tiles() { return static_cast<int>(std::size(kTiles)); }

int conv_steps(const ConvShape& shape) {
  return shape.kernel_height * shape.kernel_width * static_cast<int>(ceil_div(shape.channels, kConvDepth));
}

std::size_t conv_workspace_bytes(const ConvShape& shape, const ConvChoice& choice) {
  return choice.splits == 1 ? 0 : sizeof(float) * choice.splits * shape.pixels * shape.filters;
}

ConvChoice choose_conv(const ConvShape& shape, int device) {
  const int steps = conv_steps(shape);
  ConvChoice best{0, 1};
  double least = -1.0;
  for (int tile = 0; tile < conv_tiles(); ++tile) {
    if (kTiles[tile].shared_bytes > static_cast<std::size_t>(properties_of(device).shared_memory)) continue;
    for (int splits = 1; splits <= std::min(steps, 32); splits *= 2) {
      const double cycles = predicted_cycles(shape, kTiles[tile], steps, splits, device);
      if (least >= 0.0 && cycles >= least) continue;
      best = {tile, splits};
      least = cycles;
    }
  }
  return best;
}

void conv_bn_act(const Call& call, const ConvShape& shape, DType dtype, const ConvChoice& choice, const void* x,
                 const void* weight, const float* scale, const float* shift, const void* residual, bool relu, void* out,
                 void* workspace) {
  const auto of_type = [&](auto pass) {
    pass(call, shape, choice, x, weight, scale, shift, residual, relu, out, workspace);
  };
  if (dtype == DType::float16) return of_type(conv<Half>);
  if (dtype == DType::bfloat16) return of_type(conv<BFloat16>);
  throw std::runtime_error("conv_bn_act takes float16 and bfloat16");
}

}  // namespace cuda
}  // namespace fused_resnet
