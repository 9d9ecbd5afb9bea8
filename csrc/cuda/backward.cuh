// What the variants of the backward pass share: a round as kernels see it, and what one unit of one sequence does in it.
//
// A round takes the gradients of the pre-activations of the round before back through W_hh, which gives the gradient of the state
// between two steps, and then goes through the cell of its own step. A lane is what does so: a sequence, or one of its segments where
// all sequences are cut at the same, known steps. One more round delivers what the last one left.
#pragma once

#include "cuda/layer.cuh"

namespace hsm {
namespace cuda {

// A kernel's view of one round. `A` is Accumulator<T>.
struct BackwardRound {
  BackwardParams params;
  int64_t index;
  // Lane i has sequence i % N, and of that the (i / N)-th segment of `segment_steps` steps from `first_segment` on.
  int64_t first_segment, segment_steps, lanes;
  int64_t lane_stride;  // between directions, in the arrays below
  const void* gates[max_directions];  // T: activated, of step `gates_first_step` on
  int64_t gates_first_step[max_directions], gates_stride;  // elements between sequences
  void* hidden_gates;  // T (D, lanes, G * H): gradients of the pre-activations as the rows of W_hh stand
  void* from_gates;    // A (D, lanes, Hout): of the state that entered the step of the round before, by way of the gates
  void* carried;       // A (D, lanes, H): the other way: of c for LSTM, of h through z for GRU
  void* grad_h;        // T (D, lanes, Hout): with a projection, of the step's h
  void* from_h;        // A (D, lanes, H): and of what was projected
  void* reset_h;       // A (D, lanes, Hout) or null: sums for grad_reset_h
  void* reset_c;       // A (D, lanes, H) or null
};

struct BackwardVisit {
  int direction;
  int lane, sequence;
  int64_t step;
  bool has_step;  // in this round
  bool runs;      // and it is inside the sequence
  bool leaves;    // what it leaves is the sequence's last state
  bool enters_initial, enters_reset;  // what it was entered from; else the step before in its direction
  // Where the gradient goes that the round before left: on into this step, or to the initial or the reset state, or nowhere.
  bool goes_on, to_initial, to_reset;
};

HSM_DEVICE BackwardVisit visit_of(const BackwardRound& s, int64_t index, int direction, int64_t row) {
  const Sizes& z = s.params.sizes;
  const Sequences sequences{s.params.boundaries, z.steps};
  const unsigned lane = static_cast<unsigned>(row), batch = static_cast<unsigned>(z.batch);
  const int64_t n = lane % batch, begin = s.first_segment + (lane / batch) * s.segment_steps;
  const int64_t whole_end = begin + s.segment_steps, end = whole_end < z.steps ? whole_end : z.steps;
  const int reverse = direction;
  const int64_t step = reverse ? begin + index : end - 1 - index, before = reverse ? step - 1 : step + 1;
  const int64_t length = sequences.length(n), first = reverse ? length - 1 : 0;

  BackwardVisit visit{reverse, static_cast<int>(lane), static_cast<int>(n), step};
  visit.has_step = step >= begin && step < end;
  visit.runs = visit.has_step && step < length;
  visit.leaves = reverse ? step == 0 : step == length - 1;
  visit.enters_initial = step == first;
  visit.enters_reset = visit.runs && sequences.resets(step + reverse, n);
  if (index > 0 && before >= begin && before < end && before < length) {
    const int64_t edge = before + reverse;
    visit.to_reset = sequences.resets(edge, n);
    const bool open = !visit.to_reset && !sequences.detaches(edge, n);
    visit.to_initial = open && before == first;
    visit.goes_on = open && before != first;
  }
  return visit;
}

HSM_DEVICE int64_t state_of(const BackwardVisit& visit, const Sizes& z) { return visit.direction * z.batch + visit.sequence; }
HSM_DEVICE int64_t place_of(int64_t step, const BackwardVisit& visit, const Sizes& z) {
  return (step * z.batch + visit.sequence) * z.directions + visit.direction;
}

// The gradient of an element of the state that left the visited step from outside the recurrence: of the states of all steps, and of the last.
template <class T>
HSM_DEVICE Accumulator<T> outer_gradient(const BackwardVisit& visit, const Sizes& z, int size, int unit, const void* grad_last, const void* grad_steps) {
  if (!visit.runs) return 0;
  const Accumulator<T> last = visit.leaves ? load<T>(grad_last, state_of(visit, z) * size + unit) : 0;
  return last + load<T>(grad_steps, place_of(visit.step, visit, z) * size + unit);
}

// All of its gradient. `incoming`: what the round before left, which is delivered where the step that it comes from began a segment. `size`
// is that of the state.
template <class T>
HSM_DEVICE Accumulator<T> state_gradient(const BackwardVisit& visit, Accumulator<T> incoming, Accumulator<T> outer, const Sizes& z, int size, int unit,
                                         int64_t lane, void* grad_initial, void* resets) {
  using A = Accumulator<T>;
  if (visit.to_initial) store<T>(grad_initial, state_of(visit, z) * size + unit, incoming);
  if (visit.to_reset && resets) static_cast<A*>(resets)[lane * size + unit] += incoming;
  return visit.runs && visit.goes_on ? outer + incoming : outer;
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
  if (!z.projection) in.outer_h = outer_gradient<T>(visit, z, z.hidden, unit, p.grad_h_n, p.grad_output);
  if constexpr (kind == CellKind::lstm) {
    in.entered = entered_state<T>(visit, z, unit, p.c_states, p.c_0, p.boundaries.reset_c);
    in.c = load<T>(p.c_states, place_of(visit.step, visit, z) * z.hidden + unit);
    in.outer_c = outer_gradient<T>(visit, z, z.hidden, unit, p.grad_c_n, p.grad_c_states);
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
  const int64_t lane = visit.direction * s.lane_stride + visit.lane;
  A grad_h = incoming, grad_c = 0;
  if (!z.projection)
    grad_h = state_gradient<T>(visit, is_lstm ? incoming : incoming + carried, in.outer_h, z, z.hidden, unit, lane, p.grad_h_0, s.reset_h);
  if constexpr (is_lstm) grad_c = state_gradient<T>(visit, carried, in.outer_c, z, z.hidden, unit, lane, p.grad_c_0, s.reset_c);
  GateGradients<A> grad{};
  if (visit.runs) {
    const A(&gates)[4] = in.gates;
    if constexpr (is_lstm)
      lstm_cell_backward<Math>(LstmGates<A>{gates[0], gates[1], gates[2], gates[3]}, in.entered, in.c, grad_h, grad_c, grad.of, carried);
    else
      gru_cell_backward(GruGates<A>{gates[0], gates[1], gates[2], gates[3]}, in.entered, grad_h, grad.of, carried);
  }
  if (visit.has_step) {
    const int64_t row = (visit.step - p.first_step[visit.direction]) * z.batch + visit.sequence;
    store_gates<T>(p.grad_gates[visit.direction], row * 4 * z.hidden + unit, z.hidden, grad.of);
  }
  return grad;
}

}  // namespace cuda
}  // namespace hsm
