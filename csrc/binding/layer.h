// What the LSTM and GRU operators share: sizes, boundaries, weights and input, and the run of the forward pass.
#pragma once

#include "binding/tensors.h"

namespace hsm {
namespace binding {

// The parameters of one direction as the operators take them; weight_hr stays empty for GRU.
struct DirectionTensors {
  MaybeTensor weight_ih, weight_hh, bias_ih, bias_hh, weight_hr;
};

// The directions that were given: one, or two if the second has weights.
inline std::vector<DirectionTensors> directions_of(const DirectionTensors& forward, const DirectionTensors& reverse) {
  if (!reverse.weight_hh) return {forward};
  return {forward, reverse};
}

inline Sizes sizes_of(const char* op, CellKind cell, const Tensor& like, int64_t steps, int64_t batch, size_t directions,
                      const Tensor& weight_hh, bool projection) {
  const int gates = cell == CellKind::lstm ? 4 : 3;
  const int64_t most = 1 << 28;
  STD_TORCH_CHECK(weight_hh.dim() == 2 && weight_hh.size(0) % gates == 0 && weight_hh.size(0) < most, op,
                  ": weight_hh must have shape (", gates, " * H, Hout), got ", text(shape_of(weight_hh)));
  STD_TORCH_CHECK(projection || weight_hh.size(1) * gates == weight_hh.size(0), op, ": weight_hh must have shape (", gates,
                  " * H, H) without a projection, got ", text(shape_of(weight_hh)));
  return {cell, scalar_kind(op, like), steps, batch, static_cast<int>(directions), static_cast<int>(weight_hh.size(0) / gates),
          static_cast<int>(weight_hh.size(1)), projection};
}

inline Boundaries boundaries_of(Arguments& arguments, const Sizes& z, const MaybeTensor& reset_mask, const MaybeTensor& reset_h,
                                const MaybeTensor& reset_c, const MaybeTensor& detach_mask, const MaybeTensor& lengths) {
  Boundaries b{};
  b.reset_mask = arguments.mask("reset_mask", reset_mask, {z.steps, z.batch}, b.reset_step_stride, b.reset_batch_stride);
  b.detach_mask = arguments.mask("detach_mask", detach_mask, {z.steps, z.batch}, b.detach_step_stride, b.detach_batch_stride);
  b.lengths = arguments.lengths(lengths, z.batch);
  b.reset_h = arguments.pointer("reset_h", reset_h, {z.directions, z.batch, z.hidden_out});
  b.reset_c = arguments.pointer("reset_c", reset_c, {z.directions, z.batch, z.hidden});
  return b;
}

inline Weights weights_of(Arguments& arguments, const Sizes& z, const DirectionTensors& w, ScalarType type) {
  const int64_t rows = (z.cell == CellKind::lstm ? 4 : 3) * static_cast<int64_t>(z.hidden);
  return {nullptr, arguments.pointer("weight_hh", w.weight_hh, {rows, z.hidden_out}, type),
          arguments.pointer("weight_hr", w.weight_hr, {z.hidden_out, z.hidden}, type), arguments.pointer("bias_ih", w.bias_ih, {rows}),
          arguments.pointer("bias_hh", w.bias_hh, {rows})};
}

// All weights as the forward pass reads them, and the input (L, N, I).
inline void add_weights_and_input(Arguments& arguments, const Tensor& input, const std::vector<DirectionTensors>& directions, bool training,
                                  ForwardParams& p) {
  ScalarType type = input.scalar_type();
  p.bfloat16_weights = !training && type == ScalarType::Float && directions[0].weight_hh->scalar_type() == ScalarType::BFloat16;
  if (p.bfloat16_weights) type = ScalarType::BFloat16;
  p.input_size = input.size(2);
  p.input = arguments.rows("input", input, {p.sizes.steps, p.sizes.batch, p.input_size}, p.input_step_stride, p.input_batch_stride);
  for (int d = 0; d < p.sizes.directions; ++d) {
    p.weights[d] = weights_of(arguments, p.sizes, directions[d], type);
    p.weights[d].weight_ih = arguments.pointer("weight_ih", directions[d].weight_ih, {directions[d].weight_hh->size(0), p.input_size}, type);
  }
}

inline void run_forward(const ForwardParams& p) {
  const cpu::Threads pool = threads();
  const Workspace workspace(cpu::kernels().forward_plan(p, pool).workspace_bytes);
  cpu::kernels().forward(p, pool, workspace.data());
}

}  // namespace binding
}  // namespace hsm
