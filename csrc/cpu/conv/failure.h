// Threads whose work may throw: an exception that leaves a parallel region ends the process.
#pragma once

#include <atomic>
#include <exception>

namespace fused_resnet {
namespace CPU_CAPABILITY {

class Failure {
 public:
  // On any thread of a region; of several exceptions the first is kept.
  template <typename Run>
  void guard(const Run& run) noexcept {
    try {
      run();
    } catch (...) {
      if (!failed_.exchange(true)) exception_ = std::current_exception();
    }
  }

  // Behind the region.
  void rethrow() const {
    if (exception_ != nullptr) std::rethrow_exception(exception_);
  }

 private:
  std::atomic<bool> failed_{false};
  std::exception_ptr exception_;
};

}  // namespace CPU_CAPABILITY
}  // namespace fused_resnet
