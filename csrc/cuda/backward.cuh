// What the variants of the backward pass share: a round as kernels see it, and what one unit of one sequence does in it.
//
// A round takes the gradients of the pre-activations of the round before back through W_hh, which gives the gradient of the state
// between two steps, and then goes through the cell of its own step. In the step variant lanes do so: a sequence each, or one of its segments where
// all sequences are cut at the same, known steps; in a persistent variant slots. One more round delivers what the last one left.
#pragma once

#include "cuda/layer.cuh"
#include "cuda/visits.cuh"

namespace hsm {
namespace cuda {

// A kernel's view of one round, or of those of a chunk. `A` is Accumulator<T>.
struct BackwardRound {
  BackwardParams params;
  // Step variant: lane i has sequence i % N, and of that the (i / N)-th segment of `segment_steps` steps of the chunk.
  int64_t index;
  int64_t chunk_steps, segment_steps, lanes;
  int64_t lane_stride;  // between directions, in the arrays below
  const void* gates[max_directions];  // T: activated, of step `gates_first_step` on
  int64_t gates_first_step[max_directions], gates_stride;  // elements between sequences
  void* hidden_gates;  // T (D, lanes, G * H): gradients of the pre-activations as the rows of W_hh stand; step variant
  void* from_gates;    // A (D, lanes, Hout): of the state that entered the step of the round before, by way of the gates; step variant
  void* carried;       // A (D, lanes or slots, H): the other way: of c for LSTM, of h through z for GRU; not for clusters
  void* grad_h;        // T (D, lanes, Hout): with a projection, of the step's h
  void* from_h;        // A (D, lanes, H): and of what was projected
  Visits visits;       // persistent variants
  // Of the state that is handed from chunk to chunk: from the one before to this one, and from this one to the next.
  const void *handed_h, *handed_c;  // A (D, N, Hout), A (D, N, H)
  void *left_h, *left_c;
  // Of the reset state, where each step of the chunk was entered from it: parts of grad_reset_h and grad_reset_c, or null.
  void *reset_h[max_directions], *reset_c[max_directions];  // A (steps, N, Hout), A (steps, N, H)
};

struct BackwardVisit {
  int direction;
  int64_t sequence, step;
  bool has_step;  // in this round
  bool runs;      // and it is inside the sequence
  bool leaves;    // what it leaves is the sequence's last state,
  bool carries;   // or what entered the chunk before
  bool enters_initial, enters_reset;  // what it was entered from; else the step before in its direction
  // What the round before left is the gradient of what entered this step. It goes on into the step at hand, or to the initial or the reset state, or
  // to the next chunk, or nowhere.
  int64_t from_sequence, from_step;
  bool goes_on, to_initial, to_reset, to_chunk;
};

// Of a lane.
HSM_DEVICE BackwardVisit visit_of(const BackwardRound& s, int direction, int64_t lane) {
  const Sizes& z = s.params.sizes;
  const Sequences sequences{s.params.boundaries, z.steps};
  const unsigned number = static_cast<unsigned>(lane), batch = static_cast<unsigned>(z.batch);  // 64 bits take a GPU long to divide
  const int64_t n = number % batch, chunk_begin = s.params.first_step[direction], chunk_end = chunk_begin + s.chunk_steps;
  const int64_t begin = chunk_begin + number / batch * s.segment_steps;
  const int64_t end = begin + s.segment_steps < chunk_end ? begin + s.segment_steps : chunk_end;
  const int reverse = direction;
  const int64_t step = reverse ? begin + s.index : end - 1 - s.index, before = reverse ? step - 1 : step + 1;
  const int64_t length = sequences.length(n), first = reverse ? length - 1 : 0;
  const auto is_open = [&](int64_t edge) { return !sequences.resets(edge, n) && !sequences.detaches(edge, n); };

  BackwardVisit visit{reverse, n, step};
  visit.has_step = step >= begin && step < end;
  visit.runs = visit.has_step && step < length;
  visit.leaves = step == (reverse ? 0 : length - 1);
  visit.carries = visit.runs && s.index == 0 && !visit.leaves && is_open(reverse ? step : step + 1);
  visit.enters_initial = step == first;
  visit.enters_reset = visit.runs && sequences.resets(step + reverse, n);
  if (s.index > 0 && before >= begin && before < end && before < length) {
    const int64_t edge = before + reverse;
    visit.from_sequence = n, visit.from_step = before;
    visit.to_reset = sequences.resets(edge, n);
    const bool open = is_open(edge);
    visit.to_initial = open && before == first;
    visit.goes_on = open && before != first && visit.has_step;
    visit.to_chunk = open && before != first && !visit.has_step;
  }
  return visit;
}

// Of a slot; `before`: its visit in the round before.
HSM_DEVICE BackwardVisit visit_of(int direction, const Visit& visit, const Visit& before) {
  BackwardVisit out{direction, visit.sequence(), visit.step};
  out.has_step = out.runs = visit.has(Visit::is_step);
  out.leaves = visit.has(Visit::last);
  out.carries = visit.has(Visit::carries);
  out.enters_initial = visit.has(Visit::initial);
  out.enters_reset = visit.has(Visit::reset);
  out.from_sequence = before.sequence(), out.from_step = before.step;
  const bool ends = before.has(Visit::first), open = ends && !before.has(Visit::reset) && !before.has(Visit::detached);
  out.goes_on = before.has(Visit::is_step) && !ends;
  out.to_reset = before.has(Visit::reset);
  out.to_initial = open && before.has(Visit::initial);
  out.to_chunk = open && !before.has(Visit::initial);
  return out;
}

HSM_DEVICE int64_t state_of(const BackwardVisit& visit, const Sizes& z) { return visit.direction * z.batch + visit.sequence; }
HSM_DEVICE int64_t place_of(int64_t step, const BackwardVisit& visit, const Sizes& z) {
  return (step * z.batch + visit.sequence) * z.directions + visit.direction;
}

// The gradient of an element of the state that left the visited step from outside the chunk's recurrence: of the states of all steps, and of the last, or
// what the chunk before has handed on.
template <class T>
HSM_DEVICE Accumulator<T> outer_gradient(const BackwardVisit& visit, const Sizes& z, int size, int unit, const void* grad_last, const void* handed,
                                         const void* grad_steps) {
  if (!visit.runs) return 0;
  const int64_t state = state_of(visit, z) * size + unit;
  Accumulator<T> last = 0;
  if (visit.leaves) last = load<T>(grad_last, state);
  if (visit.carries) last = static_cast<const Accumulator<T>*>(handed)[state];
  return last + load<T>(grad_steps, place_of(visit.step, visit, z) * size + unit);
}

// All of its gradient. `incoming`: what the round before left. `size` is that of the state. `resets`: of the direction.
template <class T>
HSM_DEVICE Accumulator<T> state_gradient(const BackwardRound& s, const BackwardVisit& visit, Accumulator<T> incoming, Accumulator<T> outer, int size,
                                         int unit, void* grad_initial, void* left, void* resets) {
  using A = Accumulator<T>;
  const int64_t state = (visit.direction * s.params.sizes.batch + visit.from_sequence) * size + unit;
  if (visit.to_initial) store<T>(grad_initial, state, incoming);
  if (visit.to_chunk) static_cast<A*>(left)[state] = incoming;
  if (visit.to_reset && resets) {
    const int64_t row = (visit.from_step - s.params.first_step[visit.direction]) * s.params.sizes.batch + visit.from_sequence;
    static_cast<A*>(resets)[row * size + unit] = incoming;
  }
  return visit.goes_on ? outer + incoming : outer;
}

// The state that entered the visited step.
template <class T>
HSM_DEVICE Accumulator<T> entered_state(const BackwardVisit& visit, const Sizes& z, int unit, const void* states, const void* initial, const void* reset) {
  if (visit.enters_reset) return load<T>(reset, state_of(visit, z) * z.hidden + unit);
  if (visit.enters_initial) return load<T>(initial, state_of(visit, z) * z.hidden + unit);
  return load<T>(states, place_of(visit.direction ? visit.step + 1 : visit.step - 1, visit, z) * z.hidden + unit);
}

// What a unit's step reads, beside the gradients that come from other rounds. Zero where the step does not run.
template <class A>
struct StepInputs {
  A gates[4];
  A entered;  // the state that entered the step: c for LSTM, h for GRU
  A c;        // that left it; LSTM
  A outer_h, outer_c;
};

template <class T, CellKind kind>
HSM_DEVICE StepInputs<Accumulator<T>> inputs_of(const BackwardRound& s, const BackwardVisit& visit, int unit) {
  const BackwardParams& p = s.params;
  const Sizes& z = p.sizes;
  StepInputs<Accumulator<T>> in{};
  if (!visit.runs) return in;
  const int64_t gates = ((visit.step - s.gates_first_step[visit.direction]) * z.batch + visit.sequence) * s.gates_stride + unit;
#pragma unroll
  for (int g = 0; g < 4; ++g) in.gates[g] = load<T>(s.gates[visit.direction], gates + g * z.hidden);
  if (!z.projection) in.outer_h = outer_gradient<T>(visit, z, z.hidden, unit, p.grad_h_n, s.handed_h, p.grad_output);
  if constexpr (kind == CellKind::lstm) {
    in.entered = entered_state<T>(visit, z, unit, p.c_states, p.c_0, p.boundaries.reset_c);
    in.c = load<T>(p.c_states, place_of(visit.step, visit, z) * z.hidden + unit);
    in.outer_c = outer_gradient<T>(visit, z, z.hidden, unit, p.grad_c_n, s.handed_c, p.grad_c_states);
  } else {
    in.entered = entered_state<T>(visit, z, unit, p.output, p.h_0, p.boundaries.reset_h);
  }
  return in;
}

// One unit of a lane through a round. `incoming`: the gradient of h by way of the gates; with a projection all of it. `carried`: the other way, of c
// for LSTM and of h through z for GRU, as the round before left it and as this one leaves it. Returns the gradients of the pre-activations.
template <class A>
struct GateGradients {
  A of[4];

  // As the rows of W_hh stand.
  template <CellKind kind>
  HSM_DEVICE A of_hidden(int g) const {
    return of[kind == CellKind::lstm || g < 2 ? g : 3];
  }
};

template <class T, CellKind kind>
HSM_DEVICE GateGradients<Accumulator<T>> backward_unit(const BackwardRound& s, const BackwardVisit& visit, int unit,
                                                       const StepInputs<Accumulator<T>>& in, Accumulator<T> incoming, Accumulator<T>& carried) {
  using A = Accumulator<T>;
  constexpr bool is_lstm = kind == CellKind::lstm;
  const BackwardParams& p = s.params;
  const Sizes& z = p.sizes;
  const int d = visit.direction;
  A grad_h = incoming, grad_c = 0;
  if (!z.projection)
    grad_h = state_gradient<T>(s, visit, is_lstm ? incoming : incoming + carried, in.outer_h, z.hidden, unit, p.grad_h_0, s.left_h, s.reset_h[d]);
  if constexpr (is_lstm) grad_c = state_gradient<T>(s, visit, carried, in.outer_c, z.hidden, unit, p.grad_c_0, s.left_c, s.reset_c[d]);
  GateGradients<A> grad{};
  if (visit.runs) {
    const A(&gates)[4] = in.gates;
    if constexpr (is_lstm)
      lstm_cell_backward<Math>(LstmGates<A>{gates[0], gates[1], gates[2], gates[3]}, in.entered, in.c, grad_h, grad_c, grad.of, carried);
    else
      gru_cell_backward(GruGates<A>{gates[0], gates[1], gates[2], gates[3]}, in.entered, grad_h, grad.of, carried);
  }
  if (visit.has_step) {
    const int64_t row = (visit.step - p.first_step[d]) * z.batch + visit.sequence;
    store_gates<T>(p.grad_gates[d], row * 4 * z.hidden + unit, z.hidden, grad.of);
  }
  return grad;
}

}  // namespace cuda
}  // namespace hsm
