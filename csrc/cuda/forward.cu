// The forward pass of the step variant.
#include "cuda/layer.cuh"

namespace hsm {
namespace cuda {
namespace {

// A kernel's view of one round: step `index` in the forward direction, step L - 1 - `index` in the reverse one. `A` is Accumulator<T>.
struct ForwardRound {
  ForwardParams params;
  int64_t index;
  const void* input_product[max_directions];  // A (steps, N, G * H), from `first_step` on
  int64_t first_step[max_directions];
  void* state_product;  // A (D, N, G * H): of the state that enters the round
  void* state_h;        // T (D, N, Hout): that state
  void* state_c;        // A (D, N, H); LSTM
  void* cell_output;    // T (D, N, H): with a projection, what it takes
  void* projected;      // A (D, N, Hout): and what it gives
};

struct Visit {
  int direction;
  int64_t sequence, step;
  bool runs;   // the step is inside the sequence
  bool last;   // no other round follows
  bool reset;  // the state is replaced before it enters the next round
};

HSM_DEVICE Visit visit_of(const ForwardRound& s, const Place& place) {
  const Sequences sequences{s.params.boundaries, s.params.sizes.steps};
  const int64_t steps = s.params.sizes.steps, n = place.row, step = place.direction ? steps - 1 - s.index : s.index;
  // The edge to the next round's step. Behind the last round there is none, and nothing reads what would enter it.
  const bool reset = sequences.resets(place.direction ? step : step + 1, n);
  return {place.direction, n, step, step < sequences.length(n), s.index == steps - 1, reset};
}

// Keeps an element of the new hidden state: as a result, and for the next round.
template <class T>
HSM_DEVICE void leave_hidden(const ForwardRound& s, const Visit& visit, int unit, Accumulator<T> value) {
  const Sizes& z = s.params.sizes;
  const int64_t state = (visit.direction * z.batch + visit.sequence) * z.hidden_out + unit;
  const int64_t result = ((visit.step * z.batch + visit.sequence) * z.directions + visit.direction) * z.hidden_out + unit;
  store<T>(s.params.output, result, visit.runs ? value : 0);
  if (visit.last) store<T>(s.params.h_n, state, visit.runs ? value : load<T>(s.state_h, state));
  if (visit.runs) store<T>(s.state_h, state, visit.reset ? load<T>(s.params.boundaries.reset_h, state) : value);
}

// The states that enter the first round.
template <class T>
HSM_KERNEL(block_threads) begin_forward(HSM_ARGUMENT ForwardRound s) {
  const Sizes& z = s.params.sizes;
  const Place place = place_of_thread(z.batch, z.hidden);
  if (!place.exists) return;
  const Sequences sequences{s.params.boundaries, z.steps};
  const bool reset = place.direction == 0 && sequences.resets(0, place.row);
  const int64_t row = place.direction * z.batch + place.row;
  if (place.unit < z.hidden_out) {
    const int64_t at = row * z.hidden_out + place.unit;
    const Accumulator<T> h = load<T>(reset ? s.params.boundaries.reset_h : s.params.h_0, at);
    store<T>(s.state_h, at, h);
    if (z.steps == 0) store<T>(s.params.h_n, at, h);
  }
  if (z.cell == CellKind::lstm) {
    const int64_t at = row * z.hidden + place.unit;
    const Accumulator<T> c = load<T>(reset ? s.params.boundaries.reset_c : s.params.c_0, at);
    static_cast<Accumulator<T>*>(s.state_c)[at] = c;
    if (z.steps == 0) store<T>(s.params.c_n, at, c);
  }
}

// Through the cell, from the two products.
template <class T, CellKind kind>
HSM_KERNEL(block_threads) forward_cell(HSM_ARGUMENT ForwardRound s) {
  using A = Accumulator<T>;
  const ForwardParams& p = s.params;
  const Sizes& z = p.sizes;
  const Place place = place_of_thread(z.batch, z.hidden);
  if (!place.exists) return;
  const Visit visit = visit_of(s, place);
  const int d = visit.direction, unit = place.unit;
  const int64_t columns = (kind == CellKind::lstm ? 4 : 3) * int64_t{z.hidden}, row = d * z.batch + visit.sequence;
  const int64_t step_place = (visit.step * z.batch + visit.sequence) * z.directions + d;

  A gates[4] = {0, 0, 0, 0}, hidden = 0;
  if (visit.runs) {
    const A* input = static_cast<const A*>(s.input_product[d]) + ((visit.step - s.first_step[d]) * z.batch + visit.sequence) * columns;
    A pre[4];
    preactivations<T, kind>(p.weights[d], z.hidden, unit, input, static_cast<const A*>(s.state_product) + row * columns, pre);
    activate<kind>(pre, gates);
  }
  if (p.gates) store_gates<T>(p.gates, step_place * 4 * z.hidden + unit, z.hidden, gates);

  if constexpr (kind == CellKind::lstm) {
    const int64_t state = row * z.hidden + unit;
    A* state_c = static_cast<A*>(s.state_c) + state;
    A c = *state_c;
    if (visit.runs) {
      lstm_cell_forward<Math>(LstmGates<A>{gates[0], gates[1], gates[2], gates[3]}, *state_c, c, hidden);
      *state_c = visit.reset ? load<T>(p.boundaries.reset_c, state) : c;
    }
    if (p.c_states) store<T>(p.c_states, step_place * z.hidden + unit, visit.runs ? c : 0);
    if (visit.last) store<T>(p.c_n, state, c);
    if (z.projection) return store<T>(s.cell_output, state, hidden);
  } else if (visit.runs) {
    hidden = gru_cell_forward(GruGates<A>{gates[0], gates[1], gates[2], gates[3]}, load<T>(s.state_h, row * z.hidden + unit));
  }
  leave_hidden<T>(s, visit, unit, hidden);
}

// Behind the projection.
template <class T>
HSM_KERNEL(block_threads) forward_projected(HSM_ARGUMENT ForwardRound s) {
  const Sizes& z = s.params.sizes;
  const Place place = place_of_thread(z.batch, z.hidden_out);
  if (!place.exists) return;
  const int64_t at = (place.direction * z.batch + place.row) * z.hidden_out + place.unit;
  leave_hidden<T>(s, visit_of(s, place), place.unit, static_cast<const Accumulator<T>*>(s.projected)[at]);
}

class ForwardPass {
 public:
  ForwardPass(const ForwardParams& params, const Limits& limits, void* workspace) : z_(params.sizes), wide_(accumulator_kind(params.sizes.dtype)) {
    round_.params = params;
    columns_ = gate_columns(z_);
    const int64_t element = element_bytes(z_.dtype), wide = element_bytes(wide_), rows = z_.directions * z_.batch;
    chunk_ = between(1, limits.input_product_bytes / at_least_1(rows * columns_ * wide), z_.steps);
    Arena arena(workspace);
    for (int d = 0; d < z_.directions; ++d) round_.input_product[d] = input_product_[d] = arena.take_bytes(chunk_ * z_.batch * columns_ * wide);
    round_.state_product = arena.take_bytes(rows * columns_ * wide);
    round_.state_h = arena.take_bytes(rows * z_.hidden_out * element);
    round_.state_c = arena.take_bytes(z_.cell == CellKind::lstm ? rows * z_.hidden * wide : 0);
    round_.cell_output = arena.take_bytes(z_.projection ? rows * z_.hidden * element : 0);
    round_.projected = arena.take_bytes(z_.projection ? rows * z_.hidden_out * wide : 0);
    weight_hh_.reserve(arena, z_, columns_ * z_.hidden_out);
    weight_hr_.reserve(arena, z_, z_.projection ? int64_t{z_.hidden_out} * z_.hidden : 0);
    workspace_bytes_ = arena.used();
  }

  size_t workspace_bytes() const { return workspace_bytes_; }

  template <class T, CellKind kind>
  cudaError_t run(const Products& products, cudaStream_t stream) {
    if (z_.batch == 0) return cudaSuccess;
    Queue queue(stream, products);
    const ForwardParams& p = round_.params;
    weight_hh_.fill(queue, p.weights[0].weight_hh, p.weights[1].weight_hh);
    weight_hr_.fill(queue, p.weights[0].weight_hr, p.weights[1].weight_hr);
    const LaunchShape units = one_thread_each(z_.batch, z_.hidden, z_.directions);
    queue.run(begin_forward<T>, units, round_);
    for (int64_t begin = 0; begin < z_.steps && queue.ok(); begin += chunk_) {
      const int64_t end = begin + chunk_ < z_.steps ? begin + chunk_ : z_.steps;
      for (int d = 0; d < z_.directions; ++d) project_input(queue, d, d ? z_.steps - end : begin, end - begin);
      for (int64_t r = begin; r < end && queue.ok(); ++r) {
        round_.index = r;
        queue.multiply(through_transposed(weight_hh_, columns_, z_.hidden_out, round_.state_h, round_.state_product));
        queue.run(forward_cell<T, kind>, units, round_);
        if (!z_.projection) continue;
        queue.multiply(through_transposed(weight_hr_, z_.hidden_out, z_.hidden, round_.cell_output, round_.projected));
        queue.run(forward_projected<T>, one_thread_each(z_.batch, z_.hidden_out, z_.directions), round_);
      }
    }
    return queue.status();
  }

 private:
  void project_input(Queue& queue, int d, int64_t first, int64_t count) {
    const ForwardParams& p = round_.params;
    round_.first_step[d] = first;
    BatchedProduct product{z_.dtype, wide_, 1, count * z_.batch, columns_, p.input_size};
    product.a = static_cast<const char*>(p.input) + first * z_.batch * p.input_size * element_bytes(z_.dtype);
    product.a_row_stride = p.input_size, product.a_depth_stride = 1;
    product.b = p.weights[d].weight_ih, product.b_depth_stride = 1, product.b_column_stride = p.input_size;
    product.c = input_product_[d], product.c_row_stride = columns_;
    queue.multiply(product);
  }

  // (D, N, outputs) = (D, N, inputs) @ weights (D, outputs, inputs) transposed.
  BatchedProduct through_transposed(const StackedWeights& weights, int64_t outputs, int64_t inputs, const void* from, void* to) const {
    BatchedProduct product{z_.dtype, wide_, z_.directions, z_.batch, outputs, inputs};
    product.a = from, product.a_batch_stride = z_.batch * inputs, product.a_row_stride = inputs, product.a_depth_stride = 1;
    product.b = weights.data(), product.b_batch_stride = outputs * inputs, product.b_depth_stride = 1, product.b_column_stride = inputs;
    product.c = to, product.c_batch_stride = z_.batch * outputs, product.c_row_stride = outputs;
    return product;
  }

  const Sizes z_;
  const ScalarKind wide_;
  ForwardRound round_{};
  int64_t columns_, chunk_;
  void* input_product_[max_directions];
  StackedWeights weight_hh_, weight_hr_;
  size_t workspace_bytes_;
};

}  // namespace

size_t forward_workspace(const ForwardParams& params, const Limits& limits) { return ForwardPass(params, limits, nullptr).workspace_bytes(); }

Status forward(const ForwardParams& params, void* workspace, const Products& products, CUstream_st* stream, const Limits& limits) {
  ForwardPass pass(params, limits, workspace);
  return run(pass, params.sizes, products, stream);
}

}  // namespace cuda
}  // namespace hsm
