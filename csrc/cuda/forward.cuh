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

HSM_DEVICE int64_t step_of(const Sizes& z, int64_t index, int direction) { return direction ? z.steps - 1 - index : index; }

// Whether the edge from a round's step to the next round's resets. Behind the last round there is none, and nothing reads what would enter it.
HSM_DEVICE bool resets_behind(const ForwardRound& s, int64_t index, int direction, int64_t n) {
  const int64_t step = step_of(s.params.sizes, index, direction);
  return Sequences{s.params.boundaries, s.params.sizes.steps}.resets(direction ? step : step + 1, n);
}

HSM_DEVICE bool runs(const ForwardRound& s, int64_t index, int direction, int64_t n) {
  return step_of(s.params.sizes, index, direction) < Sequences{s.params.boundaries, s.params.sizes.steps}.length(n);
}

// `reset`: resets_behind.
HSM_DEVICE ForwardVisit visit_of(const Sizes& z, int64_t index, int direction, int64_t n, bool runs, bool reset) {
  return {direction, n, step_of(z, index, direction), runs, index == z.steps - 1, reset};
}

HSM_DEVICE ForwardVisit visit_of(const ForwardRound& s, int direction, int64_t n) {
  return visit_of(s.params.sizes, s.index, direction, n, runs(s, s.index, direction, n), resets_behind(s, s.index, direction, n));
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

// What a unit's step gives: the activated gates, and c and h behind it, h before a projection. Where the step does not run, c is what entered.
template <class A>
struct UnitStep {
  A gates[4];
  A c, h;
};

// One unit through the cell, from its pre-activations, which are looked at only where the step runs, and from the state that entered.
template <CellKind kind, class A>
HSM_DEVICE UnitStep<A> forward_unit(const ForwardVisit& visit, const A (&pre)[4], A h, A c) {
  UnitStep<A> out{{0, 0, 0, 0}, c, 0};
  if (!visit.runs) return out;
  activate<kind>(pre, out.gates);
  const A(&gates)[4] = out.gates;
  if constexpr (kind == CellKind::lstm)
    lstm_cell_forward<Math>(LstmGates<A>{gates[0], gates[1], gates[2], gates[3]}, c, out.c, out.h);
  else
    out.h = gru_cell_forward(GruGates<A>{gates[0], gates[1], gates[2], gates[3]}, h);
  return out;
}

// Its results other than those of h.
template <class T, CellKind kind>
HSM_DEVICE void write_unit(const ForwardRound& s, const ForwardVisit& visit, int unit, const UnitStep<Accumulator<T>>& out) {
  const ForwardParams& p = s.params;
  const Sizes& z = p.sizes;
  const int64_t place = place_of(visit, z);
  if (p.gates) store_gates<T>(p.gates, place * 4 * z.hidden + unit, z.hidden, out.gates);
  if constexpr (kind == CellKind::lstm) {
    if (p.c_states) store<T>(p.c_states, place * z.hidden + unit, visit.runs ? out.c : 0);
    if (visit.last) store<T>(p.c_n, state_of(visit, z) * z.hidden + unit, out.c);
  }
}

// An element of h as a result; `h` entered the step, or enters the next one: where the step does not run it is the same.
template <class T>
HSM_DEVICE void write_hidden(const ForwardRound& s, const ForwardVisit& visit, int unit, Accumulator<T> value, Accumulator<T> h) {
  const Sizes& z = s.params.sizes;
  store<T>(s.params.output, place_of(visit, z) * z.hidden_out + unit, visit.runs ? value : 0);
  if (visit.last) store<T>(s.params.h_n, state_of(visit, z) * z.hidden_out + unit, visit.runs ? value : h);
}

// What enters the next round, where `entered` entered this one, which makes `value` of it.
template <class A>
HSM_DEVICE A next_state(const ForwardVisit& visit, A value, A entered, A reset) {
  return !visit.runs ? entered : visit.reset ? reset : value;
}

}  // namespace cuda
}  // namespace hsm
