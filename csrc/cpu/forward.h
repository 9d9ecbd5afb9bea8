// The forward pass of one layer. Every round is a product (states @ W_hh^T) whose tiles go through the cell equations while they are
// in cache; with a projection a second product follows. Each slot of the schedule takes one step a round. When it has ended a segment,
// it goes on with the state that enters the next one.
//
// The input's product (x @ W_ih^T + biases) is computed for a chunk of rounds at a time, small enough to stay in cache: each worker
// does that for the hidden units that are its own, and starts the recurrent sums from it.
#pragma once

#include "common/cell_math.h"
#include "cpu/bias.h"
#include "cpu/matrix_tile.h"
#include "cpu/schedule.h"
#include "cpu/vector_math.h"

namespace hsm {
namespace cpu {
namespace HSM_ISA {

// Tensors of T; the weights may be of another type, W.
template <class T, CellKind kind, class W = T>
class Forward {
  using A = typename Accumulator<T>::type;
  using E = typename Operand<T>::type;  // of weights, inputs and hidden states
  using V = Vector<A>;
  using Math = typename MathOf<A>::type;
  static constexpr int width = lanes<A>();
  static constexpr int vector = width * Multiplication<E>::per_lane;  // operands in one vector
  static constexpr int gate_count = kind == CellKind::lstm ? 4 : 3;
  static constexpr bool is_lstm = kind == CellKind::lstm;

 public:
  Forward(const ForwardParams& params, const Threads& threads, void* workspace)
      : p_(params), z_(params.sizes), at_{params.boundaries, params.sizes.steps}, threads_(threads) {
    hidden_pad_ = round_up(z_.hidden, width);
    out_pad_ = round_up(z_.hidden_out, width);
    blocks_ = hidden_pad_ / width;
    ih_depth_ = filled_depth<E>(p_.input_size);
    hh_depth_ = filled_depth<E>(z_.hidden_out);
    hr_depth_ = filled_depth<E>(z_.hidden);
    h_stride_ = larger(out_pad_, hh_depth_);
    m_stride_ = larger(hidden_pad_, hr_depth_);
    out_blocks_ = z_.projection ? (out_pad_ / width + max_columns - 1) / max_columns : 0;
    const double rows = gate_count * static_cast<double>(z_.hidden) * z_.directions;
    // Weights that leave the core's own cache before they are used again. Reading one takes as long as multiplying some times with it.
    constexpr double own_cache = 1.2e6, flops_per_far_byte = 2.6;
    const double weights = rows * static_cast<double>(z_.hidden_out + p_.input_size), bytes = weights * sizeof(W);
    double flops = 2 * weights * p_.schedule.slots;
    if (bytes > own_cache && flops < flops_per_far_byte * bytes) flops = flops_per_far_byte * bytes;
    grid_ = choose_grid(threads.count, p_.schedule, enough_rows, flops, rows * z_.hidden_out * sizeof(E), blocks_ * z_.directions);
    const int64_t lanes = Slots::rows_of_a_group(p_.schedule, grid_.batch_groups);
    rows_ = lanes * grid_.batch_groups;
    choose_chunk(lanes);
    // Weights that every worker uses once are packed block by block as they are used, in cache.
    const bool one_chunk = chunk_lanes_ == lanes && chunk_rounds_ == p_.schedule.rounds;
    const Packing ih_packing = choose_packing(p_.input_size, false, one_chunk);
    const Packing hh_packing = choose_packing(z_.hidden_out, p_.schedule.slots == 1, one_chunk && chunk_rounds_ == 1 && grid_.batch_groups == 1);
    if (hh_packing != Packing::before) grid_.rows_outside = false;
    // Weights from farther than the nearest cache come slower than the sums wait for each other, and slower still from two places.
    constexpr double nearest_cache = 66e3;
    const bool packed_before = !multiplies_tiles && hh_packing == Packing::before;
    two_blocks_ = packed_before && z_.hidden_out <= longest_sum && rows * z_.hidden_out * sizeof(E) <= nearest_cache * z_.directions;
    far_ = packed_before && rows * z_.hidden_out * sizeof(E) > own_cache * static_cast<double>(grid_.unit_groups);
    ih_scratch_ = ih_packing == Packing::as_used ? gate_count * width * ih_depth_ : 0;
    const int64_t scratch = ih_scratch_ + (hh_packing == Packing::as_used ? gate_count * width * hh_depth_ : 0);
    Arena arena(workspace);
    const int64_t states = z_.directions * rows_;
    barriers_ = arena.take<Barrier>(grid_.batch_groups);
    claims_ = arena.take<Rounds>(grid_.workers());
    walks_ = Walks(arena, grid_, z_.directions, lanes);
    chunks_ = arena.take<Chunk>(grid_.workers());
    for (int64_t worker = 0; worker < grid_.workers(); ++worker) {
      const Chunk chunk{arena.take<Lane>(lanes), arena.take<int64_t>(chunk_rounds_ + 1),
                        arena.take<E>(z_.directions * chunk_rows_ * ih_depth_), arena.take<A>(share_ * chunk_rows_ * 4 * width),
                        arena.take<E>(scratch)};
      if (chunk.lanes) chunks_[worker] = chunk;
    }
    bias_ = arena.take<A>(z_.directions * 4 * hidden_pad_);
    for (E*& h : h_) h = arena.take<E>(states * h_stride_);
    c_ = arena.take<A>(is_lstm ? states * hidden_pad_ : 0);
    m_ = arena.take<E>(z_.projection ? states * m_stride_ : 0);
    for (int d = 0; d < z_.directions; ++d) {
      ih_[d] = matrix(arena, p_.weights[d].weight_ih, p_.input_size, ih_depth_, ih_packing);
      hh_[d] = matrix(arena, p_.weights[d].weight_hh, z_.hidden_out, hh_depth_, hh_packing);
      packed_hr_[d] = arena.take<E>(z_.projection ? out_blocks_ * max_columns * width * hr_depth_ : 0);
    }
    plan_ = {instruction_set, arena.used(), grid_.batch_groups, grid_.unit_groups, ih_packing, hh_packing, chunk_lanes_, chunk_rounds_};
  }

  const ForwardPlan& plan() const { return plan_; }

  void run() {
    const bool parallel = grid_.workers() > 1;
    auto pack = [this](int64_t item) { pack_item(item); };
    run_items(threads_, parallel, z_.directions * (blocks_ + out_blocks_), pack);
    walks_.start(p_.schedule, grid_, 1);
    for (int64_t group = 0; group < grid_.batch_groups; ++group)
      for (int d = 0; d < z_.directions; ++d) enter_first(d, walks_.at(group * grid_.unit_groups, d));
    auto end = [this](int64_t n) { end_sequence(n); };
    if (at_.boundaries.lengths || z_.steps == 0) run_items(threads_, parallel, z_.batch, end);
    auto round = [this](int64_t r, int64_t worker) { run_round(r, worker); };
    run_in_rounds(threads_, grid_, barriers_, claims_, p_.schedule.rounds * phases(), round);
  }

 private:
  // Rows of W, the gates', and the same packed in blocks of one vector of units, if that is done before the first step.
  struct Matrix {
    const W* rows;
    int64_t depth, packed_depth;
    Packing packing;
    E* packed;
  };

  // What a worker knows of the rounds that it has projected the input of. A row is one step of one lane.
  struct Chunk {
    Lane* lanes;          // to look ahead with
    int64_t* first_rows;  // of each round
    E* input;             // (D, rows, ih_depth)
    // (items of the worker, rows, 4, width): what the recurrent sums start from; for GRU r, z and the hidden half of n, then the
    // input half of n.
    A* starts;
    E* scratch;  // a packed block of each matrix that is used once
  };

  int phases() const { return z_.projection ? 2 : 1; }
  int count(int64_t u, int64_t size) const { return static_cast<int>(smaller(width, size - u)); }
  E* h_now(int64_t k, int d, int64_t row) const { return h_[k % 2] + (d * rows_ + row) * h_stride_; }
  E* h_next(int64_t k, int d, int64_t row) const { return h_[(k + 1) % 2] + (d * rows_ + row) * h_stride_; }
  A* c_at(int d, int64_t row) const { return c_ + (d * rows_ + row) * hidden_pad_; }
  E* m_at(int d, int64_t row) const { return m_ + (d * rows_ + row) * m_stride_; }
  const A* bias_at(int d, int64_t u) const { return bias_ + (d * hidden_pad_ + u) * 4; }
  int64_t place(int64_t t, int d, int64_t n) const { return (t * z_.batch + n) * z_.directions + d; }
  // Elements u.. of sequence n in a (D, N, size) tensor that may be missing: zeros then.
  V state_at(const void* tensor, int d, int64_t n, int64_t size, int64_t u) const {
    return tensor ? load(static_cast<const T*>(tensor) + (d * z_.batch + n) * size + u, count(u, size)) : V{};
  }

  Matrix matrix(Arena& arena, const void* rows, int64_t depth, int64_t packed_depth, Packing packing) const {
    E* packed = packing == Packing::before ? arena.take<E>(hidden_pad_ * gate_count * packed_depth) : nullptr;
    return {static_cast<const W*>(rows), depth, packed_depth, packing, packed};
  }

  // Packing the weights takes longer than it saves for few rows of states. Without it the lanes of each sum remain to be added up,
  // which is the more of the work the shorter the sums are. A single row at a time waits for its weights, packed or not. The order
  // of the sums is another one, too: in training, a sequence has the same bits in one call as in several.
  Packing choose_packing(int64_t depth, bool single_rows, bool once) const {
    constexpr int64_t depth_per_row = 18, most_rows_unpacked = 28, depth_per_single_row = 12;
    const int64_t rows = z_.steps * z_.batch;
    // In half the bytes they come as fast as packed ones would from a near cache.
    constexpr int64_t depth_beyond_near_cache = 192;
    if (single_rows && sizeof(W) < sizeof(T) && depth >= depth_beyond_near_cache) return Packing::none;
    const int64_t few = single_rows ? depth / depth_per_single_row : smaller(depth / depth_per_row, most_rows_unpacked);
    if (!multiplies_tiles && !p_.training && rows <= larger(1, few)) return Packing::none;
    return once ? Packing::as_used : Packing::before;
  }

  // As many rounds as the near cache holds the input's product of, or one round of a part of the lanes. A single round had better be
  // in one piece, as then the weights need not be packed first.
  void choose_chunk(int64_t lanes) {
    constexpr int64_t fewest_rows = smaller(8 * max_rows, 64);  // fewer rows make too little of a load of the weights
    const int64_t bytes = p_.schedule.rounds == 1 ? 1024e3 : 256e3;
    share_ = (z_.directions * blocks_ + grid_.unit_groups - 1) / grid_.unit_groups;
    const int64_t fitting = bytes / (share_ * 4 * width * static_cast<int64_t>(sizeof(A)));
    const int64_t rows = larger(fitting / max_rows * max_rows, fewest_rows);
    const int64_t parts = larger(1, (lanes + rows / 2) / rows);  // of equal size
    chunk_lanes_ = larger(1, smaller(lanes, round_up((lanes + parts - 1) / parts, max_rows)));
    chunk_rounds_ = larger(1, smaller(p_.schedule.rounds, rows / chunk_lanes_));
    chunk_rows_ = chunk_lanes_ * chunk_rounds_;
  }

  void pack_item(int64_t item) {
    const int d = static_cast<int>(item / (blocks_ + out_blocks_));
    const int64_t block = item % (blocks_ + out_blocks_);
    if (block >= blocks_) return pack_projection(d, block - blocks_);
    const int64_t u = block * width;
    for (const Matrix& w : {ih_[d], hh_[d]})
      if (w.packing == Packing::before) pack_block(w, u, w.packed + u * gate_count * w.packed_depth);
    pack_bias<T, kind>(p_.weights[d], z_.hidden, u, bias_ + (d * hidden_pad_ + u) * 4);
  }

  void pack_block(const Matrix& w, int64_t u, E* packed) const {
    for (int g = 0; g < gate_count; ++g)
      pack_transposed(w.rows, w.depth, w.depth, g * static_cast<int64_t>(z_.hidden) + u, count(u, z_.hidden), gate_count * width,
                      packed + g * vector);
  }

  // The packed block of the units from u on, if there is one; packed now, into `scratch`, if it is packed as it is used.
  const E* packed_block(const Matrix& w, int64_t u, E* scratch) const {
    if (w.packing == Packing::before) return w.packed + u * gate_count * w.packed_depth;
    if (w.packing == Packing::as_used) pack_block(w, u, scratch);
    return scratch;
  }

  void pack_projection(int d, int64_t block) {
    constexpr int outputs = max_columns * width;
    for (int v = 0; v < max_columns; ++v) {
      const int64_t u = block * outputs + v * width;
      pack_transposed(static_cast<const W*>(p_.weights[d].weight_hr), z_.hidden, z_.hidden, u, static_cast<int>(larger(0, count(u, z_.hidden_out))),
                      outputs, packed_hr_[d] + block * outputs * hr_depth_ + v * vector);
    }
  }

  // What the slots of a group start with.
  void enter_first(int d, const Walk& walk) {
    for (int64_t i = 0; i < walk.active; ++i) {
      const Lane& lane = walk.lanes[i];
      const int64_t row = walk.first_row + i;
      for (int64_t u = 0; u < out_pad_; u += width) store(entering_h(d, lane.segment, lane.end, u), h_now(0, d, row) + u);
      for (int64_t u = 0; is_lstm && u < hidden_pad_; u += width) store(entering_c(d, lane.segment, lane.end, u), c_at(d, row) + u);
      for (E* h : {h_now(0, d, row), h_next(0, d, row)}) fill_up(h, out_pad_, h_stride_);
      if (z_.projection) fill_up(m_at(d, row), hidden_pad_, m_stride_);
    }
  }

  // Zeros for what products read of a row behind its whole vectors.
  static void fill_up(E* row, int64_t written, int64_t stride) { memset(row + written, 0, (stride - written) * sizeof(E)); }

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
      if (p_.gates) clear(p_.gates, t, n, 4 * static_cast<int64_t>(z_.hidden));
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
    if (round % phases() == 1) return project_round(k, worker);
    if (k > 0) walks_.advance(worker, false);
    const Range items = share_of(grid_, z_.directions * blocks_, worker);
    const int64_t active = walks_.active(worker);
    for (int64_t first = 0; first < active; first += chunk_lanes_) {
      const Range lanes{first, smaller(first + chunk_lanes_, active)};
      if (k % chunk_rounds_ == 0) project_input(worker, items, lanes);
      const Chunk& chunk = chunks_[worker];
      const int64_t first_row = chunk.first_rows[k % chunk_rounds_] - first;
      if (two_blocks_ && lanes.end - lanes.begin == 1) {
        compute_lane(k, worker, items, first, chunk.starts + (first_row + first) * 4 * width);
        continue;
      }
      for_each_tile(grid_, k, items, lanes, [&](int64_t item, int64_t i, int rows) {
        const int d = static_cast<int>(item / blocks_);
        const int64_t u = item % blocks_ * width;
        const Walk& walk = walks_.at(worker, d);
        const A* starts = chunk.starts + ((item - items.begin) * chunk_rows_ + first_row + i) * 4 * width;
        E* scratch = chunk.scratch + ih_scratch_;
        const bool is_there = hh_[d].packing == Packing::as_used && i > lanes.begin;
        const E* packed = is_there ? scratch : packed_block(hh_[d], u, scratch);
        compute_tile(k, d, walk.lanes + i, rows, walk.first_row + i, u, packed, starts);
      });
    }
  }

  // The product of the input that some lanes take in the next rounds.
  void project_input(int64_t worker, const Range& items, const Range& lanes) {
    Chunk& chunk = chunks_[worker];
    for (int d = 0; d < z_.directions; ++d) look_ahead(walks_.at(worker, d), lanes, chunk, chunk.input + d * chunk_rows_ * ih_depth_);
    const Range rows{0, chunk.first_rows[chunk_rounds_]};
    for (int64_t item = items.begin; item < items.end; ++item) {
      const int d = static_cast<int>(item / blocks_);
      const E* input = chunk.input + d * chunk_rows_ * ih_depth_;
      A* starts = chunk.starts + (item - items.begin) * chunk_rows_ * 4 * width;
      const int64_t u = item % blocks_ * width;
      const E* packed = packed_block(ih_[d], u, chunk.scratch);
      for (int64_t row = 0, count; row < rows.end; row += count) {
        count = rows_at_once(rows.end - row);
        start_rows(d, u, static_cast<int>(count), packed, input + row * ih_depth_, starts + row * 4 * width);
      }
    }
  }

  // Brings together the input of the rounds that follow, and counts their rows.
  void look_ahead(const Walk& walk, const Range& lanes, Chunk& chunk, E* input) {
    Walk ahead{chunk.lanes, walk.active, walk.first_row};
    memcpy(ahead.lanes, walk.lanes, walk.active * sizeof(Lane));
    int64_t row = 0;
    for (int64_t k = 0; k < chunk_rounds_; ++k) {
      chunk.first_rows[k] = row;
      for (int64_t i = lanes.begin; i < smaller(lanes.end, ahead.active); ++i, ++row) {
        const T* from = static_cast<const T*>(p_.input) + ahead.lanes[i].step() * p_.input_step_stride +
                        ahead.lanes[i].segment->sequence * p_.input_batch_stride;
        E* to = input + row * ih_depth_;
        if constexpr (sizeof(E) == sizeof(T)) {
          memcpy(to, from, p_.input_size * sizeof(T));
        } else {
          for (int64_t j = 0; j < p_.input_size; j += width) store(load(from + j, count(j, p_.input_size)), to + j, count(j, p_.input_size));
        }
        for (int64_t j = p_.input_size; j < ih_depth_; ++j) to[j] = E{};
      }
      ahead.advance(false);
    }
    chunk.first_rows[chunk_rounds_] = row;
  }

  // x @ W_ih^T + biases, as Chunk::starts has it.
  void start_rows(int d, int64_t u, int rows, const E* packed, const E* input, A* starts) {
    alignas(64) A product[max_rows * gate_count * width];
    const A* bias = bias_at(d, u);
    multiply(ih_[d], u, packed, rows, {bias, 0}, input, ih_depth_, is_lstm ? starts : product);
    for (int r = 0; r < rows && !is_lstm; ++r) {
      A* start = starts + r * 4 * width;
      for (int g = 0; g < gate_count; ++g) store(load(product + (r * gate_count + g) * width), start + (g < 2 ? g : 3) * width);
      store(load(bias + 3 * width), start + 2 * width);
    }
  }

  // The gates of one vector of units from u on, whose weights are `packed`, for some rows of states.
  void multiply(const Matrix& w, int64_t u, const E* packed, int rows, Start<A> start, const E* states, int64_t row_stride, A* result) {
    if (w.packing != Packing::none) return multiply_block<E, gate_count>(rows, start, states, row_stride, 1, packed, w.depth, result);
    switch (rows) {
      case 1: return multiply_unpacked_rows<1>(w, u, start, states, row_stride, result);
      case 2: return multiply_unpacked_rows<2>(w, u, start, states, row_stride, result);
      case 3: return multiply_unpacked_rows<3>(w, u, start, states, row_stride, result);
      case 4: return multiply_unpacked_rows<4>(w, u, start, states, row_stride, result);
#if HSM_VECTOR_REGISTERS >= 32
      case 5: return multiply_unpacked_rows<5>(w, u, start, states, row_stride, result);
      case 6: return multiply_unpacked_rows<6>(w, u, start, states, row_stride, result);
#endif
    }
  }

  template <int rows>
  void multiply_unpacked_rows(const Matrix& w, int64_t u, Start<A> start, const E* states, int64_t row_stride, A* result) {
    for (int g = 0; g < gate_count; ++g) {
      V sums[rows];
      multiply_unpacked<rows>(states, row_stride, w.rows + (g * static_cast<int64_t>(z_.hidden) + u) * w.depth, w.depth, count(u, z_.hidden), sums);
      for (int r = 0; r < rows; ++r) store(load(start.data + r * start.row_stride + g * width) + sums[r], result + (r * gate_count + g) * width);
    }
  }

  // `lanes` and `row`: the first lane of the tile, and its row of states. `starts`: its first row of Chunk::starts.
  void compute_tile(int64_t k, int d, const Lane* lanes, int lane_count, int64_t row, int64_t u, const E* packed, const A* starts) {
    alignas(64) A product[max_rows * gate_count * width];
    const Start<A> start{starts, 4 * width};
    if (far_ && lane_count <= most_waiting_rows) {
      multiply_far_block<E, gate_count>(lane_count, start, h_now(k, d, row), h_stride_, 1, packed, hh_[d].depth, product);
    } else {
      multiply(hh_[d], u, packed, lane_count, start, h_now(k, d, row), h_stride_, product);
    }
    finish_tile(k, d, lanes, lane_count, row, u, product, starts);
  }

  // All items of a worker for a lane that is alone, two blocks at a time. `starts`: its row of the first item's.
  void compute_lane(int64_t k, int64_t worker, const Range& items, int64_t i, const A* starts) {
    alignas(64) A products[2][gate_count * width];
    const int64_t item_size = chunk_rows_ * 4 * width;
    for (int64_t item = items.begin; item < items.end; ++item, starts += item_size) {
      const int d = static_cast<int>(item / blocks_);
      const Walk& walk = walks_.at(worker, d);
      const int64_t u = item % blocks_ * width, row = walk.first_row + i, block_size = width * gate_count * hh_depth_;
      const E* packed = hh_[d].packed + u * gate_count * hh_depth_;
      if (item + 1 == items.end || item % blocks_ + 1 == blocks_) {
        compute_tile(k, d, walk.lanes + i, 1, row, u, packed, starts);
        continue;
      }
      multiply_two_blocks<E, gate_count>({{starts, 0}, {starts + item_size, 0}}, h_now(k, d, row), {packed, packed + block_size},
                                         hh_depth_, {products[0], products[1]});
      finish_tile(k, d, walk.lanes + i, 1, row, u, products[0], starts);
      ++item, starts += item_size;
      finish_tile(k, d, walk.lanes + i, 1, row, u + width, products[1], starts);
    }
  }

  // The cell of some rows, from the sums of their gates.
  void finish_tile(int64_t k, int d, const Lane* lanes, int lane_count, int64_t row, int64_t u, const A* product, const A* starts) {
    for (int r = 0; r < lane_count; ++r) {
      const A* hidden = product + r * gate_count * width;
      V m;
      if constexpr (is_lstm) {
        m = lstm_units(d, lanes[r], row + r, u, hidden);
      } else {
        m = gru_units(k, d, lanes[r], row + r, u, hidden, load(starts + (r * 4 + 3) * width));
      }
      if (z_.projection) {
        store_operand(m, m_at(d, row + r) + u, count(u, z_.hidden));
      } else {
        emit_hidden(k, d, lanes[r], row + r, u, m);
      }
    }
  }

  // Units that a product reads in whole lanes or tiles: zero behind the last, where products with zeros may have left NaN.
  HSM_INLINE void store_operand(V values, E* to, int units) {
    store(values, to);
    for (int unit = units; unit < smaller(filled_depth<E>(units), width); ++unit) to[unit] = E{};
  }

  V lstm_units(int d, const Lane& lane, int64_t row, int64_t u, const A* product) {
    const int units = count(u, z_.hidden);
    V pre[4];
    for (int g = 0; g < 4; ++g) pre[g] = load(product + g * width);
    A* state = c_at(d, row) + u;
    const LstmGates<V> active = lstm_gates<Math>(pre);
    V c, m;
    lstm_cell_forward<Math>(active, load(state), c, m);
    const int64_t n = lane.segment->sequence, at = place(lane.step(), d, n);
    keep_gates({active.i, active.f, active.g, active.o}, at, u);
    if (p_.c_states) store(c, static_cast<T*>(p_.c_states) + at * z_.hidden + u, units);
    if (lane.last()) {
      if (at_.leaves(d, *lane.segment)) store(c, static_cast<T*>(p_.c_n) + (d * z_.batch + n) * z_.hidden + u, units);
      c = entering_c(d, lane.next(), lane.end, u);
    }
    store(c, state);
    return m;
  }

  V gru_units(int64_t k, int d, const Lane& lane, int64_t row, int64_t u, const A* product, V input_n) {
    const V pre[4] = {load(product), load(product + width), input_n, load(product + 2 * width)};
    const GruGates<V> active = gru_gates<Math>(pre);
    keep_gates({active.r, active.z, active.n, active.h_n}, place(lane.step(), d, lane.segment->sequence), u);
    return gru_cell_forward(active, load(h_now(k, d, row) + u));
  }

  HSM_INLINE void keep_gates(const V (&gates)[4], int64_t at, int64_t u) {
    if (!p_.gates) return;
    T* to = static_cast<T*>(p_.gates) + at * 4 * z_.hidden + u;
    for (int g = 0; g < 4; ++g) store(gates[g], to + g * z_.hidden, count(u, z_.hidden));
  }

  // Writes the hidden state of a step, and what the next step starts from. The next step gets what was written, rounded as
  // it was, so that a sequence run in two calls gives the same bits; it is zero behind the last unit.
  HSM_INLINE void emit_hidden(int64_t k, int d, const Lane& lane, int64_t row, int64_t u, V h) {
    const int units = count(u, z_.hidden_out);
    const int64_t n = lane.segment->sequence;
    T* out = static_cast<T*>(p_.output) + place(lane.step(), d, n) * z_.hidden_out + u;
    store(h, out, units);
    if (lane.last()) {
      if (at_.leaves(d, *lane.segment)) store(h, static_cast<T*>(p_.h_n) + (d * z_.batch + n) * z_.hidden_out + u, units);
      h = entering_h(d, lane.next(), lane.end, u);
    } else if (sizeof(T) != sizeof(A)) {
      h = load(out, units);
    }
    store(h, h_next(k, d, row) + u);
  }

  void project_round(int64_t k, int64_t worker) {
    for_each_tile(grid_, k, share_of(grid_, z_.directions * out_blocks_, worker), {0, walks_.active(worker)},
                  [&](int64_t item, int64_t i, int rows) {
                    const int d = static_cast<int>(item / out_blocks_);
                    const Walk& walk = walks_.at(worker, d);
                    project_tile(k, d, walk.lanes + i, rows, walk.first_row + i, item % out_blocks_);
                  });
  }

  void project_tile(int64_t k, int d, const Lane* lanes, int lane_count, int64_t row, int64_t block) {
    constexpr int outputs = max_columns * width;
    alignas(64) A product[max_rows * outputs];
    multiply_block<E, max_columns>(lane_count, {}, m_at(d, row), m_stride_, 1, packed_hr_[d] + block * outputs * hr_depth_, z_.hidden,
                                   product);
    for (int r = 0; r < lane_count; ++r)
      for (int64_t u = block * outputs; u < smaller((block + 1) * outputs, out_pad_); u += width)
        emit_hidden(k, d, lanes[r], row + r, u, load(product + r * outputs + (u - block * outputs)));
  }

  const ForwardParams& p_;
  const Sizes& z_;
  Sequences at_;
  const Threads& threads_;
  Grid grid_;
  Barrier* barriers_;
  Rounds* claims_;
  Walks walks_;
  int64_t rows_;                  // of states, in each direction
  int64_t hidden_pad_, out_pad_;  // sizes in whole vectors
  int64_t ih_depth_, hh_depth_, hr_depth_;  // of the three products, filled up
  int64_t h_stride_, m_stride_;             // of their states: whole vectors, filled up
  int64_t blocks_, out_blocks_;   // of hidden units, one vector each; of projected units, max_columns vectors each
  int64_t share_;                 // the most blocks, of all directions, that one worker has
  int64_t chunk_lanes_, chunk_rounds_, chunk_rows_;  // the last is their product
  Chunk* chunks_;                 // of each worker
  A* bias_;                       // (D, blocks, 4, width)
  E* h_[2];                       // (D, rows, h_stride): what enters even and odd rounds
  A* c_;                          // (D, rows, hidden_pad)
  E* m_;                          // (D, rows, m_stride): hidden state before the projection
  int64_t ih_scratch_;            // of Chunk::scratch, what W_ih's block takes
  bool far_;                      // whether the packed recurrent weights come from far away at each step
  bool two_blocks_;               // whether a lane that is alone takes two of their blocks at a time
  Matrix ih_[max_directions], hh_[max_directions];
  E* packed_hr_[max_directions];
  ForwardPlan plan_;
};

template <class T, CellKind kind>
using ForwardWithBFloat16Weights = Forward<T, kind, BFloat16>;

}  // namespace HSM_ISA
}  // namespace cpu
}  // namespace hsm
