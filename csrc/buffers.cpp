#include "buffers.h"

#include <cstdlib>
#include <mutex>
#include <new>
#include <unordered_map>
#include <vector>

namespace fused_resnet {
namespace {

constexpr std::size_t kAlignment = 64;

struct Kept {
  std::mutex mutex;
  std::unordered_map<int64_t, std::vector<void*>> by_bytes;
  int64_t bytes = 0;
};

// Never destroyed: tensors outlive the static objects of a process that exits.
Kept& kept() {
  static Kept* const instance = new Kept;
  return *instance;
}

int64_t rounded(int64_t bytes) {
  const int64_t alignment = static_cast<int64_t>(kAlignment);
  return (bytes + alignment - 1) / alignment * alignment;
}

}  // namespace

Buffer::Buffer(int64_t bytes) : data_(nullptr), bytes_(bytes) {
  {
    const std::lock_guard<std::mutex> lock(kept().mutex);
    const auto found = kept().by_bytes.find(bytes);
    if (found != kept().by_bytes.end() && !found->second.empty()) {
      data_ = found->second.back();
      found->second.pop_back();
      kept().bytes -= bytes;
      return;
    }
  }
  data_ = std::aligned_alloc(kAlignment, static_cast<std::size_t>(rounded(bytes)));
  if (data_ == nullptr) throw std::bad_alloc();
}

Buffer::~Buffer() {
  {
    const std::lock_guard<std::mutex> lock(kept().mutex);
    if (kept().bytes + bytes_ <= kKeptBytes) {
      kept().by_bytes[bytes_].push_back(data_);
      kept().bytes += bytes_;
      return;
    }
  }
  std::free(data_);
}

int64_t kept_bytes() {
  const std::lock_guard<std::mutex> lock(kept().mutex);
  return kept().bytes;
}

void release_kept_buffers() {
  const std::lock_guard<std::mutex> lock(kept().mutex);
  for (auto& [bytes, buffers] : kept().by_bytes) {
    for (void* buffer : buffers) std::free(buffer);
  }
  kept().by_bytes.clear();
  kept().bytes = 0;
}

}  // namespace fused_resnet
