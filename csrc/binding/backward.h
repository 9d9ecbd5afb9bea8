// The backward pass of a layer: the recurrence, which leaves the gradients of all gate pre-activations, and the products over many
// steps that make the gradients of weights and input from them.
//
// Where all sequences are at the same step in every round, a chunk of steps at a time goes through the recurrence and through the
// products, while it is in cache.
#pragma once

#include "binding/layer.h"

namespace hsm {
namespace binding {

struct LayerGradients {
  Tensor input;
  Tensor weight_ih[max_directions], weight_hh[max_directions];
  Tensor bias[max_directions];  // (4 * H,): of the parts of grad_gates, summed
};

class BackwardPass {
 public:
  // `output` (L, N, D * Hout) and `h_0` (D, N, Hout) or null give the states that entered the steps where nothing was reset and all
  // sequences have all steps; elsewhere `entering` (D, L, N, Hout) does.
  BackwardPass(const char* op, BackwardParams& params, const Tensor& input, const Tensor& output, const MaybeTensor& h_0,
               const MaybeTensor& entering, const std::vector<DirectionTensors>& directions, bool needs_input, bool needs_weights)
      : p_(params), z_(params.sizes), needs_input_(needs_input), needs_weights_(needs_weights),
        input_(torch::stable::contiguous(input)), output_(torch::stable::contiguous(output)) {
    check_type(op, "input", input, output.scalar_type());
    check_shape(op, "input", input, {z_.steps, z_.batch, input.size(2)});
    check_type(op, "output", output, input.scalar_type());
    check_shape(op, "output", output, {z_.steps, z_.batch, z_.directions * int64_t{z_.hidden_out}});
    if (h_0) h_0_ = torch::stable::contiguous(*h_0);
    if (entering) {
      check_type(op, "entering", *entering, input.scalar_type());
      check_shape(op, "entering", *entering, {z_.directions, z_.steps, z_.batch, z_.hidden_out});
      entering_ = torch::stable::contiguous(*entering);
    }
    const Boundaries& b = params.boundaries;
    STD_TORCH_CHECK(entering || !(b.reset_mask || b.lengths), op, ": entering must be given with reset_mask or lengths");
    STD_TORCH_CHECK(!p_.recompute || has_product(input.scalar_type()), op, ": gates must be given but for float32 and float64");
    for (const DirectionTensors& w : directions) {
      check_type(op, "weight_ih", *w.weight_ih, input.scalar_type());
      check_shape(op, "weight_ih", *w.weight_ih, {gate_columns(), input.size(2)});
      weight_ih_.push_back(torch::stable::contiguous(*w.weight_ih));
      weight_hh_.push_back(torch::stable::contiguous(*w.weight_hh));
    }
  }

  LayerGradients run() {
    const int64_t chunk = chunk_steps(), all_rounds = p_.schedule.rounds + 1;
    for (int d = 0; d < z_.directions; ++d) {
      grad_gates_.push_back(empty(input_, {chunk * z_.batch, 4 * int64_t{z_.hidden}}));
      p_.grad_gates[d] = grad_gates_[d].mutable_data_ptr();
    }
    allocate_results();
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

  int64_t gate_columns() const { return (z_.cell == CellKind::lstm ? 4 : 3) * int64_t{z_.hidden}; }

  // All steps, unless every sequence is at the same step in every round and our own products take the chunks.
  int64_t chunk_steps() const {
    // A slot for each sequence and a round for each step: no sequence is shorter, and none is cut up and dealt out of its order.
    const bool in_step = !p_.boundaries.lengths && p_.schedule.slots == z_.batch && p_.schedule.rounds == z_.steps;
    if (!in_step || z_.steps == 0 || z_.batch == 0) return z_.steps;
    constexpr int64_t bytes = 1024e3, fewest_rows = 192;  // what a chunk may take of the cache; what a product needs to be fast
    const int64_t row_bytes = 4 * int64_t{z_.hidden} * (z_.dtype == ScalarKind::float64 ? 8 : 4);
    const int64_t rows = std::max(bytes / row_bytes, fewest_rows) * threads().count, steps = std::max<int64_t>(1, rows / z_.batch);
    const bool own = takes_own_product(input_.scalar_type(), std::min(rows, gate_columns()), std::min(input_.size(2), int64_t{z_.hidden_out}));
    return own ? std::min(z_.steps, steps) : z_.steps;
  }

  void allocate_results() {
    const int64_t inputs = input_.size(2), gates = gate_columns();
    // Both directions add to the gradient of the input.
    if (needs_input_ && z_.directions == 2) results_.input = torch::stable::new_zeros(input_, {z_.steps, z_.batch, inputs});
    if (needs_input_ && z_.directions == 1) results_.input = empty(input_, {z_.steps, z_.batch, inputs});
    if (!needs_input_) results_.input = empty(input_, {0});
    for (int d = 0; d < max_directions; ++d) {
      const bool needed = needs_weights_ && d < z_.directions;
      results_.weight_ih[d] = empty(input_, needed ? Shape{gates, inputs} : Shape{0});
      results_.weight_hh[d] = empty(input_, needed ? Shape{gates, z_.hidden_out} : Shape{0});
      results_.bias[d] = empty(input_, needed ? Shape{4 * int64_t{z_.hidden}} : Shape{0});
    }
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
    own_product(rows_of(input_, steps), torch::stable::transpose(weight_ih_[d], 0, 1), grad_gates(d, steps, 0, gate_columns()), false);
    const auto multiply = [&](int64_t first, int64_t count, int64_t column, bool add) {
      const Tensor w = torch::stable::transpose(torch::stable::narrow(weight_hh_[d], 0, first, count), 0, 1);
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
  Steps starts_from_zero(int d) const { return entering_ || h_0_ ? Steps{0, 0} : first_step(d); }

  // Calls visit(states, steps) with the states that entered the chunk's steps, in pieces that cover all steps but those that were
  // entered from zero.
  template <class Visit>
  void for_each_entering(int d, Visit visit) {
    if (steps_[d].count() == 0) return;
    if (entering_) return visit(rows_of(torch::stable::select(*entering_, 0, d), steps_[d]), steps_[d]);
    const Steps first = first_step(d);
    if (first.count() > 0 && h_0_) visit(torch::stable::select(*h_0_, 0, d), first);
    Steps others = steps_[d];
    if (first.count() > 0) (d ? others.end : others.begin) += d ? -1 : 1;
    if (others.count() == 0) return;
    const int64_t shift = d ? 1 : -1;
    Tensor states = rows_of(output_, {others.begin + shift, others.end + shift});
    visit(torch::stable::narrow(states, 1, d * z_.hidden_out, z_.hidden_out), others);
  }

  // What the chunk adds to the results of one direction; `first`: of all chunks.
  void add_gradients(int d, bool first) {
    const Steps& steps = steps_[d];
    const int64_t hidden = z_.hidden;
    const Tensor projected = grad_gates(d, steps, 0, gate_columns());
    if (needs_input_) multiply_into(projected, weight_ih_[d], rows_of(results_.input, steps), z_.directions == 2);
    if (!needs_weights_) return;
    multiply_into(torch::stable::transpose(projected, 0, 1), rows_of(input_, steps), results_.weight_ih[d], !first);
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
  bool needs_input_, needs_weights_;
  Tensor input_, output_;
  MaybeTensor h_0_, entering_;
  std::vector<Tensor> weight_ih_, weight_hh_;
  std::vector<Tensor> grad_gates_;  // of each direction, (steps of a chunk * N, 4 * H)
  Steps steps_[max_directions];     // of the chunk at hand
  LayerGradients results_;
};

}  // namespace binding
}  // namespace hsm
