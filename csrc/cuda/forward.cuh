// What the variants of the forward pass share: a round as kernels see it, and what one unit of one sequence does in it.
#pragma once

#include "cuda/layer.cuh"

namespace hsm {
namespace cuda {

// A kernel's view of one round: step `index` in the forward direction, step L - 1 - `index` in the reverse one. `A` is Accumulator<T>.
struct ForwardRound {
  ForwardParams params;
  int64_t index;
  const void* input_product[max_directions];  // A (steps, N, G * H), from `first_step` on
  int64_t first_step[max_directions];
  void* state_product;  // A (D, N, G * H): of the state that enters the round; step variant
  void* state_h;        // T (D, N, Hout): that state
  void* state_c;        // A (D, N, H); LSTM
  void* cell_output;    // T (D, N, H): with a projection, what it takes
  void* projected;      // A (D, N, Hout): and what it gives
};

struct ForwardVisit {
  int direction;
  int64_t sequence, step;
  bool runs;   // the step is inside the sequence
  bool last;   // no other round follows
  bool reset;  // the state is replaced before it enters the next round
};

HSM_DEVICE ForwardVisit visit_of(const ForwardRound& s, int64_t index, int direction, int64_t n) {
  const Sequences sequences{s.params.boundaries, s.params.sizes.steps};
  const int64_t steps = s.params.sizes.steps, step = direction ? steps - 1 - index : index;
  // The edge to the next round's step. Behind the last round there is none, and nothing reads what would enter it.
  const bool reset = sequences.resets(direction ? step : step + 1, n);
  return {direction, n, step, step < sequences.length(n), index == steps - 1, reset};
}

// Where the states and the results of a step of one direction of a sequence begin, in units of H or Hout elements.
HSM_DEVICE int64_t state_of(const ForwardVisit& visit, const Sizes& z) { return visit.direction * z.batch + visit.sequence; }
HSM_DEVICE int64_t place_of(const ForwardVisit& visit, const Sizes& z) {
  return (visit.step * z.batch + visit.sequence) * z.directions + visit.direction;
}

// The input's product for the visited step.
template <class T>
HSM_DEVICE const Accumulator<T>* input_of(const ForwardRound& s, const ForwardVisit& visit) {
  const int d = visit.direction;
  const int64_t row = (visit.step - s.first_step[d]) * s.params.sizes.batch + visit.sequence;
  return static_cast<const Accumulator<T>*>(s.input_product[d]) + row * gate_columns(s.params.sizes);
}

// One unit through the cell, from its pre-activations and the `h` and `c` that entered the step: writes the results other than those of h, makes
// `c` what enters the next round, and returns the unit's new h, before a projection. `pre` is looked at only where the step runs.
template <class T, CellKind kind>
HSM_DEVICE Accumulator<T> forward_unit(const ForwardRound& s, const ForwardVisit& visit, int unit, const Accumulator<T> (&pre)[4],
                                       Accumulator<T> h, Accumulator<T>& c, Accumulator<T> reset_c) {
  using A = Accumulator<T>;
  const ForwardParams& p = s.params;
  const Sizes& z = p.sizes;
  const int64_t place = place_of(visit, z);
  A gates[4] = {0, 0, 0, 0}, hidden = 0;
  if (visit.runs) activate<kind>(pre, gates);
  if (p.gates) store_gates<T>(p.gates, place * 4 * z.hidden + unit, z.hidden, gates);
  if constexpr (kind == CellKind::lstm) {
    A left = c;
    if (visit.runs) {
      lstm_cell_forward<Math>(LstmGates<A>{gates[0], gates[1], gates[2], gates[3]}, c, left, hidden);
      c = visit.reset ? reset_c : left;
    }
    if (p.c_states) store<T>(p.c_states, place * z.hidden + unit, visit.runs ? left : 0);
    if (visit.last) store<T>(p.c_n, state_of(visit, z) * z.hidden + unit, left);
  } else if (visit.runs) {
    hidden = gru_cell_forward(GruGates<A>{gates[0], gates[1], gates[2], gates[3]}, h);
  }
  return hidden;
}

// Keeps an element of the new hidden state as a result. Returns what enters the next round, where `h` entered this one.
template <class T>
HSM_DEVICE Accumulator<T> leave_hidden(const ForwardRound& s, const ForwardVisit& visit, int unit, Accumulator<T> value, Accumulator<T> h,
                                       Accumulator<T> reset_h) {
  const Sizes& z = s.params.sizes;
  store<T>(s.params.output, place_of(visit, z) * z.hidden_out + unit, visit.runs ? value : 0);
  if (visit.last) store<T>(s.params.h_n, state_of(visit, z) * z.hidden_out + unit, visit.runs ? value : h);
  if (!visit.runs) return h;
  return visit.reset ? reset_h : widen(narrow<T>(value));
}

}  // namespace cuda
}  // namespace hsm
