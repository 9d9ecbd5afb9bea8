// What the LSTM and GRU operators share: sizes, boundaries, weights and input.
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

inline Weights weights_of(Arguments& arguments, const Sizes& z, const DirectionTensors& w) {
  const int64_t rows = (z.cell == CellKind::lstm ? 4 : 3) * static_cast<int64_t>(z.hidden);
  return {nullptr, arguments.pointer("weight_hh", w.weight_hh, {rows, z.hidden_out}),
          arguments.pointer("weight_hr", w.weight_hr, {z.hidden_out, z.hidden}), arguments.pointer("bias_ih", w.bias_ih, {rows}),
          arguments.pointer("bias_hh", w.bias_hh, {rows})};
}

// The input (L, N, I) as the forward pass reads it, and the weights that take it.
inline void add_input(Arguments& arguments, const Tensor& input, const std::vector<DirectionTensors>& directions, ForwardParams& p) {
  p.input_size = input.size(2);
  p.input = arguments.rows("input", input, {p.sizes.steps, p.sizes.batch, p.input_size}, p.input_step_stride, p.input_batch_stride);
  for (int d = 0; d < p.sizes.directions; ++d)
    p.weights[d].weight_ih = arguments.pointer("weight_ih", directions[d].weight_ih, {directions[d].weight_hh->size(0), p.input_size});
}

// Writes x @ W_ih^T of every direction into the first columns of `gates` (L, N, D, columns).
inline void project_input(const char* op, const Tensor& input, const std::vector<DirectionTensors>& directions, const Tensor& gates) {
  const int64_t rows = input.size(0) * input.size(1), columns = gates.size(3);
  const Tensor x = torch::stable::reshape(input, {rows, input.size(2)});
  const Tensor all = torch::stable::view(gates, {rows, gates.size(2) * columns});
  for (size_t d = 0; d < directions.size(); ++d) {
    const Tensor& w = *directions[d].weight_ih;
    check_type(op, "weight_ih", w, input.scalar_type());
    check_shape(op, "weight_ih", w, {directions[d].weight_hh->size(0), input.size(2)});
    Tensor part = all;
    multiply_into(x, torch::stable::transpose(w, 0, 1), torch::stable::narrow(part, 1, static_cast<int64_t>(d) * columns, w.size(0)));
  }
}

// The pre-activations of all gates, without bias, from the state that entered each step: `entering` (D, L, N, Hout). They fill
// `gates` (L, N, D, 4 * H) as BackwardParams::recompute wants them.
inline void project_again(const char* op, const Sizes& z, const Tensor& input, const Tensor& entering,
                          const std::vector<DirectionTensors>& directions, const Tensor& gates) {
  STD_TORCH_CHECK(has_product(input.scalar_type()), op, ": gates must be given but for float32 and float64");
  check_type(op, "input", input, gates.scalar_type());
  check_shape(op, "input", input, {z.steps, z.batch, input.size(2)});
  check_type(op, "entering", entering, gates.scalar_type());
  check_shape(op, "entering", entering, {z.directions, z.steps, z.batch, z.hidden_out});
  project_input(op, input, directions, gates);
  const int64_t rows = z.steps * z.batch, hidden = z.hidden;
  const Tensor h = torch::stable::contiguous(entering), all = torch::stable::view(gates, {rows, z.directions * 4 * hidden});
  for (int d = 0; d < z.directions; ++d) {
    const Tensor states = torch::stable::view(torch::stable::select(h, 0, d), {rows, z.hidden_out});
    Tensor w = torch::stable::contiguous(*directions[d].weight_hh);
    const auto multiply = [&](int64_t first, int64_t count, int64_t column, bool add) {
      Tensor part = all;
      own_product(states, torch::stable::transpose(torch::stable::narrow(w, 0, first, count), 0, 1),
                  torch::stable::narrow(part, 1, (4 * d * hidden) + column, count), add);
    };
    if (z.cell == CellKind::lstm) {
      multiply(0, 4 * hidden, 0, true);
    } else {  // the hidden half of n stays apart
      multiply(0, 2 * hidden, 0, true);
      multiply(2 * hidden, hidden, 3 * hidden, false);
    }
  }
}

}  // namespace binding
}  // namespace hsm
