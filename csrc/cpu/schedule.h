// Who computes what in which round: shared by the forward and the backward pass of both cells.
#pragma once

#include "common/arena.h"
#include "common/segments.h"
#include "cpu/matrix_tile.h"
#include "cpu/simd.h"
#include "cpu/threads.h"

namespace hsm {
namespace cpu {
namespace HSM_ISA {

// The work of a step as a grid: groups of sequences, times groups of hidden units. Only the workers of one group of
// sequences wait for each other.
struct Grid {
  int64_t batch_groups, unit_groups;
  // Whether a worker takes all its weights to one tile of rows after the other, or all rows to one block of weights.
  bool rows_outside;
  int64_t workers() const { return batch_groups * unit_groups; }
};

// Part `index` of `parts` nearly equal parts of [0, count). The first, which the caller has, is not smaller than the others, so that
// it waits for nobody who has what it needs.
struct Range {
  int64_t begin, end;
  static Range part(int64_t count, int64_t parts, int64_t index) {
    return {(count * index + parts - 1) / parts, (count * (index + 1) + parts - 1) / parts};
  }
};

// The slots that a group of workers runs: every `groups`-th of the schedule, so that all groups have about as much to do.
// Their states lie beside each other, in the rows from `first_row` on.
struct Slots {
  const Schedule& schedule;
  int64_t groups, group;

  static int64_t rows_of_a_group(const Schedule& schedule, int64_t groups) { return (schedule.slots + groups - 1) / groups; }
  int64_t count() const { return (schedule.slots - group + groups - 1) / groups; }
  int64_t first_row() const { return group * rows_of_a_group(schedule, groups); }
  const Segment* begin(int64_t i) const { return schedule.segments + schedule.slot_starts[i * groups + group]; }
  const Segment* end(int64_t i) const { return schedule.segments + schedule.slot_starts[i * groups + group + 1]; }
};

// A slot in the midst of its work. A direction goes through the segments, and through the steps of each, in time or against it.
struct Lane {
  const Segment* segment;   // the one that it runs
  const Segment* end;       // where its segments end
  const Segment* finished;  // the one that it ran before, in the first round after it
  int64_t done;             // steps of `segment` in the rounds before
  bool in_time;

  bool runs() const { return segment != end; }
  bool starts() const { return done == 0; }
  bool last() const { return done + 1 == steps_of(*segment); }
  int64_t step() const { return in_time ? segment->begin + done : segment->end - 1 - done; }
  const Segment* next() const { return in_time ? segment + 1 : segment - 1; }

  void advance() {
    finished = nullptr;
    if (++done < steps_of(*segment)) return;
    finished = segment;
    segment = next();
    done = 0;
  }
};

// One worker's walk along the slots of its group in one direction. Those that have something to do come first.
struct alignas(64) Walk {
  Lane* lanes;
  int64_t active, first_row;

  void start(const Slots& slots, bool in_time) {
    active = slots.count();
    first_row = slots.first_row();
    for (int64_t i = 0; i < active; ++i) {
      const Segment *first = slots.begin(i), *end = slots.end(i);
      lanes[i] = in_time ? Lane{first, end, nullptr, 0, true} : Lane{end - 1, first - 1, nullptr, 0, false};
    }
  }

  // To the next round. A slot that `lingers` stays for one more round after its last step.
  void advance(bool lingers) {
    for (int64_t i = 0; i < active; ++i)
      if (lanes[i].runs()) {
        lanes[i].advance();
      } else {
        lanes[i].finished = nullptr;
      }
    const auto idle = [&](const Lane& lane) { return !lane.runs() && !(lingers && lane.finished); };
    while (active > 0 && idle(lanes[active - 1])) --active;
  }
};

// The walks of all workers.
struct Walks {
  Walk* walks = nullptr;
  int directions = 0;

  Walks() = default;
  Walks(Arena& arena, const Grid& grid, int directions, int64_t lanes) : directions(directions) {
    walks = arena.take<Walk>(grid.workers() * directions);
    for (int64_t k = 0; k < grid.workers() * directions; ++k) {
      Lane* own = arena.take<Lane>(lanes);
      if (own) walks[k].lanes = own;
    }
  }

  Walk& at(int64_t worker, int direction) const { return walks[worker * directions + direction]; }
  int64_t active(int64_t worker) const { return at(worker, 0).active; }  // the same in every direction

  // `against_time`: the direction that goes against time.
  void start(const Schedule& schedule, const Grid& grid, int against_time) const {
    for (int64_t worker = 0; worker < grid.workers(); ++worker)
      for (int d = 0; d < directions; ++d) at(worker, d).start(Slots{schedule, grid.batch_groups, worker / grid.unit_groups}, d != against_time);
  }

  void advance(int64_t worker, bool lingers) const {
    for (int d = 0; d < directions; ++d) at(worker, d).advance(lingers);
  }
};

// The items of a worker, of `items` that the workers of a group share: blocks of outputs, for all directions.
inline Range share_of(const Grid& grid, int64_t items, int64_t worker) {
  return Range::part(items, grid.unit_groups, worker % grid.unit_groups);
}

// Calls visit(item, first lane, lanes) for the tiles of some items and lanes in a round. Every other round begins with the items that the round
// before ended with: of weights that fill more than the core's cache, their part is still there.
template <class Visit>
void for_each_tile(const Grid& grid, int64_t round, const Range& items, const Range& lanes, Visit visit) {
  const auto for_each_item = [&](auto take) {
    for (int64_t i = 0; i < items.end - items.begin; ++i) take(round % 2 == 0 ? items.begin + i : items.end - 1 - i);
  };
  const auto for_each_part = [&](auto take) {
    for (int64_t i = lanes.begin, count; i < lanes.end; i += count) {
      count = rows_at_once(lanes.end - i);
      take(i, static_cast<int>(count));
    }
  };
  if (grid.rows_outside) {
    for_each_part([&](int64_t i, int count) { for_each_item([&](int64_t item) { visit(item, i, count); }); });
  } else {
    for_each_item([&](int64_t item) { for_each_part([&](int64_t i, int count) { visit(item, i, count); }); });
  }
}

// `flops`: of the product of one full round. `weight_bytes`: of all its weights. `units`: how far they can be cut.
inline Grid choose_grid(int threads, const Schedule& schedule, int64_t rows_per_pass, double flops, double weight_bytes, int64_t units) {
  constexpr double flops_worth_a_thread = 2e6;   // in all: some ten microseconds
  constexpr double flops_worth_a_barrier = 6e4;  // per worker and round: about a microsecond
  constexpr double private_cache = 1e6;          // bytes of weights that each core keeps when every core needs them all
  // Rows of slots lie far apart: they are gone through once a round where the weights stay near for all of them.
  constexpr double near_cache = 512e3;
  const auto grid = [weight_bytes](int64_t batch_groups, int64_t unit_groups) {
    return Grid{batch_groups, unit_groups, weight_bytes <= near_cache * static_cast<double>(unit_groups)};
  };
  if (threads <= 1 || flops * static_cast<double>(schedule.rounds) < flops_worth_a_thread) return grid(1, 1);
  const int64_t by_batch = smaller(threads, larger(1, schedule.slots / rows_per_pass));
  const int64_t by_units = smaller(smaller(threads, units), larger(1, static_cast<int64_t>(flops / flops_worth_a_barrier)));
  if (weight_bytes <= private_cache && by_batch > 1) return grid(by_batch, smaller(by_units, threads / by_batch));
  return grid(smaller(by_batch, threads / by_units), by_units);
}

// Runs share(begin, end) on ranges that cover [0, count) together, and notes how much time the caller lost by not being alone: here,
// and the share.waited seconds inside of its range.
template <class Share>
void share_out(const Threads& threads, int64_t count, Share& share) {
  struct Context {
    Share& share;
    double worked;
  };
  const double start = now();
  Context context{share, 0};
  const auto run = [](int64_t begin, int64_t end, void* opaque) {
    Context& c = *static_cast<Context*>(opaque);
    const double cpu_start = begin == 0 ? cpu_time() : 0;  // of the caller, who has the first range
    c.share(begin, end);
    if (begin == 0) c.worked = cpu_time() - cpu_start;
  };
  threads.parallel_for(count, run, &context);
  const double worked = context.worked - share.waited;
  note_loss(worked, now() - start - worked);
}

// All rounds of all workers.
template <class Body>
struct RoundShare {
  const Grid& grid;
  Barrier* barriers;  // of each group of sequences
  Rounds* claims;     // of each worker
  int64_t rounds;
  Body& body;
  double waited = 0;

  // What the thread of workers [begin, end) does.
  void operator()(int64_t begin, int64_t end) {
    [[maybe_unused]] const TileUse tiles;
    const int64_t members = grid.unit_groups;
    if (members == 1) {
      // Nobody meets: a worker goes through all its rounds alone. Those that nobody has begun by then are taken over.
      for (int64_t worker = begin; worker < end; ++worker) run_alone(worker);
      for (int64_t worker = 0; worker < grid.workers(); ++worker) run_alone(worker);
      return;
    }
    for (int64_t round = 0; round < rounds; ++round) {
      for (int64_t worker = begin; worker < end; ++worker) try_round(worker, round);
      for (int64_t group = begin / members; group <= (end - 1) / members; ++group) meet(group, round, begin == 0);
    }
  }

  void run_alone(int64_t worker) {
    if (!claims[worker].claim(0)) return;
    for (int64_t round = 0; round < rounds; ++round) body(round, worker);
  }

  void try_round(int64_t worker, int64_t round) {
    if (!claims[worker].claim(round)) return;
    body(round, worker);
    barriers[worker / grid.unit_groups].arrive();
  }

  // Waits for the group's workers to finish a round; takes over what nobody has begun.
  void meet(int64_t group, int64_t round, bool measures) {
    const int64_t members = grid.unit_groups, total = (round + 1) * members;
    if (barriers[group].wait_briefly(total)) return;
    for (int64_t worker = group * members; worker < (group + 1) * members; ++worker) try_round(worker, round);
    const double start = measures ? now() : 0;
    while (!barriers[group].wait_briefly(total)) yield_core();
    if (measures) waited += now() - start;
  }
};

// Runs body(round, worker) for every round and worker; workers of one group finish a round together. `claims`: one for each worker.
template <class Body>
void run_in_rounds(const Threads& threads, const Grid& grid, Barrier* barriers, Rounds* claims, int64_t rounds, Body& body) {
  for (int64_t g = 0; g < grid.batch_groups; ++g) barriers[g] = Barrier();
  for (int64_t worker = 0; worker < grid.workers(); ++worker) claims[worker] = Rounds();
  RoundShare<Body> share{grid, barriers, claims, rounds, body};
  if (grid.workers() == 1) return share(0, 1);
  share_out(threads, grid.workers(), share);
}

// Runs body(item) for items [0, count), on several threads if the caller wants that.
template <class Body>
void run_items(const Threads& threads, bool parallel, int64_t count, Body& body) {
  struct Items {
    Body& body;
    double waited = 0;
    void operator()(int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) body(item);
    }
  } items{body};
  if (parallel) {
    share_out(threads, count, items);
  } else {
    items(0, count);
  }
}

}  // namespace HSM_ISA
}  // namespace cpu
}  // namespace hsm
