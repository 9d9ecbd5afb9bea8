// Memory for a kernel of the CPU while it runs.
#pragma once

#include <atomic>
#include <cstdlib>

#include "binding/tensors.h"

namespace hsm {
namespace binding {

constexpr size_t workspace_alignment = 64;

// A block of memory that a thread keeps from call to call. What goes back to the system after each call has to be mapped again page by
// page, which takes a fifth of the time of a call of some hundred microseconds, and up to a third where weights take megabytes.
class KeptMemory {
 public:
  KeptMemory() = default;
  KeptMemory(const KeptMemory&) = delete;
  KeptMemory& operator=(const KeptMemory&) = delete;
  ~KeptMemory() { release(); }

  // Null if somebody has it, or if all threads together would keep too much.
  void* take(size_t bytes) {
    if (taken_) return nullptr;
    if (bytes > bytes_) {
      release();
      reserve((bytes + workspace_alignment - 1) / workspace_alignment * workspace_alignment);
    }
    taken_ = data_ != nullptr;
    return data_;
  }
  void give_back() { taken_ = false; }

 private:
  static constexpr size_t most_bytes = size_t{64} << 20;  // of all threads
  static inline std::atomic<size_t> all_bytes{0};

  void reserve(size_t bytes) {
    if (all_bytes.fetch_add(bytes) + bytes <= most_bytes) data_ = std::aligned_alloc(workspace_alignment, bytes);
    if (data_) {
      bytes_ = bytes;
      ask_for_huge_pages(data_, bytes);
    } else {
      all_bytes -= bytes;
    }
  }
  void release() {
    std::free(data_);
    all_bytes -= bytes_;
    data_ = nullptr;
    bytes_ = 0;
  }

  void* data_ = nullptr;
  size_t bytes_ = 0;
  bool taken_ = false;
};

// Aligned as kernels want it. Small ones lie on the stack, others in what the thread keeps, or else in memory of torch's.
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
