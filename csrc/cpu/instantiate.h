// Defines the kernel table of the instruction set that HSM_ISA names.
#pragma once

#include "cpu/backward.h"
#include "cpu/dispatch.h"
#include "cpu/forward.h"
#include "cpu/kernels.h"
#include "cpu/product.h"
#include "cpu/row_sum.h"

namespace hsm {
namespace cpu {
namespace HSM_ISA {

// Calls visit(Pass<T, cell>(params, ...)) for the element type and cell of the parameters.
template <template <class, CellKind> class Pass, class Params, class Visit>
void dispatch(const Params& params, const Threads& threads, void* workspace, Visit visit) {
  const auto of_type = [&](auto element) { with_cell<Pass, decltype(element)>(params, threads, workspace, visit); };
  switch (params.sizes.dtype) {
    case ScalarKind::float64: return of_type(double());
    case ScalarKind::float32: return of_type(float());
    case ScalarKind::bfloat16: return of_type(BFloat16());
    case ScalarKind::float16: return of_type(Float16());
  }
}

template <class Visit>
void dispatch_forward(const ForwardParams& params, const Threads& threads, void* workspace, Visit visit) {
  if (params.bfloat16_weights) return with_cell<ForwardWithBFloat16Weights, float>(params, threads, workspace, visit);
  dispatch<Forward>(params, threads, workspace, visit);
}

inline ForwardPlan forward_plan(const ForwardParams& params, const Threads& threads) {
  ForwardPlan plan{};
  dispatch_forward(params, threads, nullptr, [&](auto& pass) { plan = pass.plan(); });
  return plan;
}

inline size_t backward_workspace(const BackwardParams& params, const Threads& threads) {
  size_t bytes = 0;
  dispatch<Backward>(params, threads, nullptr, [&](auto& pass) { bytes = pass.workspace_bytes(); });
  return bytes;
}

inline void run_forward(const ForwardParams& params, const Threads& threads, void* workspace) {
  dispatch_forward(params, threads, workspace, [](auto& pass) { pass.run(); });
}

inline void run_backward(const BackwardParams& params, const Threads& threads, void* workspace, int64_t first, int64_t last) {
  dispatch<Backward>(params, threads, workspace, [=](auto& pass) { pass.run(first, last); });
}

// The same for a product.
template <class Visit>
void with_product(const ProductParams& params, const Threads& threads, void* workspace, Visit visit) {
  if (params.dtype == ScalarKind::float64) {
    Product<double> product(params, threads, workspace);
    visit(product);
  } else {
    Product<float> product(params, threads, workspace);
    visit(product);
  }
}

inline size_t workspace_of_product(const ProductParams& params, const Threads& threads) {
  size_t bytes = 0;
  with_product(params, threads, nullptr, [&](auto& product) { bytes = product.workspace_bytes(); });
  return bytes;
}

inline void run_product(const ProductParams& params, const Threads& threads, void* workspace) {
  with_product(params, threads, workspace, [](auto& product) { product.run(); });
}

inline void run_row_sum(const RowSumParams& params) {
  switch (params.dtype) {
    case ScalarKind::float64: return RowSum<double>(params).run();
    case ScalarKind::float32: return RowSum<float>(params).run();
    case ScalarKind::bfloat16: return RowSum<BFloat16>(params).run();
    case ScalarKind::float16: return RowSum<Float16>(params).run();
  }
}

const Kernels table = {{instruction_set, forward_plan, run_forward, backward_workspace, run_backward}, workspace_of_product, run_product, run_row_sum};

}  // namespace HSM_ISA
}  // namespace cpu
}  // namespace hsm
