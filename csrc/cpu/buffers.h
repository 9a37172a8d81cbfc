// Large memory of the kernels' own, kept when it is freed and handed out again.
#pragma once

#include <cstdint>

namespace fused_resnet {

// malloc maps anything from 32 MiB on afresh, and the first touch of each of its 4 KiB pages is a fault. For a pass
// over memory that is most of the time: 51 MB cost 17 ms of faults beside 5 ms of work on the machine this was found
// on. A network asks for the same sizes at every step, so what it frees is kept here and used again; outputs, which are
// PyTorch's storages, are kept by fused_resnet/ops/backends/native/memory.py. Past a limit what was unused longest goes
// back to the system.

class Buffer {
 public:
  explicit Buffer(int64_t bytes);  // throws std::bad_alloc
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  void* data() const { return data_; }
  int64_t bytes() const { return bytes_; }

 private:
  void* data_;
  int64_t bytes_;
};

int64_t kept_bytes();
// Keeps no more than this from now on.
void limit_kept_buffers(int64_t bytes);
void release_kept_buffers();

}  // namespace fused_resnet
