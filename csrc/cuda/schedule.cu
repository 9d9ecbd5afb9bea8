#include "cuda/schedule.cuh"

#include "common/segments.h"
#include "cuda/primitives.cuh"

namespace hsm {
namespace cuda {
namespace {

constexpr unsigned dealing_threads = 1024;
constexpr int64_t most_turns = 32;

HSM_HOST_DEVICE int64_t half_of(int64_t slots) { return slots > 1 ? slots / 2 : 1; }

// A warp for each sequence goes back through its steps, 32 at a time.
HSM_KERNEL(block_threads) find_segments(HSM_ARGUMENT Schedule s) {
  const int64_t n = int64_t{block_x()} * (block_threads / 32) + thread() / 32;
  const int d = static_cast<int>(block_y());
  if (n >= s.batch) return;
  const Sequences sequences{s.boundaries, s.steps};
  const int64_t begin = s.first_step[d], chunk_end = begin + s.chunk_steps, length = sequences.length(n);
  const int64_t end = length < chunk_end ? length : chunk_end;
  int32_t* const steps_from = s.steps_from + d * s.chunk_steps * s.batch;
  int32_t* const counts = s.counts + d * (s.chunk_steps + 1);
  int64_t next = end;  // where the segment ends to which the steps before belong
  for (int64_t tile = begin + (s.chunk_steps - 1) / 32 * 32; tile >= begin; tile -= 32) {
    const int64_t step = tile + lane();
    const bool starts = step < end && (step == begin || cuts(sequences, s.backward, step, n));
    const unsigned all = ballot(starts), later = all & ~((2u << lane()) - 1);
    int32_t count = 0;
    if (starts) {
      count = static_cast<int32_t>((later ? tile + lowest_bit(later) : next) - step);
      atomic_add(counts + count, 1);
    }
    if (step < chunk_end) steps_from[(step - begin) * s.batch + n] = count;
    if (all) next = tile + lowest_bit(all);
  }
}

// Where the segments of each length begin, if the longest come first. One block for each direction.
HSM_KERNEL(dealing_threads) sum_counts(HSM_ARGUMENT Schedule s) {
  const int d = static_cast<int>(block_x());
  const int32_t* const counts = s.counts + d * (s.chunk_steps + 1);
  int32_t* const places = s.places + d * (s.chunk_steps + 1);
  int32_t* const sums = shared_storage<int32_t>();
  const int t = static_cast<int>(thread());
  int32_t before = 0;
  for (int64_t longest = s.chunk_steps; longest >= 0; longest -= dealing_threads) {
    const int64_t steps = longest - t;
    const int32_t count = steps >= 0 ? counts[steps] : 0;
    sums[t] = count;
    sync_threads();
    for (int distance = 1; distance < static_cast<int>(dealing_threads); distance *= 2) {
      const int32_t other = t >= distance ? sums[t - distance] : 0;
      sync_threads();
      sums[t] += other;
      sync_threads();
    }
    if (steps >= 0) places[steps] = before + sums[t] - count;
    before += sums[dealing_threads - 1];
    sync_threads();
  }
}

HSM_KERNEL(block_threads) sort_segments(HSM_ARGUMENT Schedule s) {
  const int64_t at = int64_t{block_x()} * block_threads + thread(), all = s.chunk_steps * s.batch;
  const int d = static_cast<int>(block_y());
  if (at >= all) return;
  const int32_t steps = s.steps_from[d * all + at];
  if (steps == 0) return;
  const int32_t place = atomic_add(s.places + d * (s.chunk_steps + 1) + steps, 1);
  s.runs[d * all + place] = {static_cast<int32_t>(at % s.batch), static_cast<int32_t>(s.first_step[d] + at / s.batch), steps};
}

// Calls take(index) for the segments that a slot of this rank takes in a turn.
template <class Take>
HSM_DEVICE void for_each_taken(const Schedule& s, int64_t count, int64_t turn, int64_t rank, Take take) {
  const int64_t half = half_of(s.slots);
  if (rank >= half) return;
  const int64_t rows = (count + s.turns * half - 1) / (s.turns * half), begin = turn * rows * half;
  for (int64_t row = 0; row < rows; ++row)
    if (begin + row * half + rank < count) take(begin + row * half + rank);
}

// The place behind all segments; sort_segments has moved it behind those of one step.
HSM_DEVICE int64_t count_of(const Schedule& s, int d) { return s.places[d * (s.chunk_steps + 1) + 1]; }

// In shared memory: the steps of each slot so far. One block for each direction.
HSM_KERNEL(dealing_threads) deal(HSM_ARGUMENT Schedule s) {
  const int d = static_cast<int>(block_x());
  const Schedule::Run* const runs = s.runs + d * s.chunk_steps * s.batch;
  int32_t* const loads = shared_storage<int32_t>();
  const int64_t count = count_of(s, d);
  for (int64_t slot = thread(); slot < s.slots; slot += dealing_threads) loads[slot] = 0;
  sync_threads();
  for (int64_t turn = 0; turn < s.turns; ++turn) {
    int32_t* const ranks = s.ranks + (d * s.turns + turn) * s.slots;
    for (int64_t slot = thread(); slot < s.slots; slot += dealing_threads) {
      const int32_t mine = loads[slot];
      int32_t rank = 0;
      for (int64_t other = 0; other < s.slots; ++other) rank += loads[other] < mine || (loads[other] == mine && other < slot);
      ranks[slot] = rank;
    }
    sync_threads();
    for (int64_t slot = thread(); slot < s.slots; slot += dealing_threads)
      for_each_taken(s, count, turn, ranks[slot], [&](int64_t index) { loads[slot] += runs[index].steps; });
    sync_threads();
  }
  for (int64_t slot = thread(); slot < s.slots; slot += dealing_threads) s.rounds[d * s.slots + slot] = loads[slot];
}

// The flags of the first and of the last step of a segment.
struct Ends {
  uint32_t first, last;
};

HSM_DEVICE Ends ends_of(const Schedule& s, int direction, const Schedule::Run& run) {
  const Sequences sequences{s.boundaries, s.steps};
  const Segment segment{run.sequence, run.begin, run.begin + run.steps, 0};
  const Entry entry = sequences.entry(direction, segment);
  Ends ends{Visit::first, 0};
  if (entry.initial) ends.first |= Visit::initial;
  if (entry.reset) ends.first |= Visit::reset;
  // Where the chunk ends nothing need be cut.
  if (s.backward && entry.detached && sequences.detaches(direction ? segment.end : segment.begin, run.sequence)) ends.first |= Visit::detached;
  if (sequences.leaves(direction, segment))
    ends.last |= Visit::last;
  else if (!cuts(sequences, s.backward, direction ? segment.begin : segment.end, run.sequence))
    ends.last |= Visit::carries;
  return ends;
}

// A warp for each slot writes down its segments one after the other.
HSM_KERNEL(block_threads) write_visits(HSM_ARGUMENT Schedule s) {
  const int64_t slot = int64_t{block_x()} * (block_threads / 32) + thread() / 32;
  const int d = static_cast<int>(block_y());
  if (slot >= s.slots) return;
  const Schedule::Run* const runs = s.runs + d * s.chunk_steps * s.batch;
  const int64_t count = count_of(s, d);
  Visit* to = s.table + (d * s.slots + slot) * s.most_rounds;
  for (int64_t turn = 0; turn < s.turns; ++turn)
    for_each_taken(s, count, turn, s.ranks[(d * s.turns + turn) * s.slots + slot], [&](int64_t index) {
      const Schedule::Run run = runs[index];
      const Ends ends = ends_of(s, d, run);
      for (int32_t i = static_cast<int32_t>(lane()); i < run.steps; i += 32) {
        // Where in the segment, in the order in which the direction goes.
        const int32_t place = s.backward ? run.steps - 1 - i : i;
        uint32_t word = static_cast<uint32_t>(run.sequence) << Visit::flag_bits | Visit::is_step;
        if (place == 0) word |= ends.first;
        if (place == run.steps - 1) word |= ends.last;
        to[i] = {run.begin + (d ? run.steps - 1 - place : place), word};
      }
      to += run.steps;
    });
}

// A slot that takes segments has at most the median of the steps before, twice the mean, and takes one segment, and others that are no longer
// than those that half of the slots have got before, again twice the mean.
int64_t most_rounds_of(int64_t slots, int64_t batch, int64_t chunk_steps) { return chunk_steps * (1 + 5 * ((batch + slots - 1) / slots)); }

}  // namespace

int64_t Scheduler::bytes_of_step(const Sizes& z, int64_t slots) {
  return z.directions * (slots * most_rounds_of(slots, z.batch, 1) * int64_t{sizeof(Visit)} +
                         z.batch * int64_t{sizeof(Schedule::Run) + sizeof(int32_t)});
}

void Scheduler::reserve(Arena& arena, const Sizes& z, int64_t slots, int64_t chunk_steps) {
  Schedule& s = schedule_;
  s.steps = z.steps, s.batch = z.batch, s.directions = z.directions, s.slots = slots;
  // The more slots, the longer a turn takes.
  s.turns = between(1, most_turns * dealing_threads / slots, most_turns);
  s.most_rounds = most_rounds_of(slots, z.batch, chunk_steps);
  const int64_t rows = z.directions * chunk_steps * z.batch, lengths = z.directions * (chunk_steps + 1), all_slots = z.directions * slots;
  s.steps_from = arena.take<int32_t>(rows);
  s.counts = arena.take<int32_t>(lengths);
  s.places = arena.take<int32_t>(lengths);
  s.runs = arena.take<Schedule::Run>(rows);
  s.ranks = arena.take<int32_t>(all_slots * s.turns);
  s.table = arena.take<Visit>(all_slots * s.most_rounds);
  s.rounds = arena.take<int32_t>(all_slots);
}

void Scheduler::make(Queue& queue, const Boundaries& boundaries, Visits& visits) {
  Schedule& s = schedule_;
  s.boundaries = boundaries;
  s.backward = visits.backward;
  s.chunk_steps = visits.end - visits.begin;
  s.first_step[0] = visits.begin, s.first_step[1] = s.steps - visits.end;
  const unsigned directions = static_cast<unsigned>(s.directions);
  const auto blocks = [&](int64_t items, unsigned in_block) {
    LaunchShape shape{static_cast<unsigned>((items + in_block - 1) / in_block), directions};
    shape.threads = block_threads;
    return shape;
  };
  const auto block = [&](int64_t numbers) {
    LaunchShape shape{directions};
    shape.threads = dealing_threads;
    shape.shared_bytes = static_cast<size_t>(numbers) * sizeof(int32_t);
    return shape;
  };
  queue.fill(s.counts, 0, s.directions * (s.chunk_steps + 1) * int64_t{sizeof(int32_t)});
  queue.fill(s.table, 0, s.directions * s.slots * s.most_rounds * int64_t{sizeof(Visit)});
  queue.run(find_segments, blocks(s.batch, block_threads / 32), s);
  queue.run(sum_counts, block(dealing_threads), s);
  queue.run(sort_segments, blocks(s.chunk_steps * s.batch, block_threads), s);
  queue.run(deal, block(s.slots), s);
  queue.run(write_visits, blocks(s.slots, block_threads / 32), s);
  visits.slots = s.slots, visits.table = s.table, visits.rounds = s.rounds, visits.most_rounds = s.most_rounds;
}

}  // namespace cuda
}  // namespace hsm
