// The forward recurrence of one layer. Every round is a product (states @ W_hh^T) whose tiles go through the cell equations
// while they are in cache; with a projection a second product follows. Each slot of the schedule takes one step a round. When it
// has ended a segment, it goes on with the state that enters the next one.
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
class Forward {
  using A = typename Accumulator<T>::type;
  using V = Vector<A>;
  using Math = typename MathOf<A>::type;
  static constexpr int width = lanes<A>();
  static constexpr int gate_count = kind == CellKind::lstm ? 4 : 3;
  static constexpr bool is_lstm = kind == CellKind::lstm;

 public:
  Forward(const ForwardParams& params, const Threads& threads, void* workspace)
      : p_(params), z_(params.sizes), at_{params.boundaries, params.sizes.steps}, threads_(threads) {
    hidden_pad_ = round_up(z_.hidden, width);
    out_pad_ = round_up(z_.hidden_out, width);
    blocks_ = hidden_pad_ / width;
    out_blocks_ = z_.projection ? (out_pad_ / width + max_columns - 1) / max_columns : 0;
    const double rows = gate_count * static_cast<double>(z_.hidden) * z_.hidden_out * z_.directions;
    packs_ = !p_.hidden_gates && !p_.input;
    grid_ = p_.hidden_gates ? Grid{1, 1, false}
                            : choose_grid(threads.count, p_.schedule, max_rows, 2 * rows * p_.schedule.slots, rows * sizeof(A),
                                          blocks_ * z_.directions);
    const int64_t lanes = Slots::rows_of_a_group(p_.schedule, grid_.batch_groups);
    rows_ = lanes * grid_.batch_groups;
    Arena arena(workspace);
    const int64_t states = z_.directions * rows_;
    barriers_ = arena.take<Barrier>(grid_.batch_groups);
    walks_ = Walks(arena, grid_, z_.directions, lanes);
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
    walks_.start(p_.schedule, grid_, 1);
    for (int64_t group = 0; group < grid_.batch_groups; ++group)
      for (int d = 0; d < z_.directions; ++d) enter_first(d, walks_.at(group * grid_.unit_groups, d));
    auto end = [this](int64_t n) { end_sequence(n); };
    if (at_.boundaries.lengths || z_.steps == 0) run_items(threads_, parallel, z_.batch, end);
    for (int64_t k = 0; p_.input && k < z_.batch * p_.input_size; k += width) {
      const int elements = count(k, z_.batch * p_.input_size);
      store(load(static_cast<const T*>(p_.input) + k, elements), input_ + k, elements);
    }
    auto round = [this](int64_t r, int64_t worker) { run_round(r, worker); };
    run_in_rounds(threads_, grid_, barriers_, p_.schedule.rounds * phases(), round);
  }

 private:
  int phases() const { return z_.projection ? 2 : 1; }
  int count(int64_t u, int64_t size) const { return static_cast<int>(smaller(width, size - u)); }
  A* h_now(int64_t k, int d, int64_t row) const { return h_[k % 2] + (d * rows_ + row) * out_pad_; }
  A* h_next(int64_t k, int d, int64_t row) const { return h_[(k + 1) % 2] + (d * rows_ + row) * out_pad_; }
  A* c_at(int d, int64_t row) const { return c_ + (d * rows_ + row) * hidden_pad_; }
  A* m_at(int d, int64_t row) const { return m_ + (d * rows_ + row) * hidden_pad_; }
  int64_t place(int64_t t, int d, int64_t n) const { return (t * z_.batch + n) * z_.directions + d; }
  // Elements u.. of sequence n in a (D, N, size) tensor that may be missing: zeros then.
  V state_at(const void* tensor, int d, int64_t n, int64_t size, int64_t u) const {
    return tensor ? load(static_cast<const T*>(tensor) + (d * z_.batch + n) * size + u, count(u, size)) : V{};
  }

  void pack_item(int64_t item) {
    const int d = static_cast<int>(item / (blocks_ + out_blocks_));
    const int64_t block = item % (blocks_ + out_blocks_);
    const Weights& w = p_.weights[d];
    if (block >= blocks_) return pack_projection(d, block - blocks_);
    const int64_t u = block * width;
    for (int g = 0; g < gate_count && packs_; ++g)
      pack_transposed(static_cast<const T*>(w.weight_hh), z_.hidden_out, z_.hidden_out, g * static_cast<int64_t>(z_.hidden) + u, count(u, z_.hidden),
                      gate_count * width, packed_[d] + u * gate_count * z_.hidden_out + g * width);
    pack_bias<T, kind>(w, z_.hidden, u, hidden_pad_, bias_ + d * 4 * hidden_pad_);
  }

  void pack_projection(int d, int64_t block) {
    constexpr int outputs = max_columns * width;
    for (int v = 0; v < max_columns; ++v) {
      const int64_t u = block * outputs + v * width;
      pack_transposed(static_cast<const T*>(p_.weights[d].weight_hr), z_.hidden, z_.hidden, u, static_cast<int>(larger(0, count(u, z_.hidden_out))),
                      outputs, packed_hr_[d] + block * outputs * z_.hidden + v * width);
    }
  }

  // What the slots of a group start with.
  void enter_first(int d, const Walk& walk) {
    for (int64_t i = 0; i < walk.active; ++i) {
      const Lane& lane = walk.lanes[i];
      const int64_t row = walk.first_row + i;
      for (int64_t u = 0; u < out_pad_; u += width) store(entering_h(d, lane.segment, lane.end, u), h_now(0, d, row) + u);
      for (int64_t u = 0; is_lstm && u < hidden_pad_; u += width) store(entering_c(d, lane.segment, lane.end, u), c_at(d, row) + u);
    }
  }

  // The state that enters a segment; zeros behind the slot's end.
  V entering_h(int d, const Segment* segment, const Segment* end, int64_t u) const {
    if (segment == end || u >= z_.hidden_out) return V{};
    const void* from = at_.entry(d, *segment).reset ? at_.boundaries.reset_h : p_.h_0;
    return state_at(from, d, segment->sequence, z_.hidden_out, u);
  }
  V entering_c(int d, const Segment* segment, const Segment* end, int64_t u) const {
    if (segment == end || u >= z_.hidden) return V{};
    const void* from = at_.entry(d, *segment).reset ? at_.boundaries.reset_c : p_.c_0;
    return state_at(from, d, segment->sequence, z_.hidden, u);
  }

  // Behind the end of a sequence all results are zero. One without steps leaves as it entered.
  void end_sequence(int64_t n) {
    const int64_t length = at_.length(n);
    for (int64_t t = larger(length, 0); t < z_.steps; ++t) {
      clear(p_.output, t, n, z_.hidden_out);
      if (p_.c_states) clear(p_.c_states, t, n, z_.hidden);
      if (p_.save_gates) clear(p_.gates, t, n, p_.gate_columns);
    }
    if (length > 0) return;
    for (int d = 0; d < z_.directions; ++d) {
      copy_state(p_.h_0, p_.h_n, d, n, z_.hidden_out);
      if (is_lstm) copy_state(p_.c_0, p_.c_n, d, n, z_.hidden);
    }
  }

  // Zeros for both directions of step t of sequence n in an (L, N, D, size) tensor.
  void clear(void* tensor, int64_t t, int64_t n, int64_t size) {
    memset(static_cast<T*>(tensor) + place(t, 0, n) * size, 0, z_.directions * size * sizeof(T));
  }

  void copy_state(const void* from, void* to, int d, int64_t n, int64_t size) {
    for (int64_t u = 0; u < size; u += width)
      store(state_at(from, d, n, size, u), static_cast<T*>(to) + (d * z_.batch + n) * size + u, count(u, size));
  }

  void run_round(int64_t round, int64_t worker) {
    const int64_t k = round / phases();
    const bool projecting = round % phases() == 1;
    if (k > 0 && !projecting) walks_.advance(worker, false);
    const auto visit = [&](int d, int64_t first, int lanes, int64_t block) {
      const Walk& walk = walks_.at(worker, d);
      if (projecting) {
        project_tile(k, d, walk.lanes + first, lanes, walk.first_row + first, block);
      } else {
        compute_tile(k, d, walk.lanes + first, lanes, walk.first_row + first, block);
      }
    };
    for_each_tile(grid_, z_.directions, projecting ? out_blocks_ : blocks_, max_rows, worker, walks_.active(worker), visit);
  }

  // `lanes` and `row`: the first lane of the tile, and its row of states.
  void compute_tile(int64_t k, int d, const Lane* lanes, int lane_count, int64_t row, int64_t block) {
    alignas(64) A product[max_rows * gate_count * width];
    const int64_t u = block * width;
    if (p_.input) {
      multiply_step(d, lanes, lane_count, row, u, product);
    } else if (p_.hidden_gates) {
      load_product(d, lanes, lane_count, u, product);
    } else {
      multiply_block<A, gate_count>(lane_count, h_now(k, d, row), out_pad_, 1, packed_[d] + u * gate_count * z_.hidden_out, z_.hidden_out, product);
    }
    for (int r = 0; r < lane_count; ++r) compute_units(k, d, lanes[r], row + r, u, product + r * gate_count * width);
  }

  // Both products of the only step, from the weights as they are.
  void multiply_step(int d, const Lane* lanes, int lane_count, int64_t first_row, int64_t u, A* product) {
    const T* ih = static_cast<const T*>(p_.weights[d].weight_ih);
    const T* hh = static_cast<const T*>(p_.weights[d].weight_hh);
    const int units = count(u, z_.hidden);
    for (int g = 0; g < gate_count; ++g)
      for (int r = 0; r < lane_count; ++r) {
        const int64_t n = lanes[r].segment->sequence, weight_row = g * static_cast<int64_t>(z_.hidden) + u;
        T* gates = static_cast<T*>(p_.gates) + place(0, d, n) * p_.gate_columns + weight_row;
        A* out = product + (r * gate_count + g) * width;
        store(V{}, out);
        multiply_unpacked(input_ + n * p_.input_size, ih + weight_row * p_.input_size, p_.input_size, units, out);
        store(load(out), gates, units);
        multiply_unpacked(h_now(0, d, first_row + r), hh + weight_row * z_.hidden_out, z_.hidden_out, units, out);
      }
  }

  void load_product(int d, const Lane* lanes, int lane_count, int64_t u, A* product) {
    for (int r = 0; r < lane_count; ++r)
      for (int g = 0; g < gate_count; ++g) {
        const int64_t row = d * z_.batch + lanes[r].segment->sequence;
        const T* from = static_cast<const T*>(p_.hidden_gates) + (row * gate_count + g) * z_.hidden + u;
        store(load(from, count(u, z_.hidden)), product + (r * gate_count + g) * width);
      }
  }

  void compute_units(int64_t k, int d, const Lane& lane, int64_t row, int64_t u, const A* product) {
    const int64_t t = lane.step();
    T* gates = static_cast<T*>(p_.gates) + place(t, d, lane.segment->sequence) * p_.gate_columns + u;
    V m;
    if constexpr (is_lstm) {
      m = lstm_units(t, d, lane, row, u, product, gates);
    } else {
      m = gru_units(k, d, row, u, product, gates);
    }
    if (z_.projection) {
      store(m, m_at(d, row) + u);
    } else {
      emit_hidden(k, t, d, lane, row, u, m);
    }
  }

  V lstm_units(int64_t t, int d, const Lane& lane, int64_t row, int64_t u, const A* product, T* gates) {
    const int units = count(u, z_.hidden);
    V pre[4];
    for (int g = 0; g < 4; ++g)
      pre[g] = load(gates + g * z_.hidden, units) + load(product + g * width) + load(bias_ + (d * 4 + g) * hidden_pad_ + u);
    A* state = c_at(d, row) + u;
    const LstmGates<V> active = lstm_gates<Math>(pre);
    V c, m;
    lstm_cell_forward<Math>(active, load(state), c, m);
    if (p_.save_gates) {
      const V values[4] = {active.i, active.f, active.g, active.o};
      for (int g = 0; g < 4; ++g) store(values[g], gates + g * z_.hidden, units);
    }
    const int64_t n = lane.segment->sequence;
    if (p_.c_states) store(c, static_cast<T*>(p_.c_states) + place(t, d, n) * z_.hidden + u, units);
    if (lane.last()) {
      if (at_.leaves(d, *lane.segment)) store(c, static_cast<T*>(p_.c_n) + (d * z_.batch + n) * z_.hidden + u, units);
      c = entering_c(d, lane.next(), lane.end, u);
    }
    store(c, state);
    return m;
  }

  V gru_units(int64_t k, int d, int64_t row, int64_t u, const A* product, T* gates) {
    const int units = count(u, z_.hidden);
    const A* bias = bias_ + d * 4 * hidden_pad_ + u;
    V pre[4];
    for (int g = 0; g < 3; ++g) pre[g] = load(gates + g * z_.hidden, units) + load(bias + g * hidden_pad_);
    for (int g = 0; g < 2; ++g) pre[g] += load(product + g * width);
    pre[3] = load(product + 2 * width) + load(bias + 3 * hidden_pad_);
    const GruGates<V> active = gru_gates<Math>(pre);
    if (p_.save_gates) {
      const V values[4] = {active.r, active.z, active.n, active.h_n};
      for (int g = 0; g < 4; ++g) store(values[g], gates + g * z_.hidden, units);
    }
    return gru_cell_forward(active, load(h_now(k, d, row) + u));
  }

  // Writes the hidden state of a step, and what the next step starts from. The next step gets what was written, rounded as
  // it was, so that a sequence run in two calls gives the same bits.
  HSM_INLINE void emit_hidden(int64_t k, int64_t t, int d, const Lane& lane, int64_t row, int64_t u, V h) {
    const int units = count(u, z_.hidden_out);
    const int64_t n = lane.segment->sequence;
    T* out = static_cast<T*>(p_.output) + place(t, d, n) * z_.hidden_out + u;
    store(h, out, units);
    if (lane.last()) {
      if (at_.leaves(d, *lane.segment)) store(h, static_cast<T*>(p_.h_n) + (d * z_.batch + n) * z_.hidden_out + u, units);
      h = entering_h(d, lane.next(), lane.end, u);
    } else if (sizeof(T) != sizeof(A)) {
      h = load(out, units);
    }
    store(h, h_next(k, d, row) + u);
  }

  void project_tile(int64_t k, int d, const Lane* lanes, int lane_count, int64_t row, int64_t block) {
    constexpr int outputs = max_columns * width;
    alignas(64) A product[max_rows * outputs];
    multiply_block<A, max_columns>(lane_count, m_at(d, row), hidden_pad_, 1, packed_hr_[d] + block * outputs * z_.hidden, z_.hidden,
                                   product);
    for (int r = 0; r < lane_count; ++r)
      for (int64_t u = block * outputs; u < smaller((block + 1) * outputs, out_pad_); u += width)
        emit_hidden(k, lanes[r].step(), d, lanes[r], row + r, u, load(product + r * outputs + (u - block * outputs)));
  }

  const ForwardParams& p_;
  const Sizes& z_;
  Sequences at_;
  const Threads& threads_;
  Grid grid_;
  Barrier* barriers_;
  Walks walks_;
  int64_t rows_;                  // of states, in each direction
  int64_t hidden_pad_, out_pad_;  // sizes in whole vectors
  int64_t blocks_, out_blocks_;   // of hidden units, one vector each; of projected units, max_columns vectors each
  A* bias_;                       // (D, 4, hidden_pad)
  A* h_[2];                       // (D, rows, out_pad): what enters even and odd rounds
  A* c_;                          // (D, rows, hidden_pad)
  A* m_;                          // (D, rows, hidden_pad): hidden state before the projection
  bool packs_;                    // whether the recurrent weights are packed
  A* input_;                      // (N, I), where the kernel computes the input's product
  A* packed_[max_directions];
  A* packed_hr_[max_directions];
  size_t workspace_bytes_;
};

}  // namespace HSM_ISA
}  // namespace cpu
}  // namespace hsm
