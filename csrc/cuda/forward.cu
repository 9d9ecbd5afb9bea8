// The forward pass: the products with the input, the step variant's rounds, and where a persistent variant takes their place.
#include "cuda/cluster_passes.cuh"
#include "cuda/forward.cuh"
#include "cuda/grid_passes.cuh"
#include "cuda/schedule.cuh"

namespace hsm {
namespace cuda {
namespace {

// The states that enter the first round, and leave a sequence without steps.
template <class T>
HSM_KERNEL(block_threads) begin_forward(HSM_ARGUMENT ForwardRound s) {
  const Sizes& z = s.params.sizes;
  const Place place = place_of_thread(z.batch, z.hidden);
  if (!place.exists) return;
  const Sequences sequences{s.params.boundaries, z.steps};
  const bool reset = place.direction == 0 && sequences.resets(0, place.row), empty = sequences.length(place.row) <= 0;
  const int64_t row = place.direction * z.batch + place.row;
  if (place.unit < z.hidden_out) {
    const int64_t at = row * z.hidden_out + place.unit;
    const Accumulator<T> h = load<T>(reset ? s.params.boundaries.reset_h : s.params.h_0, at);
    store<T>(s.state_h, at, h);
    if (empty) store<T>(s.params.h_n, at, h);
  }
  if (z.cell == CellKind::lstm) {
    const int64_t at = row * z.hidden + place.unit;
    const Accumulator<T> c = load<T>(reset ? s.params.boundaries.reset_c : s.params.c_0, at);
    static_cast<Accumulator<T>*>(s.state_c)[at] = c;
    if (empty) store<T>(s.params.c_n, at, c);
  }
}

// Keeps an element of the new hidden state: as a result, and for the next round.
template <class T>
HSM_DEVICE void leave_hidden(const ForwardRound& s, const ForwardVisit& visit, int unit, Accumulator<T> value) {
  const int64_t at = state_of(visit, s.params.sizes) * s.params.sizes.hidden_out + unit;
  const Accumulator<T> h = load<T>(s.state_h, at), reset = visit.reset ? load<T>(s.params.boundaries.reset_h, at) : 0;
  write_hidden<T>(s, visit, unit, value, h);
  store<T>(s.state_h, at, next_state(visit, value, h, reset));
}

// Through the cell, from the two products.
template <class T, CellKind kind>
HSM_KERNEL(block_threads) forward_cell(HSM_ARGUMENT ForwardRound s) {
  using A = Accumulator<T>;
  constexpr bool is_lstm = kind == CellKind::lstm;
  const ForwardParams& p = s.params;
  const Sizes& z = p.sizes;
  const Place place = place_of_thread(z.batch, z.hidden);
  if (!place.exists) return;
  const ForwardVisit visit = visit_of(s, place.direction, place.row);
  const int unit = place.unit;
  const int64_t row = state_of(visit, z), state = row * z.hidden + unit;

  A pre[4] = {0, 0, 0, 0};
  if (visit.runs) {
    const A* product = static_cast<const A*>(s.state_product) + row * gate_columns(z);
    preactivations<T, kind>(p.weights[visit.direction], z.hidden, unit, input_of<T>(s, visit), product, pre);
  }
  A* state_c = static_cast<A*>(s.state_c);
  const A c = is_lstm ? state_c[state] : 0, h = is_lstm ? 0 : load<T>(s.state_h, state);
  const UnitStep<A> out = forward_unit<kind>(visit.runs, pre, h, c);
  write_unit<T, kind>(s, visit, unit, out);
  if (is_lstm) state_c[state] = next_state(visit, out.c, c, visit.reset ? load<T>(p.boundaries.reset_c, state) : A{0});
  if (z.projection) return store<T>(s.cell_output, state, out.h);
  leave_hidden<T>(s, visit, unit, out.h);
}

// Behind the projection.
template <class T>
HSM_KERNEL(block_threads) forward_projected(HSM_ARGUMENT ForwardRound s) {
  const Sizes& z = s.params.sizes;
  const Place place = place_of_thread(z.batch, z.hidden_out);
  if (!place.exists) return;
  const int64_t at = (place.direction * z.batch + place.row) * z.hidden_out + place.unit;
  leave_hidden<T>(s, visit_of(s, place.direction, place.row), place.unit, static_cast<const Accumulator<T>*>(s.projected)[at]);
}

class ForwardPass {
 public:
  ForwardPass(const ForwardParams& params, const Setting& setting, const Limits& limits, void* workspace)
      : z_(params.sizes), wide_(accumulator_kind(z_.dtype)),
        plan_(plan_recurrence(z_, PassKind::forward, params.boundaries.reset_mask || params.boundaries.lengths, setting)),
        grid_(grid_shape(z_, PassKind::forward, plan_)) {
    round_.params = params;
    columns_ = gate_columns(z_);
    const int64_t element = element_bytes(z_.dtype), wide = element_bytes(wide_), rows = z_.directions * z_.batch;
    const bool steps = plan_.variant == Variant::step, lstm = z_.cell == CellKind::lstm;
    const int64_t product_bytes = steps ? limits.input_product_bytes : limits.persistent_input_product_bytes;
    chunk_ = between(1, product_bytes / at_least_1(rows * columns_ * wide), z_.steps);
    if (plan_.deals) chunk_ = between(1, limits.schedule_bytes / Scheduler::bytes_of_step(z_, plan_.all_slots), chunk_);
    Arena arena(workspace);
    for (int d = 0; d < z_.directions; ++d) round_.input_product[d] = input_product_[d] = arena.take_bytes(chunk_ * z_.batch * columns_ * wide);
    round_.state_product = arena.take_bytes(steps ? rows * columns_ * wide : 0);
    round_.state_h = arena.take_bytes(rows * z_.hidden_out * element);
    round_.state_c = arena.take_bytes(lstm ? rows * z_.hidden * wide : 0);
    round_.next_h = arena.take_bytes(steps ? 0 : rows * z_.hidden * element);
    round_.next_c = arena.take_bytes(steps || !lstm ? 0 : rows * z_.hidden * wide);
    const bool grid = plan_.variant == Variant::grid;
    round_.slot_state = arena.take_bytes(grid ? z_.directions * plan_.all_slots * z_.hidden * wide : 0);
    round_.visits = {false, z_.steps};
    round_.visits.slots = plan_.all_slots;
    if (plan_.deals) scheduler_.reserve(arena, z_, plan_.all_slots, chunk_);
    round_.cell_output = arena.take_bytes(z_.projection ? rows * z_.hidden * element : 0);
    round_.projected = arena.take_bytes(z_.projection ? rows * z_.hidden_out * wide : 0);
    weight_hh_.reserve(arena, z_, steps ? columns_ * z_.hidden_out : 0);
    weight_hr_.reserve(arena, z_, z_.projection ? int64_t{z_.hidden_out} * z_.hidden : 0);
    exchange_ = arena.take_bytes(grid_.exchange_words() * 4);
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
    queue.run(begin_forward<T>, one_thread_each(z_.batch, z_.hidden, z_.directions), round_);
    if (plan_.deals && p.boundaries.lengths) clear_results(queue);
    for (int64_t begin = 0; begin < z_.steps && queue.ok(); begin += chunk_) {
      const int64_t end = begin + chunk_ < z_.steps ? begin + chunk_ : z_.steps;
      for (int d = 0; d < z_.directions; ++d) project_input(queue, d, d ? z_.steps - end : begin, end - begin);
      if (plan_.variant == Variant::step)
        run_rounds<T, kind>(queue, begin, end);
      else
        run_persistent(queue, begin, end);
    }
    return queue.status();
  }

 private:
  // Behind the length of a sequence no slot runs.
  void clear_results(Queue& queue) const {
    const ForwardParams& p = round_.params;
    const int64_t elements = z_.steps * z_.batch * z_.directions * z_.hidden, element = element_bytes(z_.dtype);
    queue.fill(p.output, 0, elements * element);
    if (p.gates) queue.fill(p.gates, 0, 4 * elements * element);
    if (p.c_states) queue.fill(p.c_states, 0, elements * element);
  }

  // Rounds [begin, end), whose input products are there.
  void run_persistent(Queue& queue, int64_t begin, int64_t end) {
    round_.visits.begin = begin, round_.visits.end = end;
    if (plan_.deals) scheduler_.make(queue, round_.params.boundaries, round_.visits);
    queue.take([&](cudaStream_t stream) {
      return plan_.variant == Variant::cluster ? cluster_forward(round_, plan_, stream) : grid_forward(round_, grid_, exchange_, stream);
    });
    std::swap(round_.state_h, round_.next_h);
    std::swap(round_.state_c, round_.next_c);
  }

  template <class T, CellKind kind>
  void run_rounds(Queue& queue, int64_t begin, int64_t end) {
    const LaunchShape units = one_thread_each(z_.batch, z_.hidden, z_.directions);
    for (int64_t r = begin; r < end && queue.ok(); ++r) {
      round_.index = r;
      queue.multiply(through_transposed(weight_hh_, columns_, z_.hidden_out, round_.state_h, round_.state_product));
      queue.run(forward_cell<T, kind>, units, round_);
      if (!z_.projection) continue;
      queue.multiply(through_transposed(weight_hr_, z_.hidden_out, z_.hidden, round_.cell_output, round_.projected));
      queue.run(forward_projected<T>, one_thread_each(z_.batch, z_.hidden_out, z_.directions), round_);
    }
  }

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
  const Plan plan_;
  const GridShape grid_;
  ForwardRound round_{};
  int64_t columns_, chunk_;
  Scheduler scheduler_;
  void* input_product_[max_directions];
  void* exchange_;
  StackedWeights weight_hh_, weight_hr_;
  size_t workspace_bytes_;
};

}  // namespace

size_t forward_workspace(const ForwardParams& params, const Setting& setting, const Limits& limits) {
  return ForwardPass(params, setting, limits, nullptr).workspace_bytes();
}

Status forward(const ForwardParams& params, void* workspace, const Setting& setting, const Products& products, CUstream_st* stream,
               const Limits& limits) {
  ForwardPass pass(params, setting, limits, workspace);
  return run(pass, params.sizes, products, stream);
}

}  // namespace cuda
}  // namespace hsm
