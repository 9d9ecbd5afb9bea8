#include "cpu/threads.h"

#include <sched.h>

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

}  // namespace

void Barrier::wait(int64_t total) {
  constexpr int spins_before_yield = 200;  // some microseconds: longer than a step of the small cases that need to spin
  for (int spin = 0; __atomic_load_n(&arrived, __ATOMIC_ACQUIRE) < total; ++spin) {
    if (spin < spins_before_yield) {
      pause_briefly();
    } else {
      sched_yield();
    }
  }
}

}  // namespace cpu
}  // namespace hsm
