// The scheduler: cuts sequences into segments that are independent of each other, and deals them to slots.
//
// Plain loops over plain arrays that the caller provides; nothing is allocated. The order of work is
//   count_segments, once per sequence; sums of the counts give `sequence_starts`;
//   write_segments, once per sequence;
//   order_by_length and deal, or else order_by_time: which slot takes which segment;
//   rank_slots; collect.
// Where segments are dealt, the longest goes first, each to the slot that has the fewest steps so far, so that slots end at about
// the same time. Where there are sequences enough, each has a slot to itself and runs by time, which is how its data lie.
#pragma once

#include "common/sequences.h"

namespace hsm {

HSM_HOST_DEVICE int32_t steps_of(const Segment& segment) { return segment.end - segment.begin; }

// Whether a pass may cut sequence n at an edge: at resets, and in the backward pass at detaches too.
HSM_HOST_DEVICE bool cuts(const Sequences& at, bool backward, int64_t edge, int64_t n) {
  return at.resets(edge, n) || (backward && at.detaches(edge, n));
}

// The number of segments of sequence n; none if it has no steps.
HSM_HOST_DEVICE int32_t count_segments(const Sequences& at, bool backward, int64_t n) {
  const int64_t length = at.length(n);
  if (length <= 0) return 0;
  int32_t count = 1;
  if (at.boundaries.reset_mask || (backward && at.boundaries.detach_mask))
    for (int64_t edge = 1; edge < length; ++edge) count += cuts(at, backward, edge, n);
  return count;
}

// Writes the segments of sequence n by time. `count` and `first` are its count_segments and its sequence start.
HSM_HOST_DEVICE void write_segments(const Sequences& at, bool backward, int64_t n, int32_t count, int32_t first, Segment* segments) {
  int64_t edge = 0;
  const int64_t length = at.length(n);
  for (int32_t k = 0; k < count; ++k) {
    Segment& segment = segments[first + k];
    segment = {static_cast<int32_t>(n), static_cast<int32_t>(edge), static_cast<int32_t>(length), first + k};
    if (k + 1 == count) return;
    do {
      ++edge;
    } while (!cuts(at, backward, edge, n));
    segment.end = static_cast<int32_t>(edge);
  }
}

// order[i]: which segment is the i-th longest; equal ones keep their order. `starts` has room for L + 2 numbers.
HSM_HOST_DEVICE void order_by_length(const Segment* segments, int64_t count, int64_t steps, int32_t* starts, int32_t* order) {
  for (int64_t length = 0; length < steps + 2; ++length) starts[length] = 0;
  // starts[L - length + 1] counts the segments of that length; summed up, starts[L - length] is where they begin.
  for (int64_t i = 0; i < count; ++i) ++starts[steps - steps_of(segments[i]) + 1];
  for (int64_t k = 1; k < steps + 2; ++k) starts[k] += starts[k - 1];
  for (int64_t i = 0; i < count; ++i) order[starts[steps - steps_of(segments[i])]++] = static_cast<int32_t>(i);
}

// A heap of slots, that with the fewest steps on top; of equal ones the first or the last.
struct SlotHeap {
  int32_t* slots;
  const int64_t* loads;
  int64_t size;
  bool first_of_equals;

  HSM_HOST_DEVICE bool before(int32_t a, int32_t b) const {
    return loads[a] == loads[b] ? (a < b) == first_of_equals : loads[a] < loads[b];
  }

  // Puts the slot at `place` where it belongs, after its load has grown.
  HSM_HOST_DEVICE void sink(int64_t place) {
    const int32_t slot = slots[place];
    for (int64_t child = 2 * place + 1; child < size; child = 2 * place + 1) {
      if (child + 1 < size && before(slots[child + 1], slots[child])) ++child;
      if (!before(slots[child], slot)) break;
      slots[place] = slots[child];
      place = child;
    }
    slots[place] = slot;
  }

  HSM_HOST_DEVICE int32_t take() {
    const int32_t top = slots[0];
    slots[0] = slots[--size];
    if (size > 0) sink(0);
    return top;
  }
};

// slot_of[i]: the slot of segment i. loads[s]: the steps of slot s. `heap` has room for `slots` numbers.
HSM_HOST_DEVICE void deal(const Segment* segments, const int32_t* order, int64_t count, int64_t slots, int32_t* slot_of, int64_t* loads,
                          int32_t* heap) {
  for (int64_t s = 0; s < slots; ++s) {
    loads[s] = 0;
    heap[s] = static_cast<int32_t>(s);  // all loads are equal: this is a heap
  }
  SlotHeap least{heap, loads, slots, true};
  for (int64_t i = 0; i < count; ++i) {
    slot_of[order[i]] = heap[0];
    loads[heap[0]] += steps_of(segments[order[i]]);
    least.sink(0);
  }
}

// The same with a slot for each sequence that has steps, and the segments in the order in which they are.
HSM_HOST_DEVICE void order_by_time(const Segment* segments, int64_t count, int32_t* order, int32_t* slot_of, int64_t* loads) {
  int32_t slot = -1;
  for (int64_t i = 0; i < count; ++i) {
    if (i == 0 || segments[i].sequence != segments[i - 1].sequence) loads[++slot] = 0;
    order[i] = static_cast<int32_t>(i);
    slot_of[i] = slot;
    loads[slot] += steps_of(segments[i]);
  }
}

// ranks[s]: how many slots come before slot s when those with more steps come first. `heap` has room for `slots` numbers.
HSM_HOST_DEVICE void rank_slots(const int64_t* loads, int64_t slots, int32_t* ranks, int32_t* heap) {
  for (int64_t s = 0; s < slots; ++s) heap[s] = static_cast<int32_t>(s);
  SlotHeap least{heap, loads, slots, false};
  for (int64_t place = slots / 2; place-- > 0;) least.sink(place);
  for (int64_t rank = slots; rank-- > 0;) ranks[least.take()] = static_cast<int32_t>(rank);
}

// Brings the segments into the order of a Schedule: by rank of their slot, within a slot in the given order.
// `places` has room for `slots` numbers.
HSM_HOST_DEVICE void collect(const Segment* segments, const int32_t* order, int64_t count, int64_t slots, const int32_t* slot_of,
                             const int32_t* ranks, int32_t* places, int32_t* slot_starts, Segment* collected) {
  for (int64_t s = 0; s <= slots; ++s) slot_starts[s] = 0;
  for (int64_t i = 0; i < count; ++i) ++slot_starts[ranks[slot_of[i]] + 1];
  for (int64_t s = 0; s < slots; ++s) {
    slot_starts[s + 1] += slot_starts[s];
    places[s] = slot_starts[s];
  }
  for (int64_t i = 0; i < count; ++i) collected[places[ranks[slot_of[order[i]]]]++] = segments[order[i]];
}

}  // namespace hsm
