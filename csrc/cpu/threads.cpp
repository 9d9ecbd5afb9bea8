#include "cpu/threads.h"

#include <sched.h>
#include <time.h>

namespace hsm {
namespace cpu {

namespace {

inline void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ __volatile__("yield");
#endif
}

double seconds_of(clockid_t clock) {
  timespec time;
  clock_gettime(clock, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

double alone_until = 0;  // of all callers: they share the cores

}  // namespace

double now() { return seconds_of(CLOCK_MONOTONIC); }
double cpu_time() { return seconds_of(CLOCK_THREAD_CPUTIME_ID); }

void note_loss(double worked, double lost) {
  constexpr double worth_noting = 2e-3, share = 1.0, pause = 100e-3;
  if (lost < worth_noting || lost < share * worked) return;
  const double until = now() + pause;
  __atomic_store(&alone_until, &until, __ATOMIC_RELAXED);
}

bool better_alone() {
  double until;
  __atomic_load(&alone_until, &until, __ATOMIC_RELAXED);
  return until > 0 && now() < until;
}

bool Barrier::wait_briefly(int64_t total) const {
  constexpr int spins = 200;  // some microseconds: longer than a step of the small cases that need to spin
  for (int spin = 0; spin < spins; ++spin) {
    if (complete(total)) return true;
    pause_briefly();
  }
  return complete(total);
}

void yield_core() { sched_yield(); }

}  // namespace cpu
}  // namespace hsm
