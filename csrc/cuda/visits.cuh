// Which step a slot of a persistent variant goes through in which round.
//
// A slot is what a column of the kernels' products stands for. Where nothing cuts the sequences each has a slot, which goes through it step by step.
// Else a table says what slots do: schedule.cuh makes it.
#pragma once

#include "cuda/device.cuh"

namespace hsm {
namespace cuda {

// A step of a sequence, or none. What is first and last is so in the order in which the direction goes.
struct Visit {
  enum Flag : uint32_t {
    is_step = 1,
    first = 2,      // of its segment: the state that enters it lies in memory
    initial = 4,    // and is that of the sequence,
    reset = 8,      // or what it is reset to; else that which left the step before
    detached = 16,  // no gradient leaves by it
    last = 32,      // of its sequence
    carries = 64,   // last of the chunk, but not of its segment: the next chunk goes on from its state, and the gradient of that comes from there
  };
  static constexpr int flag_bits = visit_flag_bits;

  int32_t step;
  uint32_t word;  // the sequence above the flags

  HSM_DEVICE bool has(Flag flag) const { return word & flag; }
  HSM_DEVICE int64_t sequence() const { return word >> flag_bits; }
};

// Those of a chunk: in each direction the positions [begin, end) in the order in which it goes. The backward pass goes through them from the end.
struct Visits {
  bool backward;
  int64_t steps;  // of the call
  int64_t begin, end;
  int64_t slots;
  const Visit* table;     // (D, slots, most_rounds), or null
  const int32_t* rounds;  // (D, slots): how many of them there are
  int64_t most_rounds;
};

HSM_DEVICE Visit visit_at(const Visits& v, int direction, int64_t slot, int64_t round) {
  if (v.table) return round < v.most_rounds ? v.table[(direction * v.slots + slot) * v.most_rounds + round] : Visit{0, 0};
  const int64_t place = v.backward ? v.end - 1 - round : v.begin + round;
  if (place < v.begin || place >= v.end) return {0, 0};
  uint32_t word = static_cast<uint32_t>(slot) << Visit::flag_bits | Visit::is_step;
  if (place == v.begin) word |= Visit::first;
  if (place == 0) word |= Visit::initial;
  if (place == v.steps - 1) word |= Visit::last;
  if (place == v.end - 1 && place < v.steps - 1) word |= Visit::carries;
  return {static_cast<int32_t>(direction ? v.steps - 1 - place : place), word};
}

// How many rounds `count` slots need, from `first` on.
HSM_DEVICE int rounds_of(const Visits& v, int direction, int64_t first, int64_t count) {
  if (!v.table) return static_cast<int>(v.end - v.begin);
  int most = 0;
  for (int64_t slot = first; slot < first + count && slot < v.slots; ++slot) {
    const int rounds = v.rounds[direction * v.slots + slot];
    if (rounds > most) most = rounds;
  }
  return most;
}

}  // namespace cuda
}  // namespace hsm
