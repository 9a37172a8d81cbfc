#include "buffers.h"

#ifdef __unix__
#include <pthread.h>
#endif

#include <cstdlib>
#include <iterator>
#include <list>
#include <mutex>
#include <new>
#include <utility>

namespace fused_resnet {
namespace {

constexpr std::size_t kAlignment = 64;

struct Kept {
  std::mutex mutex;
  std::list<std::pair<int64_t, void*>> buffers;  // (bytes, address), the longest unused first
  int64_t bytes = 0;
  int64_t limit = int64_t{1} << 30;
};

// Never destroyed: tensors outlive the static objects of a process that exits. A process that forks while another of
// its threads holds the mutex would leave it held for ever in the child.
Kept& kept() {
  static Kept* const instance = [] {
    auto* const made = new Kept;
#ifdef __unix__
    pthread_atfork([] { kept().mutex.lock(); }, [] { kept().mutex.unlock(); }, [] { kept().mutex.unlock(); });
#endif
    return made;
  }();
  return *instance;
}

int64_t rounded(int64_t bytes) {
  const int64_t alignment = static_cast<int64_t>(kAlignment);
  return (bytes + alignment - 1) / alignment * alignment;
}

// Frees from the front until no more than `limit` bytes are kept. The mutex is held.
void shrink_to(int64_t limit) {
  while (kept().bytes > limit) {
    kept().bytes -= kept().buffers.front().first;
    std::free(kept().buffers.front().second);
    kept().buffers.pop_front();
  }
}

}  // namespace

Buffer::Buffer(int64_t bytes) : data_(nullptr), bytes_(bytes) {
  {
    const std::lock_guard<std::mutex> lock(kept().mutex);
    // The youngest of this size: what was freed last may still be in a cache.
    for (auto buffer = kept().buffers.rbegin(); buffer != kept().buffers.rend(); ++buffer) {
      if (buffer->first == bytes) {
        data_ = buffer->second;
        kept().buffers.erase(std::next(buffer).base());
        kept().bytes -= bytes;
        return;
      }
    }
  }
  data_ = std::aligned_alloc(kAlignment, static_cast<std::size_t>(rounded(bytes)));
  if (data_ == nullptr) {
    release_kept_buffers();
    data_ = std::aligned_alloc(kAlignment, static_cast<std::size_t>(rounded(bytes)));
  }
  if (data_ == nullptr) throw std::bad_alloc();
}

Buffer::~Buffer() {
  const std::lock_guard<std::mutex> lock(kept().mutex);
  try {
    kept().buffers.emplace_back(bytes_, data_);
  } catch (const std::bad_alloc&) {
    std::free(data_);
    return;
  }
  kept().bytes += bytes_;
  shrink_to(kept().limit);
}

int64_t kept_bytes() {
  const std::lock_guard<std::mutex> lock(kept().mutex);
  return kept().bytes;
}

void limit_kept_buffers(int64_t bytes) {
  const std::lock_guard<std::mutex> lock(kept().mutex);
  kept().limit = bytes;
  shrink_to(bytes);
}

void release_kept_buffers() {
  const std::lock_guard<std::mutex> lock(kept().mutex);
  shrink_to(0);
}

}  // namespace fused_resnet
