// Who computes what, and where sequences are cut: shared by the forward and the backward pass of both cells.
#pragma once

#include "common/params.h"
#include "cpu/simd.h"
#include "cpu/threads.h"

namespace hsm {
namespace cpu {
namespace HSM_ISA {

// Steps, ends and edges of the sequences of one call. Direction 0 runs forward in time, direction 1 in reverse.
struct Sequences {
  const Sizes& sizes;
  const Boundaries& boundaries;

  // Never above L, whatever was given: the masks are read by it.
  int64_t length(int64_t n) const {
    return boundaries.lengths ? smaller(boundaries.lengths[n], sizes.steps) : sizes.steps;
  }
  bool active(int64_t t, int64_t n) const { return t < length(n); }

  // The step that a direction runs as its k-th.
  int64_t step(int direction, int64_t k) const { return direction ? sizes.steps - 1 - k : k; }

  // The edges that a direction crosses when it enters and when it leaves step t.
  static int64_t entered_edge(int direction, int64_t t) { return direction ? t + 1 : t; }
  static int64_t left_edge(int direction, int64_t t) { return direction ? t : t + 1; }

  // Whether the state that crosses an edge of sequence n is replaced, or its gradient cut. The caller knows that the
  // direction crosses the edge; an edge at or behind the sequence's end does nothing.
  bool resets(int64_t edge, int64_t n) const {
    const Boundaries& b = boundaries;
    return b.reset_mask && edge < length(n) && b.reset_mask[edge * b.reset_step_stride + n * b.reset_batch_stride];
  }
  bool detaches(int64_t edge, int64_t n) const {
    const Boundaries& b = boundaries;
    return b.detach_mask && edge < length(n) && b.detach_mask[edge * b.detach_step_stride + n * b.detach_batch_stride];
  }

  // Whether the state that leaves step t is replaced on its way to the direction's next step.
  bool resets_after(int direction, int64_t t, int64_t n) const {
    return boundaries.reset_mask && !(direction && t == 0) && resets(left_edge(direction, t), n);
  }

  // Whether step t is the first that a direction runs of sequence n.
  bool is_first(int direction, int64_t t, int64_t n) const { return t == (direction ? length(n) - 1 : 0); }
};

// Hands out aligned pieces of one allocation. With a null base it only measures.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}

  template <class E>
  E* take(int64_t count) {
    const size_t at = used_;
    used_ += static_cast<size_t>(round_up(count * static_cast<int64_t>(sizeof(E)), 64));
    return base_ ? reinterpret_cast<E*>(base_ + at) : nullptr;
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

// The work of a step as a grid: groups of sequences, times groups of hidden units. Only the workers of one group of
// sequences wait for each other.
struct Grid {
  int64_t batch_groups, unit_groups;
  int64_t workers() const { return batch_groups * unit_groups; }
};

// Part `index` of `parts` nearly equal parts of [0, count).
struct Range {
  int64_t begin, end;
  static Range part(int64_t count, int64_t parts, int64_t index) {
    return {count * index / parts, count * (index + 1) / parts};
  }
};

// Calls visit(direction, first row, rows, block) for the tiles of a worker's share of one product, whose outputs are cut into
// `blocks` for each direction.
template <class Visit>
void for_each_tile(const Grid& grid, const Sizes& sizes, int64_t blocks, int64_t rows_per_tile, int64_t worker, Visit visit) {
  const Range rows = Range::part(sizes.batch, grid.batch_groups, worker / grid.unit_groups);
  const Range items = Range::part(sizes.directions * blocks, grid.unit_groups, worker % grid.unit_groups);
  for (int64_t item = items.begin; item < items.end; ++item)
    for (int64_t n = rows.begin; n < rows.end; n += rows_per_tile)
      visit(static_cast<int>(item / blocks), n, static_cast<int>(smaller(rows_per_tile, rows.end - n)), item % blocks);
}

// `flops`: of the product of one step. `weight_bytes`: of all its weights. `units`: how far they can be cut.
inline Grid choose_grid(int threads, const Sizes& sizes, int64_t rows_per_pass, double flops, double weight_bytes, int64_t units) {
  constexpr double flops_worth_a_thread = 2e6;   // in all: some ten microseconds
  constexpr double flops_worth_a_barrier = 6e4;  // per worker and step: about a microsecond
  constexpr double private_cache = 1e6;          // bytes of weights that each core keeps when every core needs them all
  if (threads <= 1 || flops * static_cast<double>(sizes.steps) < flops_worth_a_thread) return {1, 1};
  const int64_t by_batch = smaller(threads, larger(1, sizes.batch / rows_per_pass));
  const int64_t by_units = smaller(smaller(threads, units), larger(1, static_cast<int64_t>(flops / flops_worth_a_barrier)));
  if (weight_bytes <= private_cache && by_batch > 1) return {by_batch, smaller(by_units, threads / by_batch)};
  return {smaller(by_batch, threads / by_units), by_units};
}

// Runs body(round, worker) for every round and worker; workers of one group finish a round together.
template <class Body>
void run_in_rounds(const Threads& threads, const Grid& grid, Barrier* barriers, int64_t rounds, Body& body) {
  struct Context {
    const Grid& grid;
    Barrier* barriers;
    int64_t rounds;
    Body& body;
  } context{grid, barriers, rounds, body};
  const auto run = [](int64_t begin, int64_t end, void* opaque) {
    Context& c = *static_cast<Context*>(opaque);
    const int64_t members = c.grid.unit_groups;
    for (int64_t round = 0; round < c.rounds; ++round) {
      for (int64_t worker = begin; worker < end; ++worker) c.body(round, worker);
      if (members == 1) continue;
      for (int64_t worker = begin; worker < end; ++worker) c.barriers[worker / members].arrive(1);
      for (int64_t group = begin / members; group <= (end - 1) / members; ++group)
        c.barriers[group].wait((round + 1) * members);
    }
  };
  if (grid.workers() == 1) {
    run(0, 1, &context);
  } else {
    threads.parallel_for(grid.workers(), run, &context);
  }
}

// Runs body(item) for items [0, count), on several threads if the caller wants that.
template <class Body>
void run_items(const Threads& threads, bool parallel, int64_t count, Body& body) {
  const auto run = [](int64_t begin, int64_t end, void* opaque) {
    for (int64_t item = begin; item < end; ++item) (*static_cast<Body*>(opaque))(item);
  };
  if (parallel) {
    threads.parallel_for(count, run, &body);
  } else {
    run(0, count, &body);
  }
}

}  // namespace HSM_ISA
}  // namespace cpu
}  // namespace hsm
