#include "cpu/kernels.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace hsm {
namespace cpu {

namespace {

#ifdef HSM_HAS_AVX512_BF16
// In front of AVX-512's kernels, for what they are better at.
ForwardPlan forward_plan_with_bf16(const ForwardParams& params, const Threads& threads) {
  const bool better = params.sizes.dtype == ScalarKind::bfloat16;
  return (better ? avx512_bf16::bfloat16_forward_plan : avx512::table.forward_plan)(params, threads);
}

void forward_with_bf16(const ForwardParams& params, const Threads& threads, void* workspace) {
  const bool better = params.sizes.dtype == ScalarKind::bfloat16;
  (better ? avx512_bf16::bfloat16_forward : avx512::table.forward)(params, threads, workspace);
}

size_t backward_workspace_with_bf16(const BackwardParams& params, const Threads& threads) {
  const bool better = params.sizes.dtype == ScalarKind::bfloat16;
  return (better ? avx512_bf16::bfloat16_backward_workspace : avx512::table.backward_workspace)(params, threads);
}

void backward_with_bf16(const BackwardParams& params, const Threads& threads, void* workspace, int64_t first, int64_t last) {
  const bool better = params.sizes.dtype == ScalarKind::bfloat16;
  (better ? avx512_bf16::bfloat16_backward : avx512::table.backward)(params, threads, workspace, first, last);
}

const Kernels& table_with_bf16() {
  static const Kernels table = [] {
    Kernels changed = avx512::table;
    changed.instruction_set = "avx512_bf16";
    changed.forward_plan = forward_plan_with_bf16;
    changed.forward = forward_with_bf16;
    changed.backward_workspace = backward_workspace_with_bf16;
    changed.backward = backward_with_bf16;
    return changed;
  }();
  return table;
}
#endif

const Kernels& choose() {
  const char* wanted = std::getenv("HSM_KERNELS_CPU_ISA");
  const auto takes = [wanted](const Kernels& table) { return !wanted || std::strcmp(wanted, table.instruction_set) == 0; };
#ifdef __x86_64__
  __builtin_cpu_init();
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#ifdef HSM_HAS_AVX512_BF16
  if (has_avx512 && __builtin_cpu_supports("avx512bf16") && takes(table_with_bf16())) return table_with_bf16();
#endif
  if (has_avx512 && takes(avx512::table)) return avx512::table;
  if (has_avx2 && takes(avx2::table)) return avx2::table;
#endif
  if (takes(portable::table)) return portable::table;
  throw std::runtime_error(std::string("hsm_kernels: HSM_KERNELS_CPU_ISA must be portable, or avx2, avx512 or avx512_bf16 where the CPU has it, got ") +
                           wanted);
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

namespace {

enum class ProductChoice { own, torch, by_size };

ProductChoice choose_product() {
  if (const char* wanted = std::getenv("HSM_KERNELS_CPU_PRODUCT")) {
    if (std::strcmp(wanted, "own") == 0) return ProductChoice::own;
    if (std::strcmp(wanted, "torch") == 0) return ProductChoice::torch;
    throw std::runtime_error(std::string("hsm_kernels: HSM_KERNELS_CPU_PRODUCT must be own or torch, got ") + wanted);
  }
#ifdef __x86_64__
  if (kernels().product == avx512::table.product && !__builtin_cpu_is("intel")) return ProductChoice::by_size;
#endif
  return ProductChoice::torch;
}

}  // namespace

bool has_faster_product(int64_t rows, int64_t columns) {
  static const ProductChoice choice = choose_product();
  if (choice != ProductChoice::by_size) return choice == ProductChoice::own;
  constexpr int64_t rows_worth_packing = 64, block = 64;
  const int64_t computed = (columns + block - 1) / block * block;
  return rows >= rows_worth_packing && 2 * computed <= 3 * columns;
}

}  // namespace cpu
}  // namespace hsm
