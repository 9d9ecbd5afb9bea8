// The backward recurrence of one layer: the gradients of all gate pre-activations. Weight and input gradients are products
// over many steps that the caller does between two runs of rounds.
//
// Each slot of the schedule goes through its segments from the last step of their direction to the first. A round first takes the
// gate gradients of the round before back through W_hh, which gives the gradient of the state between two steps. Where a segment
// has been finished, that gradient goes to the initial state, to the reset state, or nowhere, and the next segment starts with
// what reaches its end from outside. Then the round goes through the cell of its own step. One more round finishes what the last
// one did.
#pragma once

#include "common/cell_math.h"
#include "cpu/bias.h"
#include "cpu/matrix_tile.h"
#include "cpu/schedule.h"
#include "cpu/vector_math.h"

namespace hsm {
namespace cpu {
namespace HSM_ISA {

template <class T, CellKind kind>
class Backward {
  using A = typename Accumulator<T>::type;
  using E = typename Operand<T>::type;  // of weights and of the gradients that they take back
  using V = Vector<A>;
  using Math = typename MathOf<A>::type;
  static constexpr int width = lanes<A>();
  static constexpr int gate_count = kind == CellKind::lstm ? 4 : 3;
  static constexpr bool is_lstm = kind == CellKind::lstm;

 public:
  Backward(const BackwardParams& params, const Threads& threads, void* workspace)
      : p_(params), z_(params.sizes), at_{params.boundaries, params.sizes.steps}, threads_(threads) {
    gates_ = gate_count * static_cast<int64_t>(z_.hidden);
    hh_depth_ = filled_depth<E>(gates_);
    hr_depth_ = filled_depth<E>(z_.hidden_out);
    hidden_pad_ = round_up(z_.hidden, width);
    out_pad_ = round_up(z_.hidden_out, width);
    h_stride_ = larger(out_pad_, hr_depth_);
    const double rows = static_cast<double>(gates_) * z_.hidden_out * z_.directions;
    const int64_t vectors = out_pad_ / width;
    grid_ = choose_grid(threads.count, p_.schedule, enough_rows, 2 * rows * p_.schedule.slots, rows * sizeof(E), vectors * z_.directions);
    // Blocks as wide as they can be while there is one for every worker.
    columns_ = static_cast<int>(larger(1, smaller(max_columns, vectors * z_.directions / grid_.unit_groups)));
    blocks_ = (vectors + columns_ - 1) / columns_;
    hidden_blocks_ = z_.projection ? (hidden_pad_ / width + columns_ - 1) / columns_ : 0;
    const int64_t lanes = Slots::rows_of_a_group(p_.schedule, grid_.batch_groups);
    rows_ = lanes * grid_.batch_groups;
    Arena arena(workspace);
    const int64_t states = z_.directions * rows_, segments = z_.directions * int64_t{p_.schedule.sequence_starts[z_.batch]};
    barriers_ = arena.take<Barrier>(grid_.batch_groups);
    claims_ = arena.take<Rounds>(grid_.workers());
    walks_ = Walks(arena, grid_, z_.directions, lanes);
    bias_ = arena.take<A>(p_.recompute ? z_.directions * 4 * hidden_pad_ : 0);
    for (E*& g : grad_product_) g = arena.take<E>(states * hh_depth_);
    direct_ = arena.take<A>(is_lstm ? 0 : states * out_pad_);
    grad_c_ = arena.take<A>(is_lstm ? states * hidden_pad_ : 0);
    reset_h_ = p_.grad_reset_h ? arena.take<A>(segments * out_pad_) : nullptr;
    reset_c_ = p_.grad_reset_c ? arena.take<A>(segments * hidden_pad_) : nullptr;
    grad_h_ = arena.take<E>(z_.projection ? states * h_stride_ : 0);
    for (int d = 0; d < z_.directions; ++d) {
      packed_[d] = arena.take<E>(blocks_ * columns_ * width * hh_depth_);
      packed_hr_[d] = arena.take<E>(hidden_blocks_ * columns_ * width * hr_depth_);
    }
    workspace_bytes_ = arena.used();
  }

  size_t workspace_bytes() const { return workspace_bytes_; }

  // Rounds [first, last) of rounds(). What they leave is in the workspace, so that they may run piece by piece, from the first on.
  void run(int64_t first, int64_t last) {
    if (first == 0) begin();
    auto round = [&](int64_t r, int64_t worker) { run_round(first * phases() + r, worker); };
    run_in_rounds(threads_, grid_, barriers_, claims_, (last - first) * phases(), round);
    auto sum = [this](int64_t n) { sum_resets(n); };
    if (last == rounds() && p_.grad_reset_h) run_items(threads_, grid_.workers() > 1, z_.batch, sum);
  }

 private:
  int64_t rounds() const { return p_.schedule.rounds + 1; }
  int phases() const { return z_.projection ? 2 : 1; }

  void begin() {
    auto pack = [this](int64_t item) { pack_item(item); };
    run_items(threads_, grid_.workers() > 1, z_.directions * (blocks_ + hidden_blocks_), pack);
    for (int d = 0; d < z_.directions; ++d)
      for (int64_t u = 0; p_.recompute && u < hidden_pad_; u += width)
        pack_bias<T, kind>(p_.weights[d], z_.hidden, u, bias_ + (d * hidden_pad_ + u) * 4);
    for (int64_t row = 0; row < z_.directions * rows_; ++row) {
      for (E* operand : grad_product_) fill_up(operand + row * hh_depth_, gates_, hh_depth_);
      if (z_.projection) fill_up(grad_h_ + row * h_stride_, z_.hidden_out, hr_depth_);
    }
    walks_.start(p_.schedule, grid_, 0);
    auto sequence = [this](int64_t n) { begin_sequence(n); };
    run_items(threads_, false, z_.batch, sequence);
  }

  // Zeros for what a row of operands has behind its numbers in the last lane or tile.
  void fill_up(E* row, int64_t depth, int64_t whole) const { memset(row + depth, 0, (whole - depth) * sizeof(E)); }

  int64_t state(int d, int64_t n) const { return d * z_.batch + n; }
  int64_t place(int64_t t, int d, int64_t n) const { return (t * z_.batch + n) * z_.directions + d; }
  T* grad_gates_at(int64_t t, int d, int64_t n) const {
    return static_cast<T*>(p_.grad_gates[d]) + ((t - p_.first_step[d]) * z_.batch + n) * 4 * z_.hidden;
  }
  int count(int64_t u, int64_t size) const { return static_cast<int>(smaller(width, size - u)); }
  // The gradients that the product of round k reads, and those that round k leaves for the next.
  E* product_in(int64_t k, int d, int64_t row) const { return grad_product_[k % 2] + (d * rows_ + row) * hh_depth_; }
  E* product_out(int64_t k, int d, int64_t row) const { return grad_product_[(k + 1) % 2] + (d * rows_ + row) * hh_depth_; }
  E* grad_h_at(int d, int64_t row) const { return grad_h_ + (d * rows_ + row) * h_stride_; }
  // Element u at `place` of a tensor with `size` elements there that may be missing: zeros then.
  static V tensor_at(const void* tensor, int64_t place, int64_t size, int64_t u, int count) {
    return tensor ? load(static_cast<const T*>(tensor) + place * size + u, count) : V{};
  }

  void pack_item(int64_t item) {
    const int d = static_cast<int>(item / (blocks_ + hidden_blocks_));
    const int64_t block = item % (blocks_ + hidden_blocks_), outputs = columns_ * width;
    if (block < blocks_) {
      pack_straight(static_cast<const T*>(p_.weights[d].weight_hh), z_.hidden_out, z_.hidden_out, gates_, block * outputs, columns_,
                    packed_[d] + block * outputs * hh_depth_);
    } else {
      const int64_t first = (block - blocks_) * outputs;
      pack_straight(static_cast<const T*>(p_.weights[d].weight_hr), z_.hidden, z_.hidden, z_.hidden_out, first, columns_,
                    packed_hr_[d] + first * hr_depth_);
    }
  }

  // The gradients of a sequence's initial state are zero unless a segment brings some, and those of padded steps are zero.
  // A sequence without steps passes on what reaches its last state.
  void begin_sequence(int64_t n) {
    const bool empty = at_.length(n) <= 0;
    for (int d = 0; d < z_.directions; ++d) {
      copy_state(empty ? p_.grad_h_n : nullptr, p_.grad_h_0, d, n, z_.hidden_out);
      if (is_lstm) copy_state(empty ? p_.grad_c_n : nullptr, p_.grad_c_0, d, n, z_.hidden);
    }
    for (int64_t t = larger(at_.length(n), 0); t < z_.steps; ++t) {
      for (int d = 0; d < z_.directions; ++d) {
        memset(grad_gates_at(t, d, n), 0, 4 * z_.hidden * sizeof(T));
        if (z_.projection) memset(static_cast<T*>(p_.grad_h) + place(t, d, n) * z_.hidden_out, 0, z_.hidden_out * sizeof(T));
      }
    }
  }

  void copy_state(const void* from, void* to, int d, int64_t n, int64_t size) {
    for (int64_t u = 0; u < size; u += width)
      store(tensor_at(from, state(d, n), size, u, count(u, size)), static_cast<T*>(to) + state(d, n) * size + u, count(u, size));
  }

  // What all resets of a sequence send to its reset state, in the order of time whatever the schedule.
  void sum_resets(int64_t n) {
    for (int d = 0; d < z_.directions; ++d) {
      sum_segments(reset_h_, out_pad_, p_.grad_reset_h, d, n, z_.hidden_out);
      if (is_lstm) sum_segments(reset_c_, hidden_pad_, p_.grad_reset_c, d, n, z_.hidden);
    }
  }

  void sum_segments(const A* parts, int64_t padded, void* to, int d, int64_t n, int64_t size) {
    const int32_t* starts = p_.schedule.sequence_starts;
    for (int64_t u = 0; u < size; u += width) {
      V sum{};
      for (int64_t index = starts[n]; index < starts[n + 1]; ++index) sum += load(parts + (d * int64_t{starts[z_.batch]} + index) * padded + u);
      store(sum, static_cast<T*>(to) + state(d, n) * size + u, count(u, size));
    }
  }

  void run_round(int64_t round, int64_t worker) {
    const int64_t k = round / phases();
    const bool after_projection = round % phases() == 1;
    if (k > 0 && !after_projection) walks_.advance(worker, true);
    const int64_t blocks = after_projection ? hidden_blocks_ : blocks_;
    for_each_tile(grid_, k, share_of(grid_, z_.directions * blocks, worker), {0, walks_.active(worker)},
                  [&](int64_t item, int64_t i, int lanes) {
                    const int d = static_cast<int>(item / blocks);
                    const Walk& walk = walks_.at(worker, d);
                    if (after_projection) {
                      cell_tile(k, d, walk.lanes + i, lanes, walk.first_row + i, item % blocks);
                    } else {
                      state_tile(k, d, walk.lanes + i, lanes, walk.first_row + i, item % blocks);
                    }
                  });
  }

  // Whether anything asks for the gradient of the hidden state that entered a finished segment.
  bool wanted(int d, const Segment& segment) const {
    const Entry entry = at_.entry(d, segment);
    return entry.reset ? reset_h_ != nullptr : entry.initial && !entry.detached;
  }

  // Hands on the gradient of the state that entered a finished segment: to the initial state, to the reset state, or to nothing.
  void deliver(int d, const Segment& segment, V grad, void* grad_initial, A* resets, int64_t size, int64_t padded, int64_t u) {
    const Entry entry = at_.entry(d, segment);
    if (resets) store(entry.reset ? grad : V{}, resets + (d * int64_t{p_.schedule.sequence_starts[z_.batch]} + segment.index) * padded + u);
    if (entry.initial && !entry.reset && !entry.detached && u < size)
      store(grad, static_cast<T*>(grad_initial) + state(d, segment.sequence) * size + u, count(u, size));
  }

  // What reaches the state that leaves a segment from outside of it.
  V reaching(const void* grad_last, int d, const Lane& lane, int64_t size, int64_t u) const {
    if (!lane.runs() || u >= size || !at_.leaves(d, *lane.segment)) return V{};
    return tensor_at(grad_last, state(d, lane.segment->sequence), size, u, count(u, size));
  }

  // The gradient of the hidden state that left each lane's step, from the recurrent product of the round before.
  // `lanes` and `row`: the first lane of the tile, and its row of states.
  void state_tile(int64_t k, int d, const Lane* lanes, int lane_count, int64_t row, int64_t block) {
    alignas(64) A product[max_rows * max_columns * width];
    const int64_t outputs = columns_ * width, first = block * outputs;
    bool needed = false;
    for (int r = 0; r < lane_count; ++r) needed |= !lanes[r].starts() || (lanes[r].finished && wanted(d, *lanes[r].finished));
    if (needed) multiply_tile(lane_count, columns_, product_in(k, d, row), hh_depth_, packed_[d] + first * hh_depth_, hh_depth_, product);
    for (int r = 0; r < lane_count; ++r)
      for (int64_t u = first; u < smaller(first + outputs, out_pad_); u += width) {
        const V grad = hidden_gradient(d, lanes[r], row + r, u, needed ? load(product + r * outputs + (u - first)) : V{});
        if (!z_.projection) {
          compute_units(k, d, lanes[r], row + r, u, grad);
        } else if (lanes[r].runs()) {
          leave_hidden(d, lanes[r], row + r, u, grad);
        }
      }
  }

  V hidden_gradient(int d, const Lane& lane, int64_t row, int64_t u, V product) {
    if (!is_lstm && (!lane.starts() || lane.finished)) product += load(direct_ + (d * rows_ + row) * out_pad_ + u);
    if (!lane.starts()) return product;
    if (lane.finished) deliver(d, *lane.finished, product, p_.grad_h_0, reset_h_, z_.hidden_out, out_pad_, u);
    return reaching(p_.grad_h_n, d, lane, z_.hidden_out, u);
  }

  // With a projection, the gradient of the projected state is a result of its own and the next product's operand.
  void leave_hidden(int d, const Lane& lane, int64_t row, int64_t u, V grad) {
    const int units = count(u, z_.hidden_out);
    const int64_t at = place(lane.step(), d, lane.segment->sequence);
    grad += tensor_at(p_.grad_output, at, z_.hidden_out, u, units);
    store(grad, grad_h_at(d, row) + u, units);
    store(grad, static_cast<T*>(p_.grad_h) + at * z_.hidden_out + u, units);
  }

  void cell_tile(int64_t k, int d, const Lane* lanes, int lane_count, int64_t row, int64_t block) {
    alignas(64) A product[max_rows * max_columns * width];
    const int64_t outputs = columns_ * width, first = block * outputs;
    multiply_tile(lane_count, columns_, grad_h_at(d, row), h_stride_, packed_hr_[d] + first * hr_depth_, hr_depth_, product);
    for (int r = 0; r < lane_count; ++r)
      for (int64_t u = first; u < smaller(first + outputs, hidden_pad_); u += width)
        compute_units(k, d, lanes[r], row + r, u, load(product + r * outputs + (u - first)));
  }

  // Through the cell of one step. grad_m: gradient of the hidden state (before its projection) from everything later; the
  // gradient of this step's output is added here unless the projection already did.
  void compute_units(int64_t k, int d, const Lane& lane, int64_t row, int64_t u, V grad_m) {
    V grad_c{};
    if constexpr (is_lstm) grad_c = cell_gradient(d, lane, row, u);
    if (!lane.runs()) return;
    const int units = count(u, z_.hidden);
    const int64_t t = lane.step(), at = place(t, d, lane.segment->sequence);
    if (!z_.projection) grad_m += tensor_at(p_.grad_output, at, z_.hidden_out, u, units);
    V grad_pre[4];
    if constexpr (is_lstm) {
      store(lstm_units(t, d, lane, u, grad_m, grad_c, grad_pre), grad_c_ + (d * rows_ + row) * hidden_pad_ + u);
    } else {
      store(gru_units(t, d, lane, u, grad_m, grad_pre), direct_ + (d * rows_ + row) * out_pad_ + u);
    }
    T* grad_gates = grad_gates_at(t, d, lane.segment->sequence) + u;
#pragma GCC unroll 4
    for (int g = 0; g < 4; ++g) store(grad_pre[g], grad_gates + g * z_.hidden, units);
    // The hidden halves, as the rows of W_hh stand: all four for LSTM; r, z and the hidden half of n for GRU.
    E* operand = product_out(k, d, row) + u;
#pragma GCC unroll 4
    for (int g = 0; g < gate_count; ++g) store(grad_pre[is_lstm || g < 2 ? g : 3], operand + g * z_.hidden, units);
  }

  // The gradient of the cell state that left the lane's step, from everything later.
  V cell_gradient(int d, const Lane& lane, int64_t row, int64_t u) {
    const V grad = load(grad_c_ + (d * rows_ + row) * hidden_pad_ + u);
    if (!lane.starts()) return grad;
    if (lane.finished) deliver(d, *lane.finished, grad, p_.grad_c_0, reset_c_, z_.hidden, hidden_pad_, u);
    return reaching(p_.grad_c_n, d, lane, z_.hidden, u);
  }

  // The gates of a step, or their pre-activations.
  void load_gates(int64_t t, int d, int64_t n, int64_t u, V (&values)[4]) const {
    const T* gates = (p_.recompute ? grad_gates_at(t, d, n) : static_cast<const T*>(p_.gates) + place(t, d, n) * 4 * z_.hidden) + u;
#pragma GCC unroll 4
    for (int g = 0; g < 4; ++g) values[g] = load(gates + g * z_.hidden, count(u, z_.hidden));
    for (int g = 0; g < 4 && p_.recompute; ++g) values[g] += load(bias_ + (d * hidden_pad_ + u) * 4 + g * width);
  }

  V lstm_units(int64_t t, int d, const Lane& lane, int64_t u, V grad_m, V grad_c, V (&grad_pre)[4]) {
    const int units = count(u, z_.hidden);
    const int64_t at = place(t, d, lane.segment->sequence);
    grad_c += tensor_at(p_.grad_c_states, at, z_.hidden, u, units);
    V values[4];
    load_gates(t, d, lane.segment->sequence, u, values);
    const LstmGates<V> active = p_.recompute ? lstm_gates<Math>(values) : LstmGates<V>{values[0], values[1], values[2], values[3]};
    const V c = tensor_at(p_.c_states, at, z_.hidden, u, units);
    const V c_prev = entered_state(p_.c_states, p_.c_0, at_.boundaries.reset_c, t, d, lane, u, units);
    V grad_c_prev;
    lstm_cell_backward<Math>(active, c_prev, c, grad_m, grad_c, grad_pre, grad_c_prev);
    return grad_c_prev;
  }

  V gru_units(int64_t t, int d, const Lane& lane, int64_t u, V grad_h, V (&grad_pre)[4]) {
    V values[4];
    load_gates(t, d, lane.segment->sequence, u, values);
    const GruGates<V> active = p_.recompute ? gru_gates<Math>(values) : GruGates<V>{values[0], values[1], values[2], values[3]};
    const V h_prev = entered_state(p_.output, p_.h_0, at_.boundaries.reset_h, t, d, lane, u, count(u, z_.hidden));
    V direct;
    gru_cell_backward(active, h_prev, grad_h, grad_pre, direct);
    return direct;
  }

  // The state that entered the lane's step t: that of the step before, the initial one, or the one it was reset to.
  V entered_state(const void* states, const void* initial, const void* reset, int64_t t, int d, const Lane& lane, int64_t u, int units) {
    const int64_t n = lane.segment->sequence;
    if (lane.last()) {
      const Entry entry = at_.entry(d, *lane.segment);
      if (entry.reset) return tensor_at(reset, state(d, n), z_.hidden, u, units);
      if (entry.initial) return tensor_at(initial, state(d, n), z_.hidden, u, units);
    }
    return tensor_at(states, place(d ? t + 1 : t - 1, d, n), z_.hidden, u, units);
  }

  const BackwardParams& p_;
  const Sizes& z_;
  Sequences at_;
  const Threads& threads_;
  Grid grid_;
  Barrier* barriers_;
  Rounds* claims_;
  Walks walks_;
  int64_t rows_;                    // of states, in each direction
  int64_t gates_;                   // G * H: what the recurrent product sums over
  int64_t hh_depth_, hr_depth_;     // of the recurrent product and of the projection's, filled up
  int64_t hidden_pad_, out_pad_;    // sizes in whole vectors
  int64_t h_stride_;                // of grad_h
  int columns_;                     // vectors in a block of outputs
  int64_t blocks_, hidden_blocks_;  // of hidden (or projected) units; of hidden units behind a projection
  A* bias_;                         // (D, blocks of one vector, 4, width), where the gates are computed again
  E* grad_product_[2];              // (D, rows, hh_depth): gradients of the hidden halves, even and odd rounds
  A* direct_;                       // (D, rows, out_pad): what reaches h beside the product; GRU
  A* grad_c_;                       // (D, rows, hidden_pad); LSTM
  A* reset_h_;                      // (D, segments, out_pad): what each segment sends to the reset state, zero without a reset
  A* reset_c_;                      // (D, segments, hidden_pad); LSTM
  E* grad_h_;                       // (D, rows, h_stride): with a projection, of the step's h
  E* packed_[max_directions];
  E* packed_hr_[max_directions];
  size_t workspace_bytes_;
};

}  // namespace HSM_ISA
}  // namespace cpu
}  // namespace hsm
