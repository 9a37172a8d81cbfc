// The three ways to convolve, each in a file of its own, and what they share. ../conv.h says what they are.
#pragma once

#include <atomic>
#include <memory>
#include <vector>

#include "cpu/conv.h"
#include "cpu/conv/failure.h"
#include "cpu/simd/tile.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace fused_resnet {
namespace CPU_CAPABILITY {

// Packed weights are counted in words of 4 bytes.
template <typename Element>
int64_t gemm_packed_words(const CpuConv& conv);
template <typename Element>
void gemm_pack(const CpuConv& conv, const ConvWeight& weight, float* packed);
template <typename Element>
void gemm_run(const CpuConv& conv, const ConvInput& input, const float* packed, const ConvEpilogue& epilogue);

bool winograd_takes(const CpuConv& conv);
template <typename Element>
int64_t winograd_packed_words(const CpuConv& conv);
template <typename Element>
void winograd_pack(const CpuConv& conv, const ConvWeight& weight, float* packed);
template <typename Element>
void winograd_run(const CpuConv& conv, const ConvInput& input, const ConvWeight& weight, const float* packed,
                  const ConvEpilogue& epilogue);

bool grouped_takes(const CpuConv& conv);
template <typename Element>
int64_t grouped_packed_words(const CpuConv& conv);
template <typename Element>
void grouped_pack(const CpuConv& conv, const ConvWeight& weight, float* packed);
template <typename Element>
void grouped_run(const CpuConv& conv, const typename Element::Storage* x, const float* packed,
                 const ConvEpilogue& epilogue);

// In float32; conv.h says what it is.
void gemm_grad_weight(const CpuConv& conv, const ConvInput& input, const float* grad_out, float* grad_weight);
void winograd_grad_weight(const CpuConv& conv, const ConvInput& input, const float* grad_out, float* grad_weight);

// `lanes` inputs from channel c on, normalised as conv.h says; mean is not null.
template <typename Element>
Vector normalised(const ConvInput& input, const typename Element::Storage* from, int64_t c, int lanes) {
  if (lanes == kVectorLanes) {
    const Vector mean = load_vector(input.mean + c), scale = load_vector(input.scale + c);
    return relu_of((Element::load(from) - mean) * scale + load_vector(input.bias + c));
  }
  const Vector mean = load_some<Single>(input.mean + c, lanes), scale = load_some<Single>(input.scale + c, lanes);
  return relu_of((load_some<Element>(from, lanes) - mean) * scale + load_some<Single>(input.bias + c, lanes));
}

// Memory of one thread that grows and is used again; what is in it is whatever it was. 64-byte aligned.
class Scratch {
 public:
  float* words(int64_t count) {
    if (count > size_) {
      memory_.reset();
      size_ = 0;  // should the next line throw
      memory_.reset(static_cast<float*>(::operator new(count * sizeof(float), kAlignment)));
      size_ = count;
    }
    return memory_.get();
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(float* memory) const { ::operator delete(memory, kAlignment); }
  };
  std::unique_ptr<float, Free> memory_;
  int64_t size_ = 0;
};

// Of `count` things in order those of one part: from `begin` to before `end`.
struct Share {
  int64_t begin, end;
};
inline Share share(int64_t count, int64_t part, int64_t parts) {
  return {count * part / parts, count * (part + 1) / parts};
}

// Calls run(part, parts) on every thread of a team; throws what one of them threw.
template <typename Run>
void in_parallel(int threads, const Run& run) {
#ifdef _OPENMP
  Failure failure;
#pragma omp parallel num_threads(threads)
  failure.guard([&] { run(omp_get_thread_num(), omp_get_num_threads()); });
  failure.rethrow();
#else
  static_cast<void>(threads);
  run(0, 1);
#endif
}

// Calls run(i) for every i below `count`. A thread has a share of them, one after the other, which lie together so that
// its caches keep what they have in common; done with it, it takes of the others' shares what they have not begun, for
// a core may be shared with the work of others, and then equal shares do not take equal times.
template <typename Run>
void in_parallel_over(int64_t count, int threads, const Run& run) {
  struct alignas(64) Queue {
    std::atomic<int64_t> next;
    int64_t end;
  };
  std::vector<Queue> queues(threads);
  for (int i = 0; i < threads; ++i) {
    const Share mine = share(count, i, threads);
    queues[i].next = mine.begin;
    queues[i].end = mine.end;
  }
  in_parallel(threads, [&](int part, int) {
    for (int i = 0; i < threads; ++i) {
      Queue& queue = queues[(part + i) % threads];
      for (int64_t mine; (mine = queue.next.fetch_add(1, std::memory_order_relaxed)) < queue.end;) run(mine);
    }
  });
}

inline int64_t divided_up(int64_t count, int64_t by) { return (count + by - 1) / by; }

// Copies bytes that do not overlap; short ones without a call.
inline void copy_bytes(void* to, const void* from, int64_t bytes) {
#if defined(__AVX512BW__)
  auto* target = static_cast<char*>(to);
  const auto* source = static_cast<const char*>(from);
  for (; bytes >= 64; bytes -= 64, target += 64, source += 64) {
    _mm512_storeu_si512(target, _mm512_loadu_si512(source));
  }
  if (bytes > 0) {
    const __mmask64 rest = ~uint64_t{0} >> (64 - bytes);
    _mm512_mask_storeu_epi8(target, rest, _mm512_maskz_loadu_epi8(rest, source));
  }
#else
  std::memcpy(to, from, bytes);
#endif
}

}  // namespace CPU_CAPABILITY
}  // namespace fused_resnet
