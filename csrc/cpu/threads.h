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

double now();       // seconds of a steady clock
double cpu_time();  // seconds that the calling thread had a core

// Other programs may want the cores, too. Then a thread that is waited for may not run for milliseconds, again and again, and one that
// waits by spinning may keep the caller itself from running. The caller of a parallel run says how long it worked and how much time
// it lost. If that was much, it had better be alone for a while.
void note_loss(double worked, double lost);
bool better_alone();

// Workers of one group meet after every step. A worker is a share of the work, not a thread: one thread may carry several
// workers, even all of them, so the barrier counts workers and no arrangement of the pool can deadlock it.
struct alignas(64) Barrier {
  int64_t arrived = 0;

  void arrive() { __atomic_fetch_add(&arrived, 1, __ATOMIC_ACQ_REL); }
  bool complete(int64_t total) const { return __atomic_load_n(&arrived, __ATOMIC_ACQUIRE) >= total; }

  // Waits until `total` workers have arrived since the start, or for some microseconds; says whether they have.
  bool wait_briefly(int64_t total) const;
};

// A worker's rounds. Whoever claims one computes it: the worker's own thread, or one that has waited for it in vain.
struct alignas(64) Rounds {
  int64_t claimed = 0;

  bool claim(int64_t round) {
    return __atomic_compare_exchange_n(&claimed, &round, round + 1, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
  }
};

void yield_core();

}  // namespace cpu
}  // namespace hsm
