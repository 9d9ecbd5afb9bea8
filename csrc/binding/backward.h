// The backward pass of a layer: the recurrence, which leaves the gradients of all gate pre-activations, and the products over many
// steps that make the gradients of weights and input from them.
//
// Where all sequences are at the same step in every round, a chunk of steps at a time goes through the recurrence and through the
// products, while it is in cache.
#pragma once

#include "binding/layer.h"
#include "binding/product.h"

namespace hsm {
namespace binding {

class BackwardPass {
 public:
  BackwardPass(BackwardParams& params, const BackwardTensors& tensors, LayerGradients results)
      : p_(params), z_(params.sizes), t_(tensors), results_(std::move(results)) {}

  LayerGradients run() {
    const int64_t chunk = chunk_steps(), all_rounds = p_.schedule.rounds + 1;
    for (int d = 0; d < z_.directions; ++d) {
      grad_gates_.push_back(empty(t_.input, {chunk * z_.batch, 4 * int64_t{z_.hidden}}));
      p_.grad_gates[d] = grad_gates_[d].mutable_data_ptr();
    }
    // Both directions add to the gradient of the input.
    if (t_.needs_input && z_.directions == 2) torch::stable::zero_(results_.input);
    const cpu::Threads pool = threads();
    const Workspace workspace(cpu::kernels().backward_workspace(p_, pool));
    for (int64_t begin = 0; begin == 0 || begin < z_.steps; begin += std::max<int64_t>(chunk, 1)) {
      const int64_t end = std::min(begin + chunk, z_.steps);
      steps_[0] = {z_.steps - end, z_.steps - begin};
      steps_[1] = {begin, end};
      for (int d = 0; d < z_.directions; ++d) {
        p_.first_step[d] = steps_[d].begin;
        if (p_.recompute) project_again(d);
      }
      const bool last = end == z_.steps;
      cpu::kernels().backward(p_, pool, workspace.data(), begin, last ? all_rounds : end);
      for (int d = 0; d < z_.directions; ++d) add_gradients(d, begin == 0);
    }
    return std::move(results_);
  }

 private:
  struct Steps {
    int64_t begin, end;
    int64_t count() const { return end - begin; }
  };


  // All steps, unless every sequence is at the same step in every round and our own products take the chunks.
  int64_t chunk_steps() const {
    // A slot for each sequence and a round for each step: no sequence is shorter, and none is cut up and dealt out of its order.
    const bool in_step = !p_.boundaries.lengths && p_.schedule.slots == z_.batch && p_.schedule.rounds == z_.steps;
    if (!in_step || z_.steps == 0 || z_.batch == 0) return z_.steps;
    constexpr int64_t bytes = 1 << 20, fewest_rows = 192;  // what a chunk may take of the cache; what a product needs to be fast
    const int64_t row_bytes = 4 * int64_t{z_.hidden} * (z_.dtype == ScalarKind::float64 ? 8 : 4);
    const int64_t rows = std::max(bytes / row_bytes, fewest_rows) * threads().count, steps = std::max<int64_t>(1, rows / z_.batch);
    const bool own = takes_own_product(t_.input.scalar_type(), std::min(rows, gate_columns(z_)), std::min(t_.input.size(2), int64_t{z_.hidden_out}));
    if (!own) return z_.steps;
    const int64_t chunks = (z_.steps + steps - 1) / steps;  // of equal size: a short one would be slow
    return (z_.steps + chunks - 1) / chunks;
  }

  // Some steps of an (L, N, X) tensor as (steps * N, X).
  Tensor rows_of(const Tensor& tensor, const Steps& steps) const {
    Tensor flat = torch::stable::view(tensor, {z_.steps * z_.batch, tensor.size(2)});
    return torch::stable::narrow(flat, 0, steps.begin * z_.batch, steps.count() * z_.batch);
  }

  // The gradients of some gates at some of the chunk's steps.
  Tensor grad_gates(int d, const Steps& steps, int64_t first, int64_t count) {
    Tensor rows = torch::stable::narrow(grad_gates_[d], 0, (steps.begin - steps_[d].begin) * z_.batch, steps.count() * z_.batch);
    return torch::stable::narrow(rows, 1, first, count);
  }

  // The pre-activations of the chunk's gates, without bias, from the state that entered each step, as BackwardParams::recompute wants
  // them.
  void project_again(int d) {
    const Steps& steps = steps_[d];
    const int64_t hidden = z_.hidden;
    own_product(rows_of(t_.input, steps), torch::stable::transpose(t_.weight_ih[d], 0, 1), grad_gates(d, steps, 0, gate_columns(z_)), false);
    const auto multiply = [&](int64_t first, int64_t count, int64_t column, bool add) {
      const Tensor w = torch::stable::transpose(torch::stable::narrow(t_.weight_hh[d], 0, first, count), 0, 1);
      for_each_entering(d, [&](const Tensor& states, const Steps& part) {
        own_product(states, w, grad_gates(d, part, column, count), add);
      });
      const Steps start = starts_from_zero(d);
      if (add || start.count() == 0) return;
      Tensor from_zero = grad_gates(d, start, column, count);
      torch::stable::zero_(from_zero);
    };
    if (z_.cell == CellKind::lstm) {
      multiply(0, 4 * hidden, 0, true);
    } else {  // the hidden half of n stays apart
      multiply(0, 2 * hidden, 0, true);
      multiply(2 * hidden, hidden, 3 * hidden, false);
    }
  }

  // The step of the chunk, if it has one, that a direction entered from its initial state.
  Steps first_step(int d) const {
    const int64_t t = d ? z_.steps - 1 : 0;
    return t >= steps_[d].begin && t < steps_[d].end ? Steps{t, t + 1} : Steps{0, 0};
  }
  Steps starts_from_zero(int d) const { return t_.entering || t_.h_0 ? Steps{0, 0} : first_step(d); }

  // Calls visit(states, steps) with the states that entered the chunk's steps, in pieces that cover all steps but those that were
  // entered from zero.
  template <class Visit>
  void for_each_entering(int d, Visit visit) {
    if (steps_[d].count() == 0) return;
    if (t_.entering) return visit(rows_of(torch::stable::select(*t_.entering, 0, d), steps_[d]), steps_[d]);
    const Steps first = first_step(d);
    if (first.count() > 0 && t_.h_0) visit(torch::stable::select(*t_.h_0, 0, d), first);
    Steps others = steps_[d];
    if (first.count() > 0) (d ? others.end : others.begin) += d ? -1 : 1;
    if (others.count() == 0) return;
    const int64_t shift = d ? 1 : -1;
    Tensor states = rows_of(t_.output, {others.begin + shift, others.end + shift});
    visit(torch::stable::narrow(states, 1, d * z_.hidden_out, z_.hidden_out), others);
  }

  // What the chunk adds to the results of one direction; `first`: of all chunks.
  void add_gradients(int d, bool first) {
    const Steps& steps = steps_[d];
    const int64_t hidden = z_.hidden;
    const Tensor projected = grad_gates(d, steps, 0, gate_columns(z_));
    if (t_.needs_input) multiply_into(projected, t_.weight_ih[d], rows_of(results_.input, steps), z_.directions == 2);
    if (!t_.needs_weights) return;
    multiply_into(torch::stable::transpose(projected, 0, 1), rows_of(t_.input, steps), results_.weight_ih[d], !first);
    if (z_.cell == CellKind::lstm) {
      add_hidden(d, 0, 4 * hidden, 0, first);
    } else {
      add_hidden(d, 0, 2 * hidden, 0, first);
      add_hidden(d, 2 * hidden, hidden, 3 * hidden, first);
    }
    add_bias(d, first);
  }

  // Rows of the gradient of W_hh from the gates' gradients at `column`.
  void add_hidden(int d, int64_t row, int64_t rows, int64_t column, bool first) {
    const Tensor result = torch::stable::narrow(results_.weight_hh[d], 0, row, rows);
    bool add = !first;
    for_each_entering(d, [&](const Tensor& states, const Steps& part) {
      multiply_into(torch::stable::transpose(grad_gates(d, part, column, rows), 0, 1), states, result, add);
      add = true;
    });
    if (!add) {
      Tensor zero = result;
      torch::stable::zero_(zero);
    }
  }

  void add_bias(int d, bool first) {
    const Tensor& gates = grad_gates_[d];
    RowSumParams p{};
    p.dtype = z_.dtype;
    p.rows = steps_[d].count() * z_.batch, p.columns = gates.size(1), p.row_stride = gates.size(1);
    p.matrix = gates.const_data_ptr();
    p.sums = results_.bias[d].mutable_data_ptr();
    p.add = !first;
    cpu::kernels().row_sum(p);
  }

  BackwardParams& p_;
  const Sizes& z_;
  BackwardTensors t_;
  std::vector<Tensor> grad_gates_;  // of each direction, (steps of a chunk * N, 4 * H)
  Steps steps_[max_directions];     // of the chunk at hand
  LayerGradients results_;
};

}  // namespace binding
}  // namespace hsm
