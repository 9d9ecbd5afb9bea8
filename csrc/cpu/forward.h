// The forward recurrence of one layer. Every step is a product (states @ W_hh^T) whose tiles go through the cell equations
// while they are in cache; with a projection a second product follows.
#pragma once

#include "common/cell_math.h"
#include "cpu/matrix_tile.h"
#include "cpu/schedule.h"
#include "cpu/vector_math.h"

namespace hsm {
namespace cpu {
namespace HSM_ISA {

template <class T, CellKind kind>
class Forward {
  using A = typename Accumulator<T>::type;
  using V = Vector<A>;
  using Math = typename MathOf<A>::type;
  static constexpr int width = lanes<A>();
  static constexpr int gate_count = kind == CellKind::lstm ? 4 : 3;
  static constexpr bool is_lstm = kind == CellKind::lstm;

 public:
  Forward(const ForwardParams& params, const Threads& threads, void* workspace)
      : p_(params), z_(params.sizes), at_{params.sizes, params.boundaries}, threads_(threads) {
    hidden_pad_ = round_up(z_.hidden, width);
    out_pad_ = round_up(z_.hidden_out, width);
    blocks_ = hidden_pad_ / width;
    out_blocks_ = z_.projection ? (out_pad_ / width + max_columns - 1) / max_columns : 0;
    const double rows = gate_count * static_cast<double>(z_.hidden) * z_.hidden_out * z_.directions;
    packs_ = !p_.hidden_gates && !p_.input;
    grid_ = p_.hidden_gates ? Grid{1, 1}
                            : choose_grid(threads.count, z_, max_rows, 2 * rows * z_.batch, rows * sizeof(A), blocks_ * z_.directions);
    Arena arena(workspace);
    const int64_t states = z_.directions * z_.batch;
    barriers_ = arena.take<Barrier>(grid_.batch_groups);
    bias_ = arena.take<A>(z_.directions * 4 * hidden_pad_);
    for (A*& h : h_) h = arena.take<A>(states * out_pad_);
    c_ = arena.take<A>(is_lstm ? states * hidden_pad_ : 0);
    m_ = arena.take<A>(z_.projection ? states * hidden_pad_ : 0);
    for (int d = 0; d < z_.directions; ++d) {
      packed_[d] = arena.take<A>(packs_ ? hidden_pad_ * gate_count * z_.hidden_out : 0);
      packed_hr_[d] = arena.take<A>(z_.projection ? out_blocks_ * max_columns * width * z_.hidden : 0);
    }
    input_ = arena.take<A>(p_.input ? z_.batch * p_.input_size : 0);
    workspace_bytes_ = arena.used();
  }

  size_t workspace_bytes() const { return workspace_bytes_; }

  void run() {
    for (int64_t g = 0; g < grid_.batch_groups; ++g) barriers_[g] = Barrier();
    const bool parallel = grid_.workers() > 1;
    auto pack = [this](int64_t item) { pack_item(item); };
    run_items(threads_, parallel, z_.directions * (blocks_ + out_blocks_), pack);
    auto enter = [this](int64_t row) { enter_row(static_cast<int>(row / z_.batch), row % z_.batch); };
    run_items(threads_, false, z_.directions * z_.batch, enter);
    for (int64_t k = 0; p_.input && k < z_.batch * p_.input_size; k += width) {
      const int elements = count(k, z_.batch * p_.input_size);
      store(load(static_cast<const T*>(p_.input) + k, elements), input_ + k, elements);
    }
    auto round = [this](int64_t r, int64_t worker) { run_round(r, worker); };
    run_in_rounds(threads_, grid_, barriers_, z_.steps * phases(), round);
    for (int d = 0; d < z_.directions; ++d)
      for (int64_t n = 0; n < z_.batch; ++n) leave_row(d, n);
  }

 private:
  int phases() const { return z_.projection ? 2 : 1; }
  int64_t row(int d, int64_t n) const { return d * z_.batch + n; }
  int count(int64_t u, int64_t size) const { return static_cast<int>(smaller(width, size - u)); }
  A* h_now(int64_t k, int d, int64_t n) const { return h_[k % 2] + row(d, n) * out_pad_; }
  A* h_next(int64_t k, int d, int64_t n) const { return h_[(k + 1) % 2] + row(d, n) * out_pad_; }
  T* output(int64_t t, int d, int64_t n) const {
    return static_cast<T*>(p_.output) + ((t * z_.batch + n) * z_.directions + d) * z_.hidden_out;
  }
  // Element u of row (d, n) of a (D, N, size) tensor that may be missing: zeros then.
  static V state_at(const void* tensor, int64_t row, int64_t size, int64_t u, int count) {
    return tensor ? load(static_cast<const T*>(tensor) + row * size + u, count) : V{};
  }

  void pack_item(int64_t item) {
    const int d = static_cast<int>(item / (blocks_ + out_blocks_));
    const int64_t block = item % (blocks_ + out_blocks_);
    const Weights& w = p_.weights[d];
    if (block >= blocks_) return pack_projection(d, block - blocks_);
    const int64_t u = block * width;
    for (int g = 0; g < gate_count && packs_; ++g)
      pack_transposed(static_cast<const T*>(w.weight_hh), z_.hidden_out, g * static_cast<int64_t>(z_.hidden) + u, count(u, z_.hidden),
                      gate_count * width, packed_[d] + u * gate_count * z_.hidden_out + g * width);
    pack_bias(d, u);
  }

  void pack_projection(int d, int64_t block) {
    constexpr int outputs = max_columns * width;
    for (int v = 0; v < max_columns; ++v) {
      const int64_t u = block * outputs + v * width;
      pack_transposed(static_cast<const T*>(p_.weights[d].weight_hr), z_.hidden, u, static_cast<int>(larger(0, count(u, z_.hidden_out))),
                      outputs, packed_hr_[d] + block * outputs * z_.hidden + v * width);
    }
  }

  // Rows: LSTM the summed biases of its gates; GRU r and z summed, then n's input and hidden bias apart.
  void pack_bias(int d, int64_t u) {
    const T* ih = static_cast<const T*>(p_.weights[d].bias_ih);
    const T* hh = static_cast<const T*>(p_.weights[d].bias_hh);
    for (int g = 0; g < 4; ++g) {
      const int64_t at = (is_lstm ? g : smaller(g, 2)) * static_cast<int64_t>(z_.hidden) + u;
      const bool input_half = is_lstm || g != 3, hidden_half = is_lstm || g != 2;
      V bias{};
      if (ih && input_half) bias += load(ih + at, count(u, z_.hidden));
      if (hh && hidden_half) bias += load(hh + at, count(u, z_.hidden));
      store(bias, bias_ + (d * 4 + g) * hidden_pad_ + u);
    }
  }

  // The state that enters the first step.
  void enter_row(int d, int64_t n) {
    const bool reset = d == 0 && at_.resets(0, n);
    const void* h = reset ? at_.boundaries.reset_h : p_.h_0;
    const void* c = reset ? at_.boundaries.reset_c : p_.c_0;
    for (int64_t u = 0; u < out_pad_; u += width)
      store(state_at(h, row(d, n), z_.hidden_out, u, count(u, z_.hidden_out)), h_now(0, d, n) + u);
    if (!is_lstm) return;
    for (int64_t u = 0; u < hidden_pad_; u += width)
      store(state_at(c, row(d, n), z_.hidden, u, count(u, z_.hidden)), c_ + row(d, n) * hidden_pad_ + u);
  }

  void leave_row(int d, int64_t n) {
    for (int64_t u = 0; u < z_.hidden_out; u += width)
      store(load(h_now(z_.steps, d, n) + u), static_cast<T*>(p_.h_n) + row(d, n) * z_.hidden_out + u, count(u, z_.hidden_out));
    if (!is_lstm) return;
    for (int64_t u = 0; u < z_.hidden; u += width)
      store(load(c_ + row(d, n) * hidden_pad_ + u), static_cast<T*>(p_.c_n) + row(d, n) * z_.hidden + u, count(u, z_.hidden));
  }

  void run_round(int64_t round, int64_t worker) {
    const int64_t k = round / phases();
    const bool projecting = round % phases() == 1;
    const auto visit = [&](int d, int64_t n, int rows, int64_t block) {
      if (projecting) {
        project_tile(k, d, n, rows, block);
      } else {
        compute_tile(k, d, n, rows, block);
      }
    };
    for_each_tile(grid_, z_, projecting ? out_blocks_ : blocks_, max_rows, worker, visit);
  }

  void compute_tile(int64_t k, int d, int64_t n, int rows, int64_t block) {
    alignas(64) A product[max_rows * gate_count * width];
    const int64_t u = block * width;
    if (p_.input) {
      multiply_step(d, n, rows, u, product);
    } else if (p_.hidden_gates) {
      load_product(d, n, rows, u, product);
    } else {
      multiply_block<A, gate_count>(rows, h_now(k, d, n), out_pad_, packed_[d] + u * gate_count * z_.hidden_out, z_.hidden_out, product);
    }
    const int64_t t = at_.step(d, k);
    for (int r = 0; r < rows; ++r) compute_units(k, t, d, n + r, u, product + r * gate_count * width);
  }

  // Both products of the only step, from the weights as they are.
  void multiply_step(int d, int64_t n, int rows, int64_t u, A* product) {
    const T* ih = static_cast<const T*>(p_.weights[d].weight_ih);
    const T* hh = static_cast<const T*>(p_.weights[d].weight_hh);
    const int units = count(u, z_.hidden);
    for (int g = 0; g < gate_count; ++g)
      for (int r = 0; r < rows; ++r) {
        const int64_t row = g * static_cast<int64_t>(z_.hidden) + u;
        T* gates = static_cast<T*>(p_.gates) + ((n + r) * z_.directions + d) * p_.gate_columns + row;
        A* out = product + (r * gate_count + g) * width;
        store(V{}, out);
        multiply_unpacked(input_ + (n + r) * p_.input_size, ih + row * p_.input_size, p_.input_size, units, out);
        store(load(out), gates, units);
        multiply_unpacked(h_now(0, d, n + r), hh + row * z_.hidden_out, z_.hidden_out, units, out);
      }
  }

  void load_product(int d, int64_t n, int rows, int64_t u, A* product) {
    for (int r = 0; r < rows; ++r)
      for (int g = 0; g < gate_count; ++g) {
        const T* from = static_cast<const T*>(p_.hidden_gates) + (row(d, n + r) * gate_count + g) * z_.hidden + u;
        store(load(from, count(u, z_.hidden)), product + (r * gate_count + g) * width);
      }
  }

  void compute_units(int64_t k, int64_t t, int d, int64_t n, int64_t u, const A* product) {
    const int units = count(u, z_.hidden);
    const int64_t place = (t * z_.batch + n) * z_.directions + d;
    T* gates = static_cast<T*>(p_.gates) + place * p_.gate_columns + u;
    T* c_state = is_lstm && p_.c_states ? static_cast<T*>(p_.c_states) + place * z_.hidden + u : nullptr;
    if (!at_.active(t, n)) return skip_units(k, t, d, n, u, gates, c_state);
    V m;
    if constexpr (is_lstm) {
      m = lstm_units(t, d, n, u, product, gates, c_state);
    } else {
      m = gru_units(k, d, n, u, product, gates);
    }
    if (z_.projection) {
      store(m, m_ + row(d, n) * hidden_pad_ + u);
    } else {
      emit_hidden(k, t, d, n, u, units, m);
    }
  }

  V lstm_units(int64_t t, int d, int64_t n, int64_t u, const A* product, T* gates, T* c_state) {
    const int units = count(u, z_.hidden);
    V pre[4];
    for (int g = 0; g < 4; ++g)
      pre[g] = load(gates + g * z_.hidden, units) + load(product + g * width) + load(bias_ + (d * 4 + g) * hidden_pad_ + u);
    A* c_at = c_ + row(d, n) * hidden_pad_ + u;
    LstmGates<V> active;
    V c, m;
    lstm_cell_forward<Math>(pre, load(c_at), active, c, m);
    if (p_.save_gates) {
      const V values[4] = {active.i, active.f, active.g, active.o};
      for (int g = 0; g < 4; ++g) store(values[g], gates + g * z_.hidden, units);
    }
    if (c_state) store(c, c_state, units);
    const bool reset = at_.resets_after(d, t, n);
    store(reset ? state_at(at_.boundaries.reset_c, row(d, n), z_.hidden, u, units) : c, c_at);
    return m;
  }

  V gru_units(int64_t k, int d, int64_t n, int64_t u, const A* product, T* gates) {
    const int units = count(u, z_.hidden);
    const A* bias = bias_ + d * 4 * hidden_pad_ + u;
    V x[3], h[3];
    for (int g = 0; g < 3; ++g) {
      x[g] = load(gates + g * z_.hidden, units) + load(bias + g * hidden_pad_);
      h[g] = load(product + g * width);
    }
    h[2] += load(bias + 3 * hidden_pad_);
    GruGates<V> active;
    V h_next;
    gru_cell_forward<Math>(x, h, load(h_now(k, d, n) + u), active, h_next);
    if (p_.save_gates) {
      const V values[4] = {active.r, active.z, active.n, active.h_n};
      for (int g = 0; g < 4; ++g) store(values[g], gates + g * z_.hidden, units);
    }
    return h_next;
  }

  // Writes the hidden state of a step, and what the next step starts from. The next step gets what was written, rounded as
  // it was, so that a sequence run in two calls gives the same bits.
  HSM_INLINE void emit_hidden(int64_t k, int64_t t, int d, int64_t n, int64_t u, int units, V h) {
    T* out = output(t, d, n) + u;
    store(h, out, units);
    if (at_.resets_after(d, t, n)) {
      h = state_at(at_.boundaries.reset_h, row(d, n), z_.hidden_out, u, units);
    } else if (sizeof(T) != sizeof(A)) {
      h = load(out, units);
    }
    store(h, h_next(k, d, n) + u);
  }

  // A step behind the end: zero results, and the state waits.
  void skip_units(int64_t k, int64_t t, int d, int64_t n, int64_t u, T* gates, T* c_state) {
    const int units = count(u, z_.hidden);
    if (p_.save_gates)
      for (int g = 0; g < 4; ++g) store(V{}, gates + g * z_.hidden, units);
    if (c_state) store(V{}, c_state, units);
    if (z_.projection) {
      store(V{}, m_ + row(d, n) * hidden_pad_ + u);
    } else {
      hold_hidden(k, t, d, n, u, units);
    }
  }

  void hold_hidden(int64_t k, int64_t t, int d, int64_t n, int64_t u, int units) {
    store(V{}, output(t, d, n) + u, units);
    store(load(h_now(k, d, n) + u), h_next(k, d, n) + u);
  }

  void project_tile(int64_t k, int d, int64_t n, int rows, int64_t block) {
    constexpr int outputs = max_columns * width;
    alignas(64) A product[max_rows * outputs];
    multiply_block<A, max_columns>(rows, m_ + row(d, n) * hidden_pad_, hidden_pad_, packed_hr_[d] + block * outputs * z_.hidden, z_.hidden, product);
    const int64_t t = at_.step(d, k);
    for (int r = 0; r < rows; ++r)
      for (int64_t u = block * outputs; u < smaller((block + 1) * outputs, out_pad_); u += width) {
        const int units = count(u, z_.hidden_out);
        if (at_.active(t, n + r)) {
          emit_hidden(k, t, d, n + r, u, units, load(product + r * outputs + (u - block * outputs)));
        } else {
          hold_hidden(k, t, d, n + r, u, units);
        }
      }
  }

  const ForwardParams& p_;
  const Sizes& z_;
  Sequences at_;
  const Threads& threads_;
  Grid grid_;
  Barrier* barriers_;
  int64_t hidden_pad_, out_pad_;  // sizes in whole vectors
  int64_t blocks_, out_blocks_;   // of hidden units, one vector each; of projected units, max_columns vectors each
  A* bias_;                       // (D, 4, hidden_pad)
  A* h_[2];                       // (D, N, out_pad): what enters even and odd steps
  A* c_;                          // (D, N, hidden_pad)
  A* m_;                          // (D, N, hidden_pad): hidden state before the projection
  bool packs_;                    // whether the recurrent weights are packed
  A* input_;                      // (N, I), where the kernel computes the input's product
  A* packed_[max_directions];
  A* packed_hr_[max_directions];
  size_t workspace_bytes_;
};

}  // namespace HSM_ISA
}  // namespace cpu
}  // namespace hsm
