#include "cpu/kernels.h"

#include <cstdlib>
#include <cstring>

namespace hsm {
namespace cpu {

namespace {

const Kernels& choose() {
#ifdef __x86_64__
  const char* cap = std::getenv("HSM_KERNELS_CPU_ISA");
  const auto allowed = [cap](const Kernels& table) { return !cap || std::strcmp(cap, table.instruction_set) == 0; };
  __builtin_cpu_init();
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (has_avx512 && allowed(avx512::table)) return avx512::table;
  if (has_avx2 && allowed(avx2::table)) return avx2::table;
#endif
  return portable::table;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace cpu
}  // namespace hsm
