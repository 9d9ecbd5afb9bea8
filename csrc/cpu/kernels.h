// The CPU kernels as the binding sees them: one table per instruction set, the best one chosen at run time.
#pragma once

#include <cstddef>

#include "common/params.h"
#include "cpu/threads.h"

namespace hsm {
namespace cpu {

// Each pass first says how many bytes of workspace it needs for the same parameters and threads. The workspace must be
// aligned to 64 bytes; its contents do not matter.
struct Passes {
  const char* instruction_set;
  ForwardPlan (*forward_plan)(const ForwardParams&, const Threads&);
  void (*forward)(const ForwardParams&, const Threads&, void* workspace);
  size_t (*backward_workspace)(const BackwardParams&, const Threads&);
  // Rounds [first, last) of one more than the schedule has. The first call begins with round 0; the workspace keeps the state.
  void (*backward)(const BackwardParams&, const Threads&, void* workspace, int64_t first, int64_t last);
};

struct Kernels : Passes {
  size_t (*product_workspace)(const ProductParams&, const Threads&);
  void (*product)(const ProductParams&, const Threads&, void* workspace);
  void (*row_sum)(const RowSumParams&);
};

// The best kernels for this machine, or those that HSM_KERNELS_CPU_ISA names. Throws if they cannot run.
const Kernels& kernels();

// Whether Kernels::product is faster than torch's own product, which is MKL's on x86-64: on CPUs of other makers than Intel MKL
// takes instructions that reach half the speed or less. Few rows are not worth packing the other operand for, and a block of
// columns that is mostly empty is not worth computing. HSM_KERNELS_CPU_PRODUCT=own|torch decides otherwise, whatever the size.
bool has_faster_product(int64_t rows, int64_t columns);

namespace portable {
extern const Kernels table;
}
#ifdef __x86_64__
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
// Older compilers do not know the instructions.
#if !defined(__clang__) || __clang_major__ >= 14
#define HSM_HAS_AVX512_BF16
namespace avx512_bf16 {
extern const Passes bfloat16_passes;
}
// The build says so where the compiler, or its assembler, does not know these.
#ifndef HSM_WITHOUT_AMX
#define HSM_HAS_AMX
namespace amx_bf16 {
extern const Passes bfloat16_passes;
}
#endif
#endif
#endif

}  // namespace cpu
}  // namespace hsm
