// Writing past the caches.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#ifdef __SSE2__
#include <immintrin.h>
#endif

namespace fused_resnet {
namespace CPU_CAPABILITY {

// Copies `size` elements with non-temporal stores where the processor has them and `to` is aligned for them.
template <typename Storage>
inline void stream_copy(const Storage* from, Storage* to, int64_t size) {
#ifdef __SSE2__
  const auto* source = reinterpret_cast<const char*>(from);
  auto* target = reinterpret_cast<char*>(to);
  int64_t bytes = size * static_cast<int64_t>(sizeof(Storage));
#ifdef __AVX512F__
  using Vector = __m512i;
  const auto store = [](char* address, Vector vector) {
    _mm512_stream_si512(reinterpret_cast<Vector*>(address), vector);
  };
#elif defined(__AVX2__)
  using Vector = __m256i;
  const auto store = [](char* address, Vector vector) {
    _mm256_stream_si256(reinterpret_cast<Vector*>(address), vector);
  };
#else
  using Vector = __m128i;
  const auto store = [](char* address, Vector vector) { _mm_stream_si128(reinterpret_cast<Vector*>(address), vector); };
#endif
  constexpr int64_t kVectorBytes = sizeof(Vector);
  const int64_t misaligned = static_cast<int64_t>(reinterpret_cast<uintptr_t>(target) % kVectorBytes);
  const int64_t head = misaligned == 0 ? 0 : std::min(kVectorBytes - misaligned, bytes);
  std::memcpy(target, source, head);
  source += head, target += head, bytes -= head;
  for (; bytes >= kVectorBytes; source += kVectorBytes, target += kVectorBytes, bytes -= kVectorBytes) {
    Vector vector;
    std::memcpy(&vector, source, kVectorBytes);
    store(target, vector);
  }
  std::memcpy(target, source, bytes);
#else
  std::memcpy(to, from, size * sizeof(Storage));
#endif
}

// Makes streamed stores visible to other threads; the barrier at the end of a parallel region alone does not.
inline void stream_fence() {
#ifdef __SSE2__
  _mm_sfence();
#endif
}

}  // namespace CPU_CAPABILITY
}  // namespace fused_resnet
