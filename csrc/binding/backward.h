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
    const int64_t gates = 4 * int64_t{z_.hidden};
    const Tensor memory = empty(t_.input, {z_.directions, chunk, z_.batch, gates});
    for (int d = 0; d < z_.directions; ++d) {
      gates_.push_back(matrix_in(z_.dtype, memory, d * chunk * z_.batch * gates, chunk * z_.batch, gates));
      p_.grad_gates[d] = gates_[d].data;
    }
    // Both directions add to the gradient of the input.
    if (t_.needs_input && z_.directions == 2) clear(rows_of(results_.input, {0, z_.steps}));
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

  // All steps, unless every sequence is at the same step in every round and our own products take the chunks: of all samples together.
  int64_t chunk_steps() const {
    // A slot for each sequence and a round for each step: no sequence is shorter, and none is cut up and dealt out of its order.
    const bool in_step = !p_.boundaries.lengths && p_.schedule.slots == z_.batch && p_.schedule.rounds == z_.steps;
    if (!in_step || z_.steps == 0 || z_.batch == 0 || t_.samples > 1) return z_.steps;
    constexpr int64_t bytes = 1 << 20, fewest_rows = 192;  // what a chunk may take of the cache; what a product needs to be fast
    const int64_t row_bytes = 4 * int64_t{z_.hidden} * element_bytes(z_.dtype);
    const int64_t rows = std::max(bytes / row_bytes, fewest_rows) * threads().count, steps = std::max<int64_t>(1, rows / z_.batch);
    const bool own = takes_own_product(z_.dtype, std::min(rows, gate_columns(z_)), std::min(t_.input.size(-1), int64_t{z_.hidden_out}));
    if (!own) return z_.steps;
    const int64_t chunks = (z_.steps + steps - 1) / steps;  // of equal size: a short one would be slow
    return (z_.steps + chunks - 1) / chunks;
  }

  // Some steps of a contiguous (L, N, X) tensor as (steps * N, X); (N, X) is one step.
  Matrix rows_of(const Tensor& tensor, const Steps& steps) const {
    const int64_t columns = tensor.size(-1);
    return matrix_in(z_.dtype, tensor, steps.begin * z_.batch * columns, steps.count() * z_.batch, columns);
  }

  // The gradients of some gates at some of the chunk's steps.
  Matrix grad_gates(int d, const Steps& steps, int64_t first, int64_t count) const {
    return gates_[d].row_range((steps.begin - steps_[d].begin) * z_.batch, steps.count() * z_.batch).column_range(first, count);
  }

  static void clear(const Matrix& rows) {
    for (int64_t r = 0; r < rows.rows; ++r) std::memset(rows.row_range(r, 1).data, 0, rows.columns * element_bytes(rows.dtype));
  }

  // The pre-activations of the chunk's gates, without bias, from the state that entered each step, as BackwardParams::recompute wants
  // them.
  void project_again(int d) {
    const Steps& steps = steps_[d];
    const int64_t hidden = z_.hidden;
    own_product(rows_of(t_.input, steps), weight(t_.weight_ih[d]).transposed(), grad_gates(d, steps, 0, gate_columns(z_)), false);
    const auto multiply = [&](int64_t first, int64_t count, int64_t column, bool add) {
      const Matrix w = weight(t_.weight_hh[d]).row_range(first, count).transposed();
      for_each_entering(d, [&](const Matrix& states, const Steps& part) {
        own_product(states, w, grad_gates(d, part, column, count), add);
      });
      if (!add) clear(grad_gates(d, starts_from_zero(d), column, count));
    };
    if (z_.cell == CellKind::lstm) {
      multiply(0, 4 * hidden, 0, true);
    } else {  // the hidden half of n stays apart
      multiply(0, 2 * hidden, 0, true);
      multiply(2 * hidden, hidden, 3 * hidden, false);
    }
  }

  Matrix weight(const Tensor& tensor) const { return matrix_in(z_.dtype, tensor, 0, tensor.size(0), tensor.size(1)); }

  // The step of the chunk, if it has one, that a direction entered from its initial state.
  Steps first_step(int d) const {
    const int64_t t = d ? z_.steps - 1 : 0;
    return t >= steps_[d].begin && t < steps_[d].end ? Steps{t, t + 1} : Steps{steps_[d].begin, steps_[d].begin};
  }
  Steps starts_from_zero(int d) const {
    return t_.entering || t_.h_0 ? Steps{steps_[d].begin, steps_[d].begin} : first_step(d);
  }

  // Calls visit(states, steps) with the states that entered the chunk's steps, in pieces that cover all steps but those that were
  // entered from zero.
  template <class Visit>
  void for_each_entering(int d, Visit visit) const {
    const int64_t out = z_.hidden_out;
    if (steps_[d].count() == 0) return;
    if (t_.entering) {
      const int64_t first_row = (d * z_.steps + steps_[d].begin) * z_.batch;
      return visit(matrix_in(z_.dtype, *t_.entering, first_row * out, steps_[d].count() * z_.batch, out), steps_[d]);
    }
    const Steps first = first_step(d);
    if (first.count() > 0 && t_.h_0) visit(matrix_in(z_.dtype, *t_.h_0, d * z_.batch * out, z_.batch, out), first);
    Steps others = steps_[d];
    if (first.count() > 0) (d ? others.end : others.begin) += d ? -1 : 1;
    if (others.count() == 0) return;
    const int64_t shift = d ? 1 : -1;
    visit(rows_of(t_.output, {others.begin + shift, others.end + shift}).column_range(d * out, out), others);
  }

  // What the chunk adds to the results of one direction; `first`: of all chunks.
  void add_gradients(int d, bool first) const {
    const Steps& steps = steps_[d];
    const Matrix projected = grad_gates(d, steps, 0, gate_columns(z_));
    if (t_.needs_input) multiply_into(projected, weight(t_.weight_ih[d]), rows_of(results_.input, steps), z_.directions == 2);
    for (int64_t s = 0; s < t_.samples; ++s) {
      const int64_t own = z_.batch / t_.samples;
      if (own == z_.batch) add_weights(d, {0, own, s, first});
      for (int64_t n = 0; own < z_.batch && n < own; ++n) add_weights(d, {s * own + n, 1, s, first && n == 0});
    }
  }

  // Sequences whose steps a product sums over: all, or one of a sample.
  struct Summands {
    int64_t sequence, count, sample;
    bool first;  // of the sample's

    // Their rows among those of all sequences, step by step.
    Matrix among(const Matrix& rows, int64_t batch) const {
      if (count == batch) return rows;
      Matrix own = rows.row_range(sequence, rows.rows / batch);
      own.row_stride *= batch;
      return own;
    }
  };

  void add_weights(int d, const Summands& of) const {
    const int64_t hidden = z_.hidden;
    const Matrix gates = of.among(grad_gates(d, steps_[d], 0, 4 * hidden), z_.batch);
    const Matrix input = of.among(rows_of(t_.input, steps_[d]), z_.batch);
    const Matrix weight_ih = sum(results_.weight_ih[d], of, gate_columns(z_), t_.input.size(-1));
    multiply_into(gates.column_range(0, gate_columns(z_)).transposed(), input, weight_ih, !of.first);
    const Matrix weight_hh = sum(results_.weight_hh[d], of, gate_columns(z_), z_.hidden_out);
    if (z_.cell == CellKind::lstm) {
      add_hidden(d, of, weight_hh, 0);
    } else {
      add_hidden(d, of, weight_hh.row_range(0, 2 * hidden), 0);
      add_hidden(d, of, weight_hh.row_range(2 * hidden, hidden), 3 * hidden);
    }
    add_bias(gates, sum(results_.bias[d], of, 1, 4 * hidden), of.first);
  }

  // What is summed for a sample.
  Matrix sum(const Tensor& result, const Summands& of, int64_t rows, int64_t columns) const {
    return matrix_in(z_.dtype, result, of.sample * rows * columns, rows, columns);
  }

  // Rows of the gradient of W_hh from the gates' gradients at `column`.
  void add_hidden(int d, const Summands& of, const Matrix& result, int64_t column) const {
    bool add = !of.first;
    for_each_entering(d, [&](const Matrix& states, const Steps& part) {
      const Matrix gates = of.among(grad_gates(d, part, column, result.rows), z_.batch);
      multiply_into(gates.transposed(), of.among(states, z_.batch), result, add);
      add = true;
    });
    if (!add) clear(result);
  }

  static void add_bias(const Matrix& gates, const Matrix& result, bool first) {
    RowSumParams p{};
    p.dtype = gates.dtype;
    p.rows = gates.rows, p.columns = gates.columns, p.row_stride = gates.row_stride;
    p.matrix = gates.data;
    p.sums = result.data;
    p.add = !first;
    cpu::kernels().row_sum(p);
  }

  BackwardParams& p_;
  const Sizes& z_;
  BackwardTensors t_;
  std::vector<Matrix> gates_;    // their gradients, of each direction: (steps of a chunk * N, 4 * H)
  Steps steps_[max_directions];  // of the chunk at hand
  LayerGradients results_;
};

}  // namespace binding
}  // namespace hsm
