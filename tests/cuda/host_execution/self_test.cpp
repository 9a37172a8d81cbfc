// Tests of host_execution itself: `self_test CASE` exits with 0 if the case is as it should be. The kernels are in
// self_test_kernels.h. Cases named broken_* hold an error that a sanitizer has to report.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>

#include "self_test_kernels.h"

namespace host = fused_resnet::host_execution;

static void check_that(bool holds, const char* what, int line) {
  if (holds) return;
  std::fprintf(stderr, "line %d: not so: %s\n", line, what);
  std::exit(1);
}
#define CHECK(condition) check_that((condition), #condition, __LINE__)

template <typename... Expected, typename... Actual>
static cudaError_t run(dim3 grid, dim3 block, size_t shared_bytes, bool cooperative, void (*kernel)(Expected...),
                       Actual... arguments) {
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = cooperative;
  const cudaLaunchConfig_t config{grid, block, shared_bytes, nullptr, &attribute, 1};
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

template <typename... Expected, typename... Actual>
static std::string error_of(dim3 grid, dim3 block, size_t shared_bytes, bool cooperative, void (*kernel)(Expected...),
                            Actual... arguments) {
  try {
    CHECK(run(grid, block, shared_bytes, cooperative, kernel, arguments...) == cudaSuccess);
  } catch (const std::runtime_error& error) {
    std::printf("%s\n", error.what());
    return error.what();
  }
  return "";
}
static bool has(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

static void reduction() {
  constexpr unsigned kBlocks = 3, kThreads = 96;
  float values[kBlocks * kThreads], expected[kBlocks] = {};
  for (unsigned i = 0; i < kBlocks * kThreads; i++) expected[i / kThreads] += values[i] = static_cast<float>(i % 37);
  for (uint64_t seed = 0; seed < 100; seed++) {
    host::set_seed(seed);
    float sums[kBlocks];
    CHECK(run(kBlocks, kThreads, 3 * sizeof(float), false, sum_kernel, values, sums) == cudaSuccess);
    CHECK(std::memcmp(sums, expected, sizeof(sums)) == 0);
  }
}

static void order() {
  unsigned first[64], second[64], next = 0;
  host::set_seed(1);
  CHECK(run(4, 16, 0, false, order_kernel, first, &next) == cudaSuccess);
  next = 0;
  CHECK(run(4, 16, 0, false, order_kernel, second, &next) == cudaSuccess);
  CHECK(std::memcmp(first, second, sizeof(first)) != 0);
  next = 0;
  host::set_seed(1);
  CHECK(run(4, 16, 0, false, order_kernel, second, &next) == cudaSuccess);
  CHECK(std::memcmp(first, second, sizeof(first)) == 0);
}

static void votes() {
  unsigned results[3 * 48];
  CHECK(run(1, 48, 0, false, vote_kernel, results) == cudaSuccess);
  for (unsigned i = 0; i < 48; i++) {
    CHECK(results[i] == (i < 32 ? 0x49249249u : 0x4924u));
    CHECK(results[48 + i] == (i < 32 ? 1u : 0u));
    CHECK(results[96 + i] == (i < 31 ? i + 1 : i < 32 ? 31 : i < 47 ? i + 1 : 47));
  }
}

template <bool kAfter>
static void two_stages() {
  alignas(16) float from[128] = {}, to[32];
  CHECK(run(1, 32, sizeof(from), false, two_stages_kernel<kAfter>, from, to) == cudaSuccess);
}

static void copies() {
  alignas(16) float from[128], to[128];
  for (int i = 0; i < 128; i++) from[i] = static_cast<float>(i);
  CHECK(run(1, 32, sizeof(from), false, copy_kernel<0>, from, to) == cudaSuccess);
  for (int i = 0; i < 128; i++) CHECK(to[i] == (i / 4 == 5 ? 0.0f : from[i]));
  CHECK(run(1, 32, sizeof(from), false, copy_kernel<1>, from, to) == cudaSuccess);
  for (int i = 0; i < 128; i++) CHECK(std::isnan(to[i]));
  two_stages<true>();
}

template <typename T>
static void product_of() {
  T a[16 * 16], b[8 * 16];
  float c[16 * 8], d[16 * 8];
  for (int i = 0; i < 256; i++) a[i] = fused_resnet::narrow<T>(static_cast<float>((i * 37) % 101) / 16 - 3);
  for (int i = 0; i < 128; i++) b[i] = fused_resnet::narrow<T>(static_cast<float>((i * 53) % 97) / 32 - 1);
  for (int i = 0; i < 128; i++) c[i] = static_cast<float>(i) / 7;
  a[16 * 5 + 3] = fused_resnet::narrow<T>(INFINITY);
  a[16 * 6 + 1] = fused_resnet::narrow<T>(NAN);
  CHECK(run(1, 32, 1024, false, product_kernel<T>, a, b, c, d) == cudaSuccess);
  for (int row = 0; row < 16; row++) {
    for (int column = 0; column < 8; column++) {
      double sum = 0;
      for (int k = 0; k < 16; k++) {
        sum += double{fused_resnet::widen(a[row * 16 + k])} * double{fused_resnet::widen(b[column * 16 + k])};
      }
      const float expected = static_cast<float>(c[row * 8 + column] + sum), got = d[row * 8 + column];
      CHECK(expected == got || (std::isnan(expected) && std::isnan(got)));
      CHECK((row == 6) <= std::isnan(got) && (row == 5) == (!std::isfinite(got) && row != 6));
    }
  }
}

static void grid_barriers() {
  constexpr unsigned kBlocks = 4, kThreads = 64;
  for (uint64_t seed = 0; seed < 20; seed++) {
    host::set_seed(seed);
    unsigned values[kBlocks * kThreads] = {}, sums[kBlocks * kThreads];
    CHECK(run(kBlocks, kThreads, 0, true, grid_kernel, values, sums) == cudaSuccess);
    for (unsigned sum : sums) CHECK(sum == kBlocks * kThreads * (kBlocks * kThreads + 1) / 2);
  }
  CHECK(has(error_of(1, 32, 0, false, grid_kernel, nullptr, nullptr), "not cooperative"));
}

template <bool kFenced>
static void last_block() {
  constexpr unsigned kBlocks = 16;
  unsigned values[kBlocks * 32], done = 0, sum = 0;
  CHECK(run(kBlocks, 32, 4, false, last_block_kernel<kFenced>, values, &done, &sum) == cudaSuccess);
  CHECK(sum == kBlocks * 32 * (kBlocks * 32 - 1) / 2);
}

template <bool kSynchronized>
static void neighbour() {
  int values[64];
  CHECK(run(1, 64, 256, false, neighbour_kernel<kSynchronized>, values) == cudaSuccess);
  for (int i = 0; i < 64; i++) CHECK(!kSynchronized || values[i] == (i + 33) % 64);
}

template <bool kOrdered>
static void next_lane() {
  int values[32];
  CHECK(run(1, 32, 128, false, next_lane_kernel<kOrdered>, values) == cudaSuccess);
  for (int i = 0; i < 32; i++) CHECK(!kOrdered || values[i] == (i + 1) % 32);
}

static void misaligned() {
  alignas(8) float from[4] = {}, to = 0;
  CHECK(run(1, 1, 0, false, misaligned_kernel, from, &to) == cudaSuccess);
}

static void deadlocks() {
  for (uint64_t seed = 0; seed < 10; seed++) {
    host::set_seed(seed);
    std::string error = error_of(dim3(1, 2), 64, 0, false, divergent_barrier_kernel);
    CHECK(has(error, "deadlock") && has(error, "block (0, ") && has(error, "40 wait at __syncthreads, 24 ended"));
    error = error_of(1, 64, 0, false, missing_lane_kernel);
    CHECK(has(error, "__shfl_xor_sync") && has(error, "missing_lane_kernel"));
    error = error_of(1, 64, 0, false, mixed_operations_kernel);
    CHECK(has(error, "__shfl_xor_sync") && has(error, "__ballot_sync"));
    CHECK(has(error_of(1, 64, 0, false, partial_mask_kernel), "not the whole warp"));
    reduction();  // what comes after a failed launch is not disturbed
  }
}

static void addresses() {
  alignas(16) float from[128] = {};
  CHECK(has(error_of(1, 32, 512, false, bad_address_kernel, from, 4, 0), "not a multiple of 16"));
  CHECK(has(error_of(1, 32, 512, false, bad_address_kernel, from, 0, 4), "not a multiple of 16"));
  CHECK(has(error_of(1, 32, 512, false, bad_address_kernel, from, 512, 0), "not inside the 512 bytes"));
  CHECK(has(error_of(1, 32, 512, false, bad_address_kernel, from, -16, 0), "not inside the 512 bytes"));
  float to;
  CHECK(has(error_of(1, 1, 0, false, load_kernel<uint4>, from + 2, &to), "load_once: the address"));
  CHECK(has(error_of(1, 1, 0, false, load_kernel<uint2>, from + 1, &to), "not a multiple of 8"));
  CHECK(run(1, 1, 0, false, load_kernel<uint2>, from + 2, &to) == cudaSuccess && to == 0);
  host::throw_errors(false);
  CHECK(run(1, 32, 512, false, bad_address_kernel, from, 4, 0) == cudaErrorLaunchFailure);
  CHECK(has(host::last_message(), "not a multiple of 16") && cudaGetLastError() == cudaErrorLaunchFailure);
  CHECK(cudaGetLastError() == cudaSuccess);
}

static void checks() {
  const auto launch = [](dim3 grid, dim3 block, size_t bytes, bool cooperative = false) {
    return run(grid, block, bytes, cooperative, empty_kernel);
  };
  host::set_device({2, 100 * 1024, 102 * 1024, 8, 9});
  CHECK(launch(0, 32, 0) == cudaErrorInvalidConfiguration && launch(1, 0, 0) == cudaErrorInvalidConfiguration);
  CHECK(launch(1, 1025, 0) == cudaErrorInvalidConfiguration);
  CHECK(launch(1, dim3(32, 33), 0) == cudaErrorInvalidConfiguration);
  CHECK(launch(dim3(1, 65536), 1, 0) == cudaErrorInvalidConfiguration);
  CHECK(launch(dim3(1, 1, 65536), 1, 0) == cudaErrorInvalidConfiguration);
  CHECK(launch(1, 32, 48 * 1024) == cudaSuccess && launch(1, 32, 48 * 1024 + 1) == cudaErrorInvalidValue);
  const auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
  CHECK(cudaFuncSetAttribute(empty_kernel, attribute, 100 * 1024 + 1) == cudaErrorInvalidValue);
  CHECK(cudaFuncSetAttribute(empty_kernel, attribute, 60 * 1024) == cudaSuccess);
  CHECK(launch(1, 32, 60 * 1024) == cudaSuccess && launch(1, 32, 60 * 1024 + 1) == cudaErrorInvalidValue);
  int blocks = 0;
  CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, empty_kernel, 512, 0) == cudaSuccess && blocks == 3);
  CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, empty_kernel, 64, 50 * 1024) == cudaSuccess);
  CHECK(blocks == 2);
  CHECK(launch(4, 64, 50 * 1024, true) == cudaSuccess);
  CHECK(launch(5, 64, 50 * 1024, true) == cudaErrorCooperativeLaunchTooLarge);
  CHECK(cudaSetDevice(1) == cudaSuccess && launch(1, 32, 60 * 1024) == cudaErrorInvalidValue);
  cudaStream_t stream;
  CHECK(cudaStreamCreate(&stream) == cudaSuccess && cudaSetDevice(2) == cudaErrorInvalidDevice);
  cudaLaunchConfig_t config{1, 32, 0, stream, nullptr, 0};
  CHECK(cudaLaunchKernelEx(&config, empty_kernel) == cudaSuccess);
  CHECK(host::launches().back().device == 1 && host::launches().back().stream == stream);
  CHECK(cudaSetDevice(0) == cudaSuccess);
  CHECK(cudaLaunchKernelEx(&config, empty_kernel) == cudaErrorInvalidResourceHandle);
  CHECK(cudaPeekAtLastError() == cudaErrorInvalidResourceHandle);
  CHECK(std::strcmp(cudaGetErrorName(cudaGetLastError()), "cudaErrorInvalidResourceHandle") == 0);
  CHECK(cudaStreamDestroy(stream) == cudaSuccess && cudaPeekAtLastError() == cudaSuccess);
  host::clear_launches();
  host::fail_next_launch(cudaErrorMemoryAllocation);
  CHECK(launch(1, 32, 0) == cudaErrorMemoryAllocation && host::launches().empty() && launch(1, 32, 0) == cudaSuccess);
  host::skip_launches(true);
  CHECK(run(1, 32, 0, false, grid_kernel, nullptr, nullptr) == cudaSuccess && host_execution_launch_count() == 2);
  int64_t record[10];
  CHECK(host_execution_launch(1, record) == 1 && record[0] == 1 && record[3] == 32 && record[9] == 0);
  CHECK(host_execution_launch(2, record) == 0);
}

template <typename T>
static void check_elements(int mantissa_bits, float largest, float overflow) {
  for (uint32_t bits = 0; bits < 65536; bits++) {
    const T element{static_cast<uint16_t>(bits)};
    const float wide = fused_resnet::widen(element);
    const uint16_t back = fused_resnet::narrow<T>(wide).bits;
    CHECK(std::isnan(wide) ? back == 0x7fff && std::isnan(fused_resnet::widen(T{back})) : back == bits);
    CHECK(fused_resnet::narrow_2<T>(1.0f, wide) == (uint32_t{back} << 16 | fused_resnet::narrow<T>(1.0f).bits));
    const T next{static_cast<uint16_t>(bits + 1)};
    const float above = fused_resnet::widen(next);
    if (!std::isfinite(wide) || !std::isfinite(above)) continue;
    const float middle =
        wide + (above - wide) / 2;  // exact: goes to the even one, and just beside it to the nearer one
    CHECK(fused_resnet::narrow<T>(middle).bits == (bits % 2 == 0 ? bits : bits + 1));
    CHECK(fused_resnet::narrow<T>(std::nextafter(middle, wide)).bits == bits);
    CHECK(fused_resnet::narrow<T>(std::nextafter(middle, above)).bits == bits + 1);
  }
  const float one = fused_resnet::widen(T{fused_resnet::narrow<T>(1.0f + std::ldexp(1.0f, -mantissa_bits))});
  CHECK(one == 1.0f + std::ldexp(1.0f, -mantissa_bits));
  CHECK(std::isinf(fused_resnet::widen(fused_resnet::narrow<T>(overflow))));
  CHECK(fused_resnet::widen(fused_resnet::narrow<T>(std::nextafter(overflow, 0.0f))) == largest);
}
static void elements() {
  check_elements<fused_resnet::Half>(10, 65504.0f, 65520.0f);
  check_elements<fused_resnet::BFloat16>(7, 0x1.fep127f, 0x1.ffp127f);
  CHECK(fused_resnet::max_u16x2(0x00018000u, 0x00020001u) == 0x00028000u);
}

static void overrun() {
  CHECK(has(error_of(1, 32, 100, false, overrun_kernel, 25), "beyond the 100 bytes of shared memory"));
}
static void broken_overrun() { run(1, 32, 100, false, overrun_kernel, 25); }

int main(int count, char** arguments) {
  const std::map<std::string, std::function<void()>> cases = {
      {"reduction", reduction},
      {"order", order},
      {"votes", votes},
      {"copies", copies},
      {"product_half", product_of<fused_resnet::Half>},
      {"product_bfloat16", product_of<fused_resnet::BFloat16>},
      {"grid_barriers", grid_barriers},
      {"last_block", last_block<true>},
      {"neighbour", neighbour<true>},
      {"next_lane", next_lane<true>},
      {"deadlocks", deadlocks},
      {"addresses", addresses},
      {"checks", checks},
      {"elements", elements},
      {"overrun", overrun},
      {"broken_copy", two_stages<false>},
      {"broken_misaligned", misaligned},
      {"broken_shuffle", next_lane<false>},
      {"broken_overrun", broken_overrun},
      {"broken_last_block", last_block<false>},
      {"broken_neighbour", neighbour<false>},
  };
  const auto found = cases.find(count > 1 ? arguments[1] : "");
  if (found == cases.end()) {
    for (const auto& [name, unused] : cases) std::printf("%s\n", name.c_str());
    return 2;
  }
  found->second();
  return 0;
}
