// The backward pass: the products over many steps, the step variant's rounds, and where a persistent variant takes their place.
#include "cuda/backward.cuh"
#include "cuda/cluster_passes.cuh"
#include "cuda/grid_passes.cuh"
#include "cuda/schedule.cuh"

namespace hsm {
namespace cuda {
namespace {

// A sequence without steps passes on what reaches its last state; for others the gradients of the initial state are zero until a
// round brings some.
template <class T>
HSM_KERNEL(block_threads) begin_backward(HSM_ARGUMENT BackwardParams p) {
  const Sizes& z = p.sizes;
  const Place place = place_of_thread(z.batch, z.hidden);
  if (!place.exists) return;
  const bool empty = Sequences{p.boundaries, z.steps}.length(place.row) <= 0;
  const int64_t row = place.direction * z.batch + place.row;
  if (place.unit < z.hidden_out) {
    const int64_t at = row * z.hidden_out + place.unit;
    store<T>(p.grad_h_0, at, empty ? load<T>(p.grad_h_n, at) : 0);
  }
  if (z.cell == CellKind::lstm) {
    const int64_t at = row * z.hidden + place.unit;
    store<T>(p.grad_c_0, at, empty ? load<T>(p.grad_c_n, at) : 0);
  }
}

// Before the projection.
template <class T>
HSM_KERNEL(block_threads) backward_projected(HSM_ARGUMENT BackwardRound s) {
  using A = Accumulator<T>;
  const BackwardParams& p = s.params;
  const Sizes& z = p.sizes;
  const Place place = place_of_thread(s.lanes, z.hidden_out);
  if (!place.exists) return;
  const BackwardVisit visit = visit_of(s, place.direction, place.row);
  const int d = visit.direction, size = z.hidden_out, unit = place.unit;
  const int64_t at = (d * s.lane_stride + place.row) * size + unit;
  const A outer = outer_gradient<T>(visit, z, size, unit, p.grad_h_n, s.handed_h, p.grad_output);
  const A grad = state_gradient<T>(s, visit, static_cast<const A*>(s.from_gates)[at], outer, size, unit, p.grad_h_0, s.left_h, s.reset_h[d]);
  store<T>(s.grad_h, at, grad);
  if (visit.has_step) store<T>(p.grad_h, place_of(visit.step, visit, z) * size + unit, grad);
}

// Through the cell.
template <class T, CellKind kind>
HSM_KERNEL(block_threads) backward_cell(HSM_ARGUMENT BackwardRound s) {
  using A = Accumulator<T>;
  const Sizes& z = s.params.sizes;
  const Place place = place_of_thread(s.lanes, z.hidden);
  if (!place.exists) return;
  const BackwardVisit visit = visit_of(s, place.direction, place.row);
  const int unit = place.unit;
  const int64_t lane = visit.direction * s.lane_stride + place.row, at = lane * z.hidden + unit;
  const A incoming = static_cast<const A*>(z.projection ? s.from_h : s.from_gates)[at];
  const StepInputs<A> in = inputs_of<T, kind>(s, visit, unit);
  const GateGradients<A> grad = backward_unit<T, kind>(s, visit, unit, in, incoming, static_cast<A*>(s.carried)[at]);
  if (!visit.has_step) return;
  constexpr int gate_count = kind == CellKind::lstm ? 4 : 3;
#pragma unroll
  for (int g = 0; g < gate_count; ++g) store<T>(s.hidden_gates, (lane * gate_count + g) * z.hidden + unit, grad.template of_hidden<kind>(g));
}

// What the steps of a chunk sent to the reset state of their sequence, added up in the order of time.
struct ResetSums {
  Boundaries boundaries;
  int64_t steps, batch, chunk_steps;
  int size;
  int64_t first_step[max_directions];
  const void* parts[max_directions];  // A (chunk_steps, N, size): looked at where a step was entered from the reset state
  void* totals;                       // A (D, N, size): of the chunks so far
  void* result;                       // T (D, N, size): the totals
  bool add;                           // to what `totals` holds
};

template <class T>
HSM_KERNEL(block_threads) add_resets(HSM_ARGUMENT ResetSums s) {
  using A = Accumulator<T>;
  const Place place = place_of_thread(s.batch, s.size);
  const int d = place.direction;
  const int64_t n = place.row;
  if (n >= s.batch) return;
  const Sequences sequences{s.boundaries, s.steps};
  const int64_t at = (d * s.batch + n) * s.size + place.unit;
  A sum = place.exists && s.add ? static_cast<const A*>(s.totals)[at] : 0;
  // A warp has one sequence, and each of its lanes looks at one of 32 steps.
  for (int64_t tile = 0; tile < s.chunk_steps; tile += 32) {
    const int64_t step = tile + lane();
    const bool reset = step < s.chunk_steps && sequences.resets(s.first_step[d] + step + d, n);
    for (unsigned bits = ballot(reset); bits; bits &= bits - 1)
      if (place.exists) sum += static_cast<const A*>(s.parts[d])[((tile + lowest_bit(bits)) * s.batch + n) * s.size + place.unit];
  }
  if (!place.exists) return;
  static_cast<A*>(s.totals)[at] = sum;
  store<T>(s.result, at, sum);
}

// The activated gates of many steps of one direction at once.
struct GateRows {
  Weights weights;
  int hidden;
  int64_t rows;
  const void* input_product;  // A (rows, G * H)
  const void* state_product;  // A (rows, G * H)
  void* gates;                // T (rows, 4 * H)
};

template <class T, CellKind kind>
HSM_KERNEL(block_threads) activate_gates(HSM_ARGUMENT GateRows s) {
  using A = Accumulator<T>;
  const Place place = place_of_thread(s.rows, s.hidden);
  if (!place.exists) return;
  const int64_t at = place.row * (kind == CellKind::lstm ? 4 : 3) * s.hidden;
  A pre[4], gates[4];
  preactivations<T, kind>(s.weights, s.hidden, place.unit, static_cast<const A*>(s.input_product) + at,
                          static_cast<const A*>(s.state_product) + at, pre);
  activate<kind>(pre, gates);
  store_gates<T>(s.gates, place.row * 4 * s.hidden + place.unit, s.hidden, gates);
}

// Sums over the rows of each sample of a matrix, in two goes: of each slab of rows, then of the slabs.
struct RowSums {
  const void* matrix;  // T (steps, samples, sample_rows, columns)
  int64_t steps, samples, sample_rows, slab_rows, slabs;
  int columns;
  void* slab_sums;  // A (samples, slabs, columns)
  void* totals;     // A (samples, columns)
  void* result;     // T (samples, columns): the totals
  bool add;         // to what `totals` holds
};

template <class T>
HSM_KERNEL(block_threads) sum_slabs(HSM_ARGUMENT RowSums s) {
  using A = Accumulator<T>;
  const Place place = place_of_thread(s.samples * s.slabs, s.columns);
  if (!place.exists) return;
  const int64_t sample = place.row / s.slabs, begin = place.row % s.slabs * s.slab_rows, rows = s.steps * s.sample_rows;
  const int64_t end = begin + s.slab_rows < rows ? begin + s.slab_rows : rows, between_steps = (s.samples - 1) * s.sample_rows;
  int64_t left = s.sample_rows - begin % s.sample_rows;  // of the step
  int64_t row = begin / s.sample_rows * s.samples * s.sample_rows + sample * s.sample_rows + begin % s.sample_rows;
  A sum = 0;
  for (int64_t i = begin; i < end; ++i, ++row) {
    sum += load<T>(s.matrix, row * s.columns + place.unit);
    if (--left == 0) left = s.sample_rows, row += between_steps;
  }
  static_cast<A*>(s.slab_sums)[place.row * s.columns + place.unit] = sum;
}

template <class T>
HSM_KERNEL(block_threads) sum_of_slabs(HSM_ARGUMENT RowSums s) {
  using A = Accumulator<T>;
  const Place place = place_of_thread(s.samples, s.columns);
  if (!place.exists) return;
  const int64_t at = place.row * s.columns + place.unit;
  A* total = static_cast<A*>(s.totals) + at;
  A sum = s.add ? *total : A{0};
  for (int64_t slab = 0; slab < s.slabs; ++slab) sum += static_cast<const A*>(s.slab_sums)[(place.row * s.slabs + slab) * s.columns + place.unit];
  *total = sum;
  store<T>(s.result, at, sum);
}

struct Rounding {
  const void* from;  // A (rows, columns)
  void* to;          // T (rows, columns)
  int64_t rows;
  int columns;
};

template <class T>
HSM_KERNEL(block_threads) round_all(HSM_ARGUMENT Rounding s) {
  const Place place = place_of_thread(s.rows, s.columns);
  if (!place.exists) return;
  const int64_t at = place.row * s.columns + place.unit;
  store<T>(s.to, at, static_cast<const Accumulator<T>*>(s.from)[at]);
}

// Consecutive steps.
struct Steps {
  int64_t begin, end;
  int64_t count() const { return end - begin; }
};

class BackwardPass {
 public:
  BackwardPass(const BackwardLayer& layer, const Setting& setting, const Limits& limits, void* workspace)
      : layer_(layer), p_(round_.params), z_(layer.params.sizes), wide_(accumulator_kind(z_.dtype)) {
    p_ = layer.params;
    columns_ = gate_columns(z_);
    element_ = element_bytes(z_.dtype), wide_bytes_ = element_bytes(wide_);
    const Boundaries& boundaries = p_.boundaries;
    const bool cuts = boundaries.reset_mask || boundaries.detach_mask || boundaries.lengths;
    plan_ = plan_recurrence(z_, PassKind::backward, cuts, setting);
    grid_ = grid_shape(z_, PassKind::backward, plan_);
    const bool steps = plan_.variant == Variant::step, lstm = z_.cell == CellKind::lstm;
    choose_chunks(limits);
    const int64_t chunk_rows = chunk_ * z_.batch, hidden = z_.hidden, out = z_.hidden_out;
    const int64_t rows = z_.directions * z_.batch, lanes = z_.directions * round_.lane_stride;
    Arena arena(workspace);
    round_.hidden_gates = arena.take_bytes(steps ? lanes * columns_ * element_ : 0);
    round_.from_gates = arena.take_bytes(steps ? lanes * out * wide_bytes_ : 0);
    const int64_t carrying = steps ? lanes : plan_.variant == Variant::grid ? z_.directions * plan_.all_slots : 0;
    round_.carried = arena.take_bytes(carrying * hidden * wide_bytes_);
    round_.grad_h = arena.take_bytes(z_.projection ? lanes * out * element_ : 0);
    round_.from_h = arena.take_bytes(z_.projection ? lanes * hidden * wide_bytes_ : 0);
    round_.visits = {true, z_.steps};
    round_.visits.slots = plan_.all_slots;
    if (plan_.deals) scheduler_.reserve(arena, z_, plan_.all_slots, chunk_);
    const int64_t handed = adds_chunks() ? rows * wide_bytes_ : 0;
    handed_h_ = arena.take_bytes(handed * out), round_.left_h = arena.take_bytes(handed * out);
    handed_c_ = arena.take_bytes(lstm ? handed * hidden : 0), round_.left_c = arena.take_bytes(lstm ? handed * hidden : 0);
    const bool sums = sums_resets();
    for (int d = 0; d < z_.directions && sums; ++d) {
      round_.reset_h[d] = arena.take_bytes(chunk_rows * out * wide_bytes_);
      if (lstm) round_.reset_c[d] = arena.take_bytes(chunk_rows * hidden * wide_bytes_);
    }
    reset_total_h_ = arena.take_bytes(sums ? rows * out * wide_bytes_ : 0);
    reset_total_c_ = arena.take_bytes(sums && lstm ? rows * hidden * wide_bytes_ : 0);
    weight_hh_.reserve(arena, z_, steps ? columns_ * out : 0);
    weight_hr_.reserve(arena, z_, z_.projection ? out * hidden : 0);
    for (int d = 0; d < z_.directions; ++d) {
      p_.grad_gates[d] = arena.take_bytes(chunk_rows * 4 * hidden * element_);
      gates_[d] = p_.recompute ? arena.take_bytes(chunk_rows * 4 * hidden * element_) : nullptr;
      // Where several products add to a result of a 16-bit type, it is summed in float32.
      const bool apart = (adds_chunks() || (samples() > 1 && sample_rows() > 1)) && wide_ != z_.dtype;
      const int64_t weight_rows = samples() * columns_;
      weight_ih_sum_[d] = apart && layer.gradients.weight_ih[d] ? arena.take_bytes(weight_rows * layer.input_size * wide_bytes_) : nullptr;
      weight_hh_sum_[d] = apart && layer.gradients.weight_hh[d] ? arena.take_bytes(weight_rows * out * wide_bytes_) : nullptr;
      bias_totals_[d] = arena.take_bytes(samples() * 4 * hidden * wide_bytes_);
    }
    slab_sums_ = arena.take_bytes(samples() * most_slabs() * 4 * hidden * wide_bytes_);
    product_rows_ = between(1, limits.input_product_bytes / at_least_1(columns_ * wide_bytes_), chunk_rows);
    // Whole steps, as the first one may have to be treated apart.
    product_steps_ = at_least_1(product_rows_ / at_least_1(z_.batch));
    const int64_t product_bytes = p_.recompute ? product_steps_ * z_.batch * columns_ * wide_bytes_ : 0;
    input_product_ = arena.take_bytes(product_bytes);
    state_product_ = arena.take_bytes(product_bytes);
    exchange_ = arena.take_bytes(grid_.exchange_words() * 4);
    workspace_bytes_ = arena.used();
  }

  size_t workspace_bytes() const { return workspace_bytes_; }

  template <class T, CellKind kind>
  cudaError_t run(const Products& products, cudaStream_t stream) {
    Queue queue(stream, products);
    const LayerGradients& g = layer_.gradients;
    const int64_t rows = z_.steps * z_.batch;
    for (int d = 0; d < z_.directions && rows == 0; ++d) {
      if (g.weight_ih[d]) queue.fill(g.weight_ih[d], 0, samples() * columns_ * layer_.input_size * element_);
      if (g.weight_hh[d]) queue.fill(g.weight_hh[d], 0, samples() * columns_ * z_.hidden_out * element_);
      if (g.bias[d]) queue.fill(g.bias[d], 0, samples() * 4 * z_.hidden * element_);
    }
    if (sums_resets() && z_.steps == 0) {
      queue.fill(p_.grad_reset_h, 0, z_.directions * z_.batch * z_.hidden_out * element_);
      if (kind == CellKind::lstm) queue.fill(p_.grad_reset_c, 0, z_.directions * z_.batch * z_.hidden * element_);
    }
    if (z_.batch == 0) return queue.status();
    if (g.input && z_.directions > 1) queue.fill(g.input, 0, rows * layer_.input_size * element_);
    weight_hh_.fill(queue, p_.weights[0].weight_hh, p_.weights[1].weight_hh);
    weight_hr_.fill(queue, p_.weights[0].weight_hr, p_.weights[1].weight_hr);
    queue.run(begin_backward<T>, one_thread_each(z_.batch, z_.hidden, z_.directions), p_);
    for (int64_t begin = 0; begin < z_.steps && queue.ok(); begin += chunk_) {
      const int64_t end = begin + chunk_ < z_.steps ? begin + chunk_ : z_.steps;
      for (int d = 0; d < z_.directions; ++d) {
        steps_[d] = folds_ || d == 1 ? Steps{begin, end} : Steps{z_.steps - end, z_.steps - begin};
        p_.first_step[d] = steps_[d].begin;
        if (p_.recompute) compute_gates<T, kind>(queue, d);
        set_gates(d);
      }
      round_.handed_h = handed_h_, round_.handed_c = handed_c_;
      if (plan_.variant == Variant::step)
        run_rounds<T, kind>(queue, end - begin);
      else
        run_persistent(queue, z_.steps - end, z_.steps - begin);
      std::swap(handed_h_, round_.left_h);
      std::swap(handed_c_, round_.left_c);
      if (sums_resets()) {
        sum_resets<T>(queue, end - begin, z_.hidden_out, round_.reset_h, reset_total_h_, p_.grad_reset_h, begin > 0);
        if (kind == CellKind::lstm) sum_resets<T>(queue, end - begin, z_.hidden, round_.reset_c, reset_total_c_, p_.grad_reset_c, begin > 0);
      }
      for (int d = 0; d < z_.directions; ++d) add_gradients<T>(queue, d, begin == 0, end == z_.steps);
    }
    return queue.status();
  }

 private:
  int64_t samples() const { return at_least_1(layer_.gradients.samples); }
  int64_t sample_rows() const { return z_.batch / samples(); }
  // Of each sample.
  int64_t most_slabs() const { return at_least_1(512 / samples()); }
  bool adds_chunks() const { return chunk_ < z_.steps; }
  bool sums_resets() const { return p_.grad_reset_h != nullptr; }

  // Steps that go through the recurrence before the products over many steps: as many as the memory for their gradients has room for.
  // Where all sequences are detached at every k-th step, whole segments of k steps, which then run beside each other.
  void choose_chunks(const Limits& limits) {
    constexpr int64_t most_rows = int64_t{1} << 30;  // products count in 32 bits
    int64_t row_bytes = 4 * int64_t{z_.hidden} * element_;
    if (sums_resets()) row_bytes += (z_.hidden_out + (z_.cell == CellKind::lstm ? z_.hidden : 0)) * wide_bytes_;
    const int64_t most = limits.gate_gradient_bytes / row_bytes;
    const int64_t fitting = (most < most_rows ? most : most_rows) / at_least_1(z_.batch);
    const int64_t every = p_.boundaries.detach_every;
    folds_ = plan_.variant == Variant::step && every > 0 && every < z_.steps && fitting >= 2 * every;
    const int64_t segments = folds_ ? (z_.steps + every - 1) / every : 1, together = folds_ ? between(1, fitting / every, segments) : 1;
    chunk_ = folds_ ? between(1, together * every, z_.steps) : between(1, fitting, z_.steps);
    if (plan_.deals) chunk_ = between(1, limits.schedule_bytes / Scheduler::bytes_of_step(z_, plan_.all_slots), chunk_);
    round_.segment_steps = folds_ ? every : chunk_;
    round_.lane_stride = together * z_.batch;
  }

  void set_gates(int d) {
    round_.gates[d] = gates_[d];
    round_.gates_first_step[d] = p_.first_step[d];
    round_.gates_stride = 4 * int64_t{z_.hidden};
    if (p_.recompute) return;
    round_.gates[d] = static_cast<const char*>(p_.gates) + d * round_.gates_stride * element_;
    round_.gates_first_step[d] = 0;
    round_.gates_stride *= z_.directions;
  }

  // The rounds of a chunk, which are its positions [begin, end) in the order in which a direction goes.
  void run_persistent(Queue& queue, int64_t begin, int64_t end) {
    round_.visits.begin = begin, round_.visits.end = end;
    if (plan_.deals) scheduler_.make(queue, p_.boundaries, round_.visits);
    // Behind the length of a sequence no slot runs.
    for (int d = 0; d < z_.directions && p_.boundaries.lengths; ++d)
      queue.fill(p_.grad_gates[d], 0, (end - begin) * z_.batch * 4 * z_.hidden * element_);
    queue.take([&](cudaStream_t stream) {
      return plan_.variant == Variant::cluster ? cluster_backward(round_, plan_, stream) : grid_backward(round_, grid_, exchange_, stream);
    });
  }

  // Those of the segments of a chunk of so many steps, and the one that delivers what the last one left.
  template <class T, CellKind kind>
  void run_rounds(Queue& queue, int64_t chunk_steps) {
    round_.chunk_steps = chunk_steps;
    const int64_t segments = (chunk_steps + round_.segment_steps - 1) / round_.segment_steps;
    const int64_t rounds = chunk_steps < round_.segment_steps ? chunk_steps : round_.segment_steps;
    round_.lanes = segments * z_.batch;
    const LaunchShape units = one_thread_each(round_.lanes, z_.hidden, z_.directions);
    const LaunchShape projected = one_thread_each(round_.lanes, z_.hidden_out, z_.directions);
    for (int64_t r = 0; r <= rounds && queue.ok(); ++r) {
      round_.index = r;
      if (r > 0) queue.multiply(through(weight_hh_, z_.hidden_out, columns_, round_.hidden_gates, round_.from_gates));
      if (z_.projection) {
        queue.run(backward_projected<T>, projected, round_);
        if (r < rounds) queue.multiply(through(weight_hr_, z_.hidden, z_.hidden_out, round_.grad_h, round_.from_h));
      }
      queue.run(backward_cell<T, kind>, units, round_);
    }
  }

  // (D, lanes, outputs) = (D, lanes, inputs) @ weights (D, inputs, outputs).
  BatchedProduct through(const StackedWeights& weights, int64_t outputs, int64_t inputs, const void* from, void* to) const {
    BatchedProduct product{z_.dtype, wide_, z_.directions, round_.lanes, outputs, inputs};
    product.a = from, product.a_batch_stride = round_.lane_stride * inputs, product.a_row_stride = inputs, product.a_depth_stride = 1;
    product.b = weights.data(), product.b_batch_stride = outputs * inputs, product.b_depth_stride = outputs, product.b_column_stride = 1;
    product.c = to, product.c_batch_stride = round_.lane_stride * outputs, product.c_row_stride = outputs;
    return product;
  }

  // States that entered some steps of a direction: a matrix with a row for each step and sequence.
  struct Entering {
    Steps steps;
    const void* states;
    int64_t row_stride;
  };

  // Calls visit(entering) for pieces that cover `steps`, but for steps that were entered from zero.
  template <class Visit>
  void for_each_entering(int d, const Steps& steps, Visit visit) const {
    const int64_t out = z_.hidden_out, all = z_.directions * out;
    if (steps.count() <= 0) return;
    if (layer_.entering) return visit(Entering{steps, at(layer_.entering, (d * z_.steps + steps.begin) * z_.batch * out), out});
    Steps others = steps;
    const int64_t first = d ? z_.steps - 1 : 0;
    if (steps.begin <= first && first < steps.end) {
      if (p_.h_0) visit(Entering{{first, first + 1}, at(p_.h_0, d * z_.batch * out), out});
      (d ? others.end : others.begin) += d ? -1 : 1;
    }
    const int64_t before = others.begin + (d ? 1 : -1);
    if (others.count() > 0) visit(Entering{others, at(p_.output, before * z_.batch * all + d * out), all});
  }

  const void* at(const void* data, int64_t elements) const { return static_cast<const char*>(data) + elements * element_; }
  void* at(void* data, int64_t elements, int64_t bytes) const { return static_cast<char*>(data) + elements * bytes; }

  // The activated gates of the chunk's steps, from the states that entered them.
  template <class T, CellKind kind>
  void compute_gates(Queue& queue, int d) {
    const Weights& w = p_.weights[d];
    for (int64_t begin = steps_[d].begin; begin < steps_[d].end && queue.ok(); begin += product_steps_) {
      const Steps steps{begin, begin + product_steps_ < steps_[d].end ? begin + product_steps_ : steps_[d].end};
      const int64_t rows = steps.count() * z_.batch;
      const void* input = at(layer_.input, begin * z_.batch * layer_.input_size);
      queue.multiply(projection(input, layer_.input_size, rows, w.weight_ih, layer_.input_size, input_product_));
      int64_t covered = 0;
      for_each_entering(d, steps, [&](const Entering& e) { covered += e.steps.count(); });
      if (covered < steps.count()) queue.fill(state_product_, 0, rows * columns_ * wide_bytes_);
      for_each_entering(d, steps, [&](const Entering& e) {
        void* to = at(state_product_, (e.steps.begin - begin) * z_.batch * columns_, wide_bytes_);
        queue.multiply(projection(e.states, e.row_stride, e.steps.count() * z_.batch, w.weight_hh, z_.hidden_out, to));
      });
      void* gates = at(gates_[d], (begin - steps_[d].begin) * z_.batch * 4 * z_.hidden, element_);
      const GateRows gate_rows{w, z_.hidden, rows, input_product_, state_product_, gates};
      queue.run(activate_gates<T, kind>, one_thread_each(rows, z_.hidden, 1), gate_rows);
    }
  }

  // A (rows, G * H) = rows (rows, inputs) @ weight (G * H, inputs) transposed.
  BatchedProduct projection(const void* from, int64_t row_stride, int64_t rows, const void* weight, int64_t inputs, void* to) const {
    BatchedProduct product{z_.dtype, wide_, 1, rows, columns_, inputs};
    product.a = from, product.a_row_stride = row_stride, product.a_depth_stride = 1;
    product.b = weight, product.b_depth_stride = 1, product.b_column_stride = inputs;
    product.c = to, product.c_row_stride = columns_;
    return product;
  }

  // What the chunk adds to the results of one direction.
  template <class T>
  void add_gradients(Queue& queue, int d, bool first, bool last) {
    const LayerGradients& g = layer_.gradients;
    const int64_t rows = steps_[d].count() * z_.batch, inputs = layer_.input_size, hidden = z_.hidden, out = z_.hidden_out;
    if (g.input) {
      BatchedProduct product{z_.dtype, z_.dtype, 1, rows, inputs, columns_};
      product.a = p_.grad_gates[d], product.a_row_stride = 4 * hidden, product.a_depth_stride = 1;
      product.b = p_.weights[d].weight_ih, product.b_depth_stride = inputs, product.b_column_stride = 1;
      product.c = at(g.input, steps_[d].begin * z_.batch * inputs, element_), product.c_row_stride = inputs;
      product.add = z_.directions > 1;  // filled with zeros before
      queue.multiply(product);
    }
    if (!g.weight_ih[d]) return;
    const WeightSum ih{weight_ih_sum_[d] ? weight_ih_sum_[d] : g.weight_ih[d], weight_ih_sum_[d] ? wide_ : z_.dtype, inputs};
    const WeightSum hh{weight_hh_sum_[d] ? weight_hh_sum_[d] : g.weight_hh[d], weight_hh_sum_[d] ? wide_ : z_.dtype, out};
    const void* input = at(layer_.input, steps_[d].begin * z_.batch * inputs);
    add_weights(queue, d, {steps_[d], input, inputs}, ih, 0, columns_, 0, !first);
    if (z_.cell == CellKind::lstm) {
      add_hidden(queue, d, hh, 0, 4 * hidden, 0, first);
    } else {
      add_hidden(queue, d, hh, 0, 2 * hidden, 0, first);
      add_hidden(queue, d, hh, 2 * hidden, hidden, 3 * hidden, first);
    }
    if (last && weight_ih_sum_[d]) round_result<T>(queue, ih, g.weight_ih[d]);
    if (last && weight_hh_sum_[d]) round_result<T>(queue, hh, g.weight_hh[d]);
    RowSums sums{p_.grad_gates[d], steps_[d].count(), samples(), sample_rows()};
    const int64_t summed = sums.steps * sums.sample_rows;
    sums.slab_rows = at_least_1((summed + most_slabs() - 1) / most_slabs());
    sums.slabs = (summed + sums.slab_rows - 1) / sums.slab_rows;
    sums.columns = 4 * z_.hidden;
    sums.slab_sums = slab_sums_, sums.totals = bias_totals_[d], sums.result = g.bias[d], sums.add = !first;
    queue.run(sum_slabs<T>, one_thread_each(sums.samples * sums.slabs, sums.columns, 1), sums);
    queue.run(sum_of_slabs<T>, one_thread_each(sums.samples, sums.columns, 1), sums);
  }

  // A weight's gradients (samples, G * H, inputs).
  struct WeightSum {
    void* data;
    ScalarKind dtype;
    int64_t inputs;
  };

  // `count` rows of a weight's gradient, from the gates' gradients at `column` and what the weight was multiplied with.
  void add_weights(Queue& queue, int d, const Entering& states, const WeightSum& sum, int64_t row, int64_t count, int64_t column, bool add) const {
    const int64_t stride = 4 * int64_t{z_.hidden}, first = (states.steps.begin - steps_[d].begin) * z_.batch * stride + column;
    // Of one sample the rows of all steps are one matrix. Of several, those of the first sequence of each are, then those of the second, and so on.
    const bool together = samples() == 1;
    const int64_t row_step = together ? 1 : z_.batch, depth = states.steps.count() * (together ? z_.batch : 1);
    for (int64_t n = 0; n < (together ? 1 : sample_rows()); ++n) {
      BatchedProduct product{z_.dtype, sum.dtype, samples(), count, sum.inputs, depth};
      product.a = at(p_.grad_gates[d], first + n * stride), product.a_batch_stride = sample_rows() * stride;
      product.a_row_stride = 1, product.a_depth_stride = row_step * stride;
      product.b = at(states.states, n * states.row_stride), product.b_batch_stride = sample_rows() * states.row_stride;
      product.b_depth_stride = row_step * states.row_stride, product.b_column_stride = 1;
      product.c = at(sum.data, row * sum.inputs, element_bytes(sum.dtype)), product.c_batch_stride = columns_ * sum.inputs;
      product.c_row_stride = sum.inputs;
      product.add = add || n > 0;
      queue.multiply(product);
    }
  }

  void add_hidden(Queue& queue, int d, const WeightSum& sum, int64_t row, int64_t count, int64_t column, bool first) const {
    bool add = !first;
    for_each_entering(d, steps_[d], [&](const Entering& states) {
      add_weights(queue, d, states, sum, row, count, column, add);
      add = true;
    });
    const int64_t bytes = element_bytes(sum.dtype);
    for (int64_t sample = 0; sample < samples() && !add; ++sample)
      queue.fill(at(sum.data, (sample * columns_ + row) * sum.inputs, bytes), 0, count * sum.inputs * bytes);
  }

  template <class T>
  void round_result(Queue& queue, const WeightSum& sum, void* result) const {
    const Rounding rounding{sum.data, result, samples() * columns_, static_cast<int>(sum.inputs)};
    queue.run(round_all<T>, one_thread_each(rounding.rows, rounding.columns, 1), rounding);
  }

  template <class T>
  void sum_resets(Queue& queue, int64_t chunk_steps, int size, void* const (&parts)[max_directions], void* totals, void* result, bool add) const {
    const ResetSums sums{p_.boundaries, z_.steps, z_.batch, chunk_steps, size, {p_.first_step[0], p_.first_step[1]}, {parts[0], parts[1]}, totals, result, add};
    queue.run(add_resets<T>, one_thread_each(z_.batch, size, z_.directions), sums);
  }

  const BackwardLayer& layer_;
  BackwardRound round_{};
  BackwardParams& p_;  // the round's
  const Sizes z_;
  const ScalarKind wide_;  // what T is accumulated in
  Plan plan_;
  GridShape grid_;
  void* exchange_;
  int64_t element_, wide_bytes_;
  int64_t columns_;         // G * H
  bool folds_;              // segments of all sequences run beside each other
  int64_t chunk_;           // steps
  Steps steps_[max_directions];  // of the chunk at hand
  void* gates_[max_directions] = {};
  void* weight_ih_sum_[max_directions] = {};  // of all chunks, or null
  void* weight_hh_sum_[max_directions] = {};
  void* bias_totals_[max_directions] = {};
  void* slab_sums_;
  int64_t product_rows_, product_steps_;
  void* input_product_;  // of product_steps_ steps
  void* state_product_;
  StackedWeights weight_hh_, weight_hr_;
  void *handed_h_, *handed_c_;              // from chunk to chunk
  void *reset_total_h_, *reset_total_c_;
  Scheduler scheduler_;
  size_t workspace_bytes_;
};

}  // namespace

size_t backward_workspace(const BackwardLayer& layer, const Setting& setting, const Limits& limits) {
  return BackwardPass(layer, setting, limits, nullptr).workspace_bytes();
}

Status backward(const BackwardLayer& layer, void* workspace, const Setting& setting, const Products& products, CUstream_st* stream,
                const Limits& limits) {
  BackwardPass pass(layer, setting, limits, workspace);
  return run(pass, layer.params.sizes, products, stream);
}

}  // namespace cuda
}  // namespace hsm
