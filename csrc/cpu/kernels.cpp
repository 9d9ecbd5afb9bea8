#include "cpu/kernels.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#ifdef HSM_HAS_AMX
#include "cpu/amx_tiles.h"
#endif

namespace hsm {
namespace cpu {

namespace {

#ifdef HSM_HAS_AVX512_BF16
// AVX-512's kernels, but for the passes of a call that choose has better ones for. `packs`: whether its weights are packed in any case.
template <const Passes& (*choose)(const Sizes&, const Schedule&, bool packs)>
Kernels with_better_passes(const char* instruction_set) {
  Kernels changed = avx512::table;
  changed.instruction_set = instruction_set;
  changed.forward_plan = [](const ForwardParams& p, const Threads& threads) {
    return choose(p.sizes, p.schedule, p.training).forward_plan(p, threads);
  };
  changed.forward = [](const ForwardParams& p, const Threads& threads, void* workspace) {
    choose(p.sizes, p.schedule, p.training).forward(p, threads, workspace);
  };
  changed.backward_workspace = [](const BackwardParams& p, const Threads& threads) {
    return choose(p.sizes, p.schedule, true).backward_workspace(p, threads);
  };
  changed.backward = [](const BackwardParams& p, const Threads& threads, void* workspace, int64_t first, int64_t last) {
    choose(p.sizes, p.schedule, true).backward(p, threads, workspace, first, last);
  };
  return changed;
}

const Passes& by_pairs(const Sizes& sizes, const Schedule&, bool) {
  if (sizes.dtype == ScalarKind::bfloat16) return avx512_bf16::bfloat16_passes;
  return avx512::table;
}

const Kernels& table_with_bf16() {
  static const Kernels table = with_better_passes<by_pairs>("avx512_bf16");
  return table;
}
#endif

#ifdef HSM_HAS_AMX
// Tiles, where there are rows of states for them. Arithmetic for Sapphire Rapids, not measured: 32 rows of W by four vectors take tiles 64 cycles,
// whatever the rows of states up to 16, and pairs 32 cycles for each row of states, or 64 if the CPU starts one product a cycle. In addition a block
// by tiles waits some 200 cycles for its first load, its last product and its way through memory. With 64 hidden units, two times 32 rows of W, five
// rows of states break even; with more units, or slower pairs, two or three.
// Tiles take packed weights. To pack a tile of them costs some 90 cycles, and its product with up to 16 rows another 16; pairs that read
// weights as they lie take 8 to 16 for each row of states, in all steps of the call together. There twelve rows are worth it, or seven.
const Passes& by_tiles(const Sizes& sizes, const Schedule& schedule, bool packs) {
  constexpr int64_t fewest_rows = 5, fewest_rows_worth_packing = 12;
  const bool enough = schedule.slots >= fewest_rows && (packs || sizes.steps * sizes.batch >= fewest_rows_worth_packing);
  if (sizes.dtype == ScalarKind::bfloat16 && enough) return amx_bf16::bfloat16_passes;
  return by_pairs(sizes, schedule, packs);
}

const Kernels& table_with_amx() {
  static const Kernels table = with_better_passes<by_tiles>("amx_bf16");
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
  const bool has_avx512_bf16 = has_avx512 && __builtin_cpu_supports("avx512bf16");
#ifdef HSM_HAS_AMX
  if (has_avx512_bf16 && takes(table_with_amx()) && obtain_tiles()) return table_with_amx();
#endif
  if (has_avx512_bf16 && takes(table_with_bf16())) return table_with_bf16();
#endif
  if (has_avx512 && takes(avx512::table)) return avx512::table;
  if (has_avx2 && takes(avx2::table)) return avx2::table;
#endif
  if (takes(portable::table)) return portable::table;
  throw std::runtime_error(std::string("hsm_kernels: HSM_KERNELS_CPU_ISA must be portable, or avx2, avx512, avx512_bf16 or amx_bf16 where the "
                                       "CPU has it, got ") +
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
