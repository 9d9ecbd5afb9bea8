// Memory for a kernel of the CPU while it runs.
#pragma once

#include <cstdlib>

#include "binding/tensors.h"

namespace hsm {
namespace binding {

constexpr size_t workspace_alignment = 64;

// A block of memory that a thread keeps from call to call: memory that goes back to the system after each call has to be mapped
// again page by page, which takes a fifth of the time of a call of some hundred microseconds.
class KeptMemory {
 public:
  static constexpr size_t most_bytes = size_t{4} << 20;

  KeptMemory() = default;
  KeptMemory(const KeptMemory&) = delete;
  KeptMemory& operator=(const KeptMemory&) = delete;
  ~KeptMemory() { std::free(data_); }

  // Null if somebody has it, or if there is none.
  void* take(size_t bytes) {
    if (taken_) return nullptr;
    if (bytes > bytes_) {
      std::free(data_);
      bytes_ = (bytes + workspace_alignment - 1) / workspace_alignment * workspace_alignment;
      data_ = std::aligned_alloc(workspace_alignment, bytes_);
      if (!data_) bytes_ = 0;
    }
    taken_ = data_ != nullptr;
    return data_;
  }
  void give_back() { taken_ = false; }

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
  bool taken_ = false;
};

// Aligned as kernels want it. Small ones lie on the stack, middling ones in what the thread keeps, others are torch's.
class Workspace {
 public:
  explicit Workspace(size_t bytes) : data_(small_) {
    poison(small_, sizeof small_);
    if (bytes <= sizeof small_ || take_kept(bytes)) return;
    heap_ = empty({static_cast<int64_t>(bytes + workspace_alignment)}, aoti_torch_dtype_uint8());
    const uintptr_t start = reinterpret_cast<uintptr_t>(heap_->mutable_data_ptr());
    data_ = reinterpret_cast<void*>((start + workspace_alignment - 1) / workspace_alignment * workspace_alignment);
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() {
    if (kept_) kept_->give_back();
  }

  void* data() const { return data_; }

 private:
  bool take_kept(size_t bytes) {
    // Of a pass, and of a product within it.
    static thread_local KeptMemory memories[2];
    if (bytes > KeptMemory::most_bytes) return false;
    for (KeptMemory& memory : memories) {
      void* data = memory.take(bytes);
      if (!data) continue;
      kept_ = &memory;
      data_ = data;
      poison(data, bytes);
      return true;
    }
    return false;
  }

  alignas(workspace_alignment) char small_[16384];
  KeptMemory* kept_ = nullptr;
  MaybeTensor heap_;
  void* data_;
};

}  // namespace binding
}  // namespace hsm
