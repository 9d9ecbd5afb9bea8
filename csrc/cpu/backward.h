// The backward recurrence of one layer: the gradients of all gate pre-activations. Weight and input gradients are products
// over all steps that the caller does afterwards.
//
// Round k looks at the step that a direction ran as its (L - 1 - k)-th. It first takes the gate gradients of the round before
// back through W_hh, which gives the gradient of the state between the two steps, then applies the edge between them, and
// then goes through the cell of its own step. One more round takes the first step's gradients to the initial state.
#pragma once

#include "common/cell_math.h"
#include "cpu/matrix_tile.h"
#include "cpu/schedule.h"
#include "cpu/vector_math.h"

namespace hsm {
namespace cpu {
namespace HSM_ISA {

template <class T, CellKind kind>
class Backward {
  using A = typename Accumulator<T>::type;
  using V = Vector<A>;
  using Math = typename MathOf<A>::type;
  static constexpr int width = lanes<A>();
  static constexpr int gate_count = kind == CellKind::lstm ? 4 : 3;
  static constexpr bool is_lstm = kind == CellKind::lstm;

 public:
  Backward(const BackwardParams& params, const Threads& threads, void* workspace)
      : p_(params), z_(params.sizes), at_{params.sizes, params.boundaries}, threads_(threads) {
    depth_ = gate_count * static_cast<int64_t>(z_.hidden);
    hidden_pad_ = round_up(z_.hidden, width);
    out_pad_ = round_up(z_.hidden_out, width);
    const double rows = static_cast<double>(depth_) * z_.hidden_out * z_.directions;
    const int64_t vectors = out_pad_ / width;
    grid_ = choose_grid(threads.count, z_, max_rows, 2 * rows * z_.batch, rows * sizeof(A), vectors * z_.directions);
    // Blocks as wide as they can be while there is one for every worker.
    columns_ = static_cast<int>(larger(1, smaller(max_columns, vectors * z_.directions / grid_.unit_groups)));
    blocks_ = (vectors + columns_ - 1) / columns_;
    hidden_blocks_ = z_.projection ? (hidden_pad_ / width + columns_ - 1) / columns_ : 0;
    Arena arena(workspace);
    const int64_t states = z_.directions * z_.batch;
    barriers_ = arena.take<Barrier>(grid_.batch_groups);
    for (A*& g : grad_product_) g = arena.take<A>(states * depth_);
    carry_ = arena.take<A>(states * out_pad_);
    grad_c_ = arena.take<A>(is_lstm ? states * hidden_pad_ : 0);
    const bool resets = params.boundaries.reset_mask;
    reset_h_ = arena.take<A>(resets ? states * out_pad_ : 0);
    reset_c_ = arena.take<A>(resets && is_lstm ? states * hidden_pad_ : 0);
    grad_h_ = arena.take<A>(z_.projection ? states * out_pad_ : 0);
    for (int d = 0; d < z_.directions; ++d) {
      packed_[d] = arena.take<A>(blocks_ * columns_ * width * depth_);
      packed_hr_[d] = arena.take<A>(hidden_blocks_ * columns_ * width * z_.hidden_out);
    }
    workspace_bytes_ = arena.used();
  }

  size_t workspace_bytes() const { return workspace_bytes_; }

  void run() {
    for (int64_t g = 0; g < grid_.batch_groups; ++g) barriers_[g] = Barrier();
    auto pack = [this](int64_t item) { pack_item(item); };
    run_items(threads_, grid_.workers() > 1, z_.directions * (blocks_ + hidden_blocks_), pack);
    for (int d = 0; d < z_.directions; ++d)
      for (int64_t n = 0; n < z_.batch; ++n) enter_row(d, n);
    auto round = [this](int64_t r, int64_t worker) { run_round(r, worker); };
    run_in_rounds(threads_, grid_, barriers_, (z_.steps + 1) * phases(), round);
    for (int d = 0; d < z_.directions; ++d)
      for (int64_t n = 0; n < z_.batch; ++n) leave_row(d, n);
  }

 private:
  int phases() const { return z_.projection ? 2 : 1; }
  int64_t row(int d, int64_t n) const { return d * z_.batch + n; }
  int64_t place(int64_t t, int d, int64_t n) const { return (t * z_.batch + n) * z_.directions + d; }
  int count(int64_t u, int64_t size) const { return static_cast<int>(smaller(width, size - u)); }
  // The gradients that the product of round k reads, and those that round k leaves for the next.
  A* product_in(int64_t k, int d, int64_t n) const { return grad_product_[k % 2] + row(d, n) * depth_; }
  A* product_out(int64_t k, int d, int64_t n) const { return grad_product_[(k + 1) % 2] + row(d, n) * depth_; }
  // Element u at `place` of a tensor with `size` elements there that may be missing: zeros then.
  static V tensor_at(const void* tensor, int64_t place, int64_t size, int64_t u, int count) {
    return tensor ? load(static_cast<const T*>(tensor) + place * size + u, count) : V{};
  }

  void pack_item(int64_t item) {
    const int d = static_cast<int>(item / (blocks_ + hidden_blocks_));
    const int64_t block = item % (blocks_ + hidden_blocks_), outputs = columns_ * width;
    if (block < blocks_) {
      pack_straight(static_cast<const T*>(p_.weights[d].weight_hh), z_.hidden_out, depth_, block * outputs, columns_,
                    packed_[d] + block * outputs * depth_);
    } else {
      const int64_t first = (block - blocks_) * outputs;
      pack_straight(static_cast<const T*>(p_.weights[d].weight_hr), z_.hidden, z_.hidden_out, first, columns_,
                    packed_hr_[d] + first * z_.hidden_out);
    }
  }

  void enter_row(int d, int64_t n) {
    for (int64_t u = 0; u < out_pad_; u += width) {
      store(tensor_at(p_.grad_h_n, row(d, n), z_.hidden_out, u, count(u, z_.hidden_out)), carry_ + row(d, n) * out_pad_ + u);
      if (at_.boundaries.reset_mask) store(V{}, reset_h_ + row(d, n) * out_pad_ + u);
    }
    if (!is_lstm) return;
    for (int64_t u = 0; u < hidden_pad_; u += width) {
      store(tensor_at(p_.grad_c_n, row(d, n), z_.hidden, u, count(u, z_.hidden)), grad_c_ + row(d, n) * hidden_pad_ + u);
      if (at_.boundaries.reset_mask) store(V{}, reset_c_ + row(d, n) * hidden_pad_ + u);
    }
  }

  void leave_row(int d, int64_t n) {
    copy_out(carry_, out_pad_, p_.grad_h_0, z_.hidden_out, row(d, n));
    if (is_lstm) copy_out(grad_c_, hidden_pad_, p_.grad_c_0, z_.hidden, row(d, n));
    if (!at_.boundaries.reset_mask) return;
    copy_out(reset_h_, out_pad_, p_.grad_reset_h, z_.hidden_out, row(d, n));
    if (is_lstm) copy_out(reset_c_, hidden_pad_, p_.grad_reset_c, z_.hidden, row(d, n));
  }

  void copy_out(const A* from, int64_t padded, void* to, int64_t size, int64_t row) {
    for (int64_t u = 0; u < size; u += width)
      store(load(from + row * padded + u), static_cast<T*>(to) + row * size + u, count(u, size));
  }

  void run_round(int64_t round, int64_t worker) {
    const int64_t k = round / phases();
    const bool after_projection = round % phases() == 1;
    const auto visit = [&](int d, int64_t n, int rows, int64_t block) {
      if (after_projection) {
        cell_tile(k, d, n, rows, block);
      } else {
        state_tile(k, d, n, rows, block);
      }
    };
    for_each_tile(grid_, z_, after_projection ? hidden_blocks_ : blocks_, max_rows, worker, visit);
  }

  // The gradient of the hidden state that left the step of round k, from the recurrent product of the round before.
  void state_tile(int64_t k, int d, int64_t n, int rows, int64_t block) {
    alignas(64) A product[max_rows * max_columns * width];
    const int64_t outputs = columns_ * width, first = block * outputs;
    if (k > 0) multiply_tile(rows, columns_, product_in(k, d, n), depth_, packed_[d] + first * depth_, depth_, product);
    for (int r = 0; r < rows; ++r)
      for (int64_t u = first; u < smaller(first + outputs, out_pad_); u += width) {
        A* carry = carry_ + row(d, n + r) * out_pad_ + u;
        V grad = load(carry);
        if (k > 0) grad += load(product + r * outputs + (u - first));
        grad = cross_edge(k, d, n + r, grad, reset_h_, out_pad_, u);
        const int64_t t = at_.step(d, z_.steps - 1 - k);
        const bool runs = k < z_.steps && at_.active(t, n + r);
        store(runs ? V{} : grad, carry);
        if (z_.projection) {
          leave_hidden(k, t, d, n + r, u, grad, runs);
        } else {
          compute_units(k, t, d, n + r, u, grad, runs);
        }
      }
  }

  // With a projection, the gradient of the projected state is a result of its own and the next product's operand.
  void leave_hidden(int64_t k, int64_t t, int d, int64_t n, int64_t u, V grad, bool runs) {
    if (k == z_.steps) return;
    const int units = count(u, z_.hidden_out);
    grad = runs ? grad + tensor_at(p_.grad_output, place(t, d, n), z_.hidden_out, u, units) : V{};
    store(grad, grad_h_ + row(d, n) * out_pad_ + u);
    store(grad, static_cast<T*>(p_.grad_h) + place(t, d, n) * z_.hidden_out + u, units);
  }

  void cell_tile(int64_t k, int d, int64_t n, int rows, int64_t block) {
    alignas(64) A product[max_rows * max_columns * width];
    const int64_t outputs = columns_ * width, first = block * outputs;
    if (k < z_.steps)
      multiply_tile(rows, columns_, grad_h_ + row(d, n) * out_pad_, out_pad_, packed_hr_[d] + first * z_.hidden_out, z_.hidden_out, product);
    const int64_t t = at_.step(d, z_.steps - 1 - k);
    for (int r = 0; r < rows; ++r) {
      const bool runs = k < z_.steps && at_.active(t, n + r);
      for (int64_t u = first; u < smaller(first + outputs, hidden_pad_); u += width)
        compute_units(k, t, d, n + r, u, runs ? load(product + r * outputs + (u - first)) : V{}, runs);
    }
  }

  // `grad` of the state between the step of round k and the step of the round before, after the edge between them.
  HSM_INLINE V cross_edge(int64_t k, int d, int64_t n, V grad, A* grad_reset, int64_t padded, int64_t u) {
    if (k == 0 || !(at_.boundaries.reset_mask || at_.boundaries.detach_mask)) return grad;
    const int64_t edge = Sequences::entered_edge(d, at_.step(d, z_.steps - k));
    if (at_.resets(edge, n)) {
      A* sum = grad_reset + row(d, n) * padded + u;
      store(load(sum) + grad, sum);
      return V{};
    }
    return at_.detaches(edge, n) ? V{} : grad;
  }

  // Through the cell of one step. grad_m: gradient of the hidden state (before its projection) from everything later; the
  // gradient of this step's output is added here unless the projection already did.
  void compute_units(int64_t k, int64_t t, int d, int64_t n, int64_t u, V grad_m, bool runs) {
    V grad_c{};
    A* grad_c_at = is_lstm ? grad_c_ + row(d, n) * hidden_pad_ + u : nullptr;
    if (is_lstm) {
      grad_c = cross_edge(k, d, n, load(grad_c_at), reset_c_, hidden_pad_, u);
      store(grad_c, grad_c_at);
    }
    if (k == z_.steps) return;
    const int units = count(u, z_.hidden);
    V grad_pre[4] = {};
    if (runs) {
      if (!z_.projection) grad_m += tensor_at(p_.grad_output, place(t, d, n), z_.hidden_out, u, units);
      if constexpr (is_lstm) {
        store(lstm_units(t, d, n, u, grad_m, grad_c, grad_pre), grad_c_at);
      } else {
        store(gru_units(t, d, n, u, grad_m, grad_pre), carry_ + row(d, n) * out_pad_ + u);
      }
    }
    T* grad_gates = static_cast<T*>(p_.grad_gates) + place(t, d, n) * 4 * z_.hidden + u;
    for (int g = 0; g < 4; ++g) store(grad_pre[g], grad_gates + g * z_.hidden, units);
    // The hidden halves, as the rows of W_hh stand: all four for LSTM; r, z and the hidden half of n for GRU.
    A* operand = product_out(k, d, n) + u;
    for (int g = 0; g < gate_count; ++g) store(grad_pre[is_lstm || g < 2 ? g : 3], operand + g * z_.hidden, units);
  }

  V lstm_units(int64_t t, int d, int64_t n, int64_t u, V grad_m, V grad_c, V (&grad_pre)[4]) {
    const int units = count(u, z_.hidden);
    grad_c += tensor_at(p_.grad_c_states, place(t, d, n), z_.hidden, u, units);
    const T* gates = static_cast<const T*>(p_.gates) + place(t, d, n) * 4 * z_.hidden + u;
    const LstmGates<V> active = {load(gates, units), load(gates + z_.hidden, units), load(gates + 2 * z_.hidden, units),
                                 load(gates + 3 * z_.hidden, units)};
    const V c = tensor_at(p_.c_states, place(t, d, n), z_.hidden, u, units);
    const V c_prev = entered_state(p_.c_states, p_.c_0, at_.boundaries.reset_c, t, d, n, u, units);
    V grad_c_prev;
    lstm_cell_backward<Math>(active, c_prev, c, grad_m, grad_c, grad_pre, grad_c_prev);
    return grad_c_prev;
  }

  V gru_units(int64_t t, int d, int64_t n, int64_t u, V grad_h, V (&grad_pre)[4]) {
    const int units = count(u, z_.hidden);
    const T* gates = static_cast<const T*>(p_.gates) + place(t, d, n) * 4 * z_.hidden + u;
    const GruGates<V> active = {load(gates, units), load(gates + z_.hidden, units), load(gates + 2 * z_.hidden, units),
                                load(gates + 3 * z_.hidden, units)};
    const V h_prev = entered_state(p_.output, p_.h_0, at_.boundaries.reset_h, t, d, n, u, units);
    V direct;
    gru_cell_backward(active, h_prev, grad_h, grad_pre, direct);
    return direct;
  }

  // The state that entered step t: that of the step before, the initial one, or the one it was reset to.
  V entered_state(const void* states, const void* initial, const void* reset, int64_t t, int d, int64_t n, int64_t u, int units) {
    const bool first = at_.is_first(d, t, n);
    if (!(first && d == 1) && at_.resets(Sequences::entered_edge(d, t), n))
      return tensor_at(reset, row(d, n), z_.hidden, u, units);
    if (first) return tensor_at(initial, row(d, n), z_.hidden, u, units);
    return tensor_at(states, place(d ? t + 1 : t - 1, d, n), z_.hidden, u, units);
  }

  const BackwardParams& p_;
  const Sizes& z_;
  Sequences at_;
  const Threads& threads_;
  Grid grid_;
  Barrier* barriers_;
  int64_t depth_;                   // G * H: what the recurrent product sums over
  int64_t hidden_pad_, out_pad_;    // sizes in whole vectors
  int columns_;                     // vectors in a block of outputs
  int64_t blocks_, hidden_blocks_;  // of hidden (or projected) units; of hidden units behind a projection
  A* grad_product_[2];              // (D, N, G * H): gradients of the hidden halves, even and odd rounds
  A* carry_;                        // (D, N, out_pad): what reaches h beside the product
  A* grad_c_;                       // (D, N, hidden_pad)
  A* reset_h_;                      // (D, N, out_pad)
  A* reset_c_;                      // (D, N, hidden_pad)
  A* grad_h_;                       // (D, N, out_pad): with a projection, of the step's h
  A* packed_[max_directions];
  A* packed_hr_[max_directions];
  size_t workspace_bytes_;
};

}  // namespace HSM_ISA
}  // namespace cpu
}  // namespace hsm
