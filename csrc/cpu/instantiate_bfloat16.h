// Defines the passes of bfloat16 tensors for the instruction set that HSM_ISA names.
#pragma once

#include "cpu/backward.h"
#include "cpu/dispatch.h"
#include "cpu/forward.h"
#include "cpu/kernels.h"

namespace hsm {
namespace cpu {
namespace HSM_ISA {

inline ForwardPlan forward_plan(const ForwardParams& params, const Threads& threads) {
  ForwardPlan plan{};
  with_cell<Forward, BFloat16>(params, threads, nullptr, [&](auto& pass) { plan = pass.plan(); });
  return plan;
}

inline void run_forward(const ForwardParams& params, const Threads& threads, void* workspace) {
  with_cell<Forward, BFloat16>(params, threads, workspace, [](auto& pass) { pass.run(); });
}

inline size_t backward_workspace(const BackwardParams& params, const Threads& threads) {
  size_t bytes = 0;
  with_cell<Backward, BFloat16>(params, threads, nullptr, [&](auto& pass) { bytes = pass.workspace_bytes(); });
  return bytes;
}

inline void run_backward(const BackwardParams& params, const Threads& threads, void* workspace, int64_t first, int64_t last) {
  with_cell<Backward, BFloat16>(params, threads, workspace, [=](auto& pass) { pass.run(first, last); });
}

const Passes bfloat16_passes = {instruction_set, forward_plan, run_forward, backward_workspace, run_backward};

}  // namespace HSM_ISA
}  // namespace cpu
}  // namespace hsm
