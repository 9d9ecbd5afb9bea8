// Fibers: stacks of their own that take turns on one thread of the host.
//
// On x86-64 a switch is a few instructions; elsewhere (or with SIM_UCONTEXT) ucontext does it, with a system call each time.
// AddressSanitizer is told of every switch.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#if !defined(__x86_64__) && !defined(SIM_UCONTEXT)
#define SIM_UCONTEXT
#endif
#ifdef SIM_UCONTEXT
#include <ucontext.h>
#endif

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define ASAN_POISON_MEMORY_REGION(begin, size) (static_cast<void>(begin), static_cast<void>(size))
#define ASAN_UNPOISON_MEMORY_REGION(begin, size) (static_cast<void>(begin), static_cast<void>(size))
#endif

#ifndef SIM_UCONTEXT
// Saves what a call must preserve, and where the stack is; goes on where `load` was saved.
extern "C" void sim_switch_stack(void** save, void* load);
#endif

namespace sim {

// Memory for stacks, each with a page below it that no one may touch.
class StackPool {
 public:
#ifdef __SANITIZE_ADDRESS__
  static constexpr size_t bytes = 256 << 10;
#else
  static constexpr size_t bytes = 64 << 10;
#endif

  // The lowest address of a stack.
  char* take() {
    if (!free_.empty()) {
      char* stack = free_.back();
      free_.pop_back();
      return stack;
    }
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    void* memory = mmap(nullptr, page + bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE) != 0) {
      std::perror("simulator: no memory for a stack");
      std::abort();
    }
    return static_cast<char*>(memory) + page;
  }

  void give_back(char* stack) {
    ASAN_UNPOISON_MEMORY_REGION(stack, bytes);  // frames that were abandoned never did
    if (free_.size() < most_kept) return free_.push_back(stack);
    unmap(stack);
  }

  // Those that nobody has: a process may have some ten thousand mappings, and many simulators.
  void release() {
    for (char* stack : free_) unmap(stack);
    free_.clear();
  }

 private:
  static constexpr size_t most_kept = 512;

  static void unmap(char* stack) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    munmap(stack - page, page + bytes);
  }

  std::vector<char*> free_;
};

// Something that runs on a stack of its own, or, when made without an entry, the host thread that all others return to.
class Fiber {
 public:
  Fiber() = default;
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  bool started() const { return stack_ != nullptr; }
  char* stack() const { return stack_; }

  // `entry` must never return.
  void start(char* stack, void (*entry)()) {
    stack_ = stack;
#ifdef SIM_UCONTEXT
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack;
    context_.uc_stack.ss_size = StackPool::bytes;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
#else
    constexpr size_t preserved_registers = 6;
    void** top = reinterpret_cast<void**>(stack + StackPool::bytes) - 1;  // where a call leaves it: 8 below a multiple of 16
    *--top = reinterpret_cast<void*>(entry);
    for (size_t i = 0; i < preserved_registers; ++i) *--top = nullptr;
    stack_pointer_ = top;
#endif
  }

  // Leaves this fiber, which runs, for another; returns when somebody switches back. `forever`: nobody will.
  void switch_to(Fiber& other, bool forever = false) {
#ifdef __SANITIZE_ADDRESS__
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(forever ? nullptr : &fake_stack, other.bottom(), other.size());
    other.from_ = this;
#endif
    (void)forever;
#ifdef SIM_UCONTEXT
    swapcontext(&context_, &other.context_);
#else
    sim_switch_stack(&stack_pointer_, other.stack_pointer_);
#endif
    arrived(
#ifdef __SANITIZE_ADDRESS__
        fake_stack
#endif
    );
  }

  // To be called first by the entry of a fiber.
#ifdef __SANITIZE_ADDRESS__
  void arrived(void* fake_stack = nullptr) {
    const void* bottom;
    size_t size;
    __sanitizer_finish_switch_fiber(fake_stack, &bottom, &size);
    if (!from_->stack_) from_->host_bottom_ = bottom, from_->host_size_ = size;
  }
#else
  void arrived() {}
#endif

 private:
  char* stack_ = nullptr;
#ifdef SIM_UCONTEXT
  ucontext_t context_;
#else
  void* stack_pointer_ = nullptr;
#endif
#ifdef __SANITIZE_ADDRESS__
  const void* bottom() const { return stack_ ? stack_ : host_bottom_; }
  size_t size() const { return stack_ ? StackPool::bytes : host_size_; }

  Fiber* from_ = nullptr;
  const void* host_bottom_ = nullptr;
  size_t host_size_ = 0;
#endif
};

}  // namespace sim
