// Threads of the caller's pool, and a barrier for those that work on the same step.
#pragma once

#include <cstdint>

namespace hsm {
namespace cpu {

// Runs body on ranges that cover [0, count) together, on as many threads as the pool gives.
using ParallelFor = void (*)(int64_t count, void (*body)(int64_t begin, int64_t end, void* context), void* context);

struct Threads {
  int count;
  ParallelFor parallel_for;
};

// Workers of one group meet after every step. A worker is a share of the work, not a thread: one thread may carry several
// workers, even all of them, so the barrier counts workers and no arrangement of the pool can deadlock it.
struct alignas(64) Barrier {
  int64_t arrived = 0;

  void arrive(int64_t workers) { __atomic_fetch_add(&arrived, workers, __ATOMIC_ACQ_REL); }

  // Waits until `total` workers have arrived since the start. Yields when the others take long: they may lack a core.
  void wait(int64_t total);
};

}  // namespace cpu
}  // namespace hsm
