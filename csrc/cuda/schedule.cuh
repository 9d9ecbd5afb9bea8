// Cuts the sequences of a chunk into segments and deals them to slots, on the device: the host knows neither masks nor lengths.
//
// Segments know nothing of each other. The forward pass cuts at resets, the backward pass at detaches, too, and both where a chunk ends; what is behind
// a sequence's length belongs to no segment. The longest are dealt first, in turns: in each the slots that have the fewest steps, half of all, take the
// next segments. That ends within two percent of what is reached by giving each segment to the slot with the fewest steps, which no two threads
// can do side by side. Which of several segments of the same length comes first is left to chance: no result depends on it.
#pragma once

#include "cuda/layer.cuh"
#include "cuda/visits.cuh"

namespace hsm {
namespace cuda {

// A kernel's view of it. Sequences have `chunk_steps` entries each, for the steps of the chunk, from `first_step` on in each direction.
struct Schedule {
  struct Run {
    int32_t sequence, begin, steps;
  };

  Boundaries boundaries;
  int64_t steps, batch, chunk_steps;
  int directions;
  bool backward;
  int64_t first_step[max_directions];
  int64_t slots, turns, most_rounds;
  int32_t* steps_from;  // (D, chunk_steps, N): of the segment that begins there, or 0
  int32_t* counts;      // (D, chunk_steps + 1): of segments that have so many steps
  int32_t* places;      // (D, chunk_steps + 1): where those begin among all
  Run* runs;            // (D, chunk_steps * N): the segments, longest first
  int32_t* ranks;       // (D, turns, slots): how many slots come before in a turn
  Visit* table;         // (D, slots, most_rounds)
  int32_t* rounds;      // (D, slots)
};

class Scheduler {
 public:
  // For chunks of `chunk_steps` steps or fewer.
  void reserve(Arena& arena, const Sizes& z, int64_t slots, int64_t chunk_steps);

  // Fills the table for the chunk of `visits`, and puts it there.
  void make(Queue& queue, const Boundaries& boundaries, Visits& visits);

  // Of a step of a chunk.
  static int64_t bytes_of_step(const Sizes& z, int64_t slots);

 private:
  Schedule schedule_{};
};

}  // namespace cuda
}  // namespace hsm
