// Hands out aligned pieces of one allocation. With a null base it only measures.
#pragma once

#include <cstddef>
#include <cstdint>

namespace hsm {

class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}

  template <class E>
  E* take(int64_t count) {
    return static_cast<E*>(take_bytes(static_cast<size_t>(count) * sizeof(E)));
  }
  void* take_bytes(size_t bytes) {
    constexpr size_t alignment = 64;
    const size_t at = used_;
    used_ += (bytes + alignment - 1) / alignment * alignment;
    return base_ ? base_ + at : nullptr;
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

}  // namespace hsm
