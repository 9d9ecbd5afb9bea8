// What the variants of the forward pass share: a round as kernels see it, and what one unit of one sequence does in it.
#pragma once

#include "cuda/layer.cuh"
#include "cuda/visits.cuh"

namespace hsm {
namespace cuda {

// A kernel's view of one round, step `index` in the forward direction and step L - 1 - `index` in the reverse one, or of those of a chunk. `A` is
// Accumulator<T>.
struct ForwardRound {
  ForwardParams params;
  int64_t index;
  const void* input_product[max_directions];  // A (steps, N, G * H), from `first_step` on
  int64_t first_step[max_directions];
  void* state_product;  // A (D, N, G * H): of the state that enters the round; step variant
  void* state_h;        // T (D, N, Hout): that state, or what enters the chunk
  void* state_c;        // A (D, N, H); LSTM
  void* next_h;         // T (D, N, Hout): what enters the next chunk; persistent variants
  void* next_c;         // A (D, N, H); LSTM
  void* slot_state;     // A (D, slots, H): c of LSTM, h of GRU; grid
  Visits visits;        // persistent variants
  void* cell_output;    // T (D, N, H): with a projection, what it takes
  void* projected;      // A (D, N, Hout): and what it gives
};

struct ForwardVisit {
  int direction;
  int64_t sequence, step;
  bool runs;   // the step is inside the sequence
  bool last;   // no other round follows for the sequence
  bool reset;  // the state is replaced before it enters the next round, if there is one
};

HSM_DEVICE ForwardVisit visit_of(const ForwardRound& s, int direction, int64_t n) {
  const Sizes& z = s.params.sizes;
  const Sequences sequences{s.params.boundaries, z.steps};
  const int64_t step = direction ? z.steps - 1 - s.index : s.index;
  return {direction, n, step, step < sequences.length(n), s.index == z.steps - 1, sequences.resets(direction ? step : step + 1, n)};
}

// Of a persistent variant; what enters the next round is not the visit's concern there.
HSM_DEVICE ForwardVisit visit_of(int direction, const Visit& visit) {
  return {direction, visit.sequence(), visit.step, visit.has(Visit::is_step), visit.has(Visit::last), false};
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
HSM_DEVICE UnitStep<A> forward_unit(bool runs, const A (&pre)[4], A h, A c) {
  UnitStep<A> out{{0, 0, 0, 0}, c, 0};
  if (!runs) return out;
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

// An element of the state that enters the first step of a segment. A sequence may begin behind the first chunk.
template <class T>
HSM_DEVICE float entering_h(const ForwardRound& s, int direction, const Visit& visit, int unit) {
  const ForwardParams& p = s.params;
  const int64_t at = (direction * p.sizes.batch + visit.sequence()) * p.sizes.hidden + unit;
  return load<T>(visit.has(Visit::reset) ? p.boundaries.reset_h : visit.has(Visit::initial) ? p.h_0 : s.state_h, at);
}
template <class T>
HSM_DEVICE float entering_c(const ForwardRound& s, int direction, const Visit& visit, int unit) {
  const ForwardParams& p = s.params;
  const int64_t at = (direction * p.sizes.batch + visit.sequence()) * p.sizes.hidden + unit;
  if (visit.has(Visit::reset)) return load<T>(p.boundaries.reset_c, at);
  return visit.has(Visit::initial) ? load<T>(p.c_0, at) : static_cast<const float*>(s.state_c)[at];
}

// All results of a unit's step, by a persistent variant.
template <class T, CellKind kind>
HSM_DEVICE void write_step(const ForwardRound& s, int direction, const Visit& visit, int unit, const UnitStep<float>& out) {
  if (!visit.has(Visit::is_step)) return;
  const ForwardVisit step = visit_of(direction, visit);
  write_unit<T, kind>(s, step, unit, out);
  write_hidden<T>(s, step, unit, out.h, 0.0f);
  if (!visit.has(Visit::carries)) return;
  const int64_t at = state_of(step, s.params.sizes) * s.params.sizes.hidden + unit;
  store<T>(s.next_h, at, out.h);
  if constexpr (kind == CellKind::lstm) static_cast<float*>(s.next_c)[at] = out.c;
}

// What enters the next round, where `entered` entered this one, which makes `value` of it.
template <class A>
HSM_DEVICE A next_state(const ForwardVisit& visit, A value, A entered, A reset) {
  return !visit.runs ? entered : visit.reset ? reset : value;
}

}  // namespace cuda
}  // namespace hsm
