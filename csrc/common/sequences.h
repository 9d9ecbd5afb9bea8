// Where the sequences of a call end, what happens on their edges, and how a direction enters a segment.
#pragma once

#include "common/host_device.h"
#include "common/params.h"

namespace hsm {

// How a direction enters a segment: from `initial` (h_0, c_0) or else from the step before, unless the state is `reset`.
// `detached`: no gradient leaves the segment there.
struct Entry {
  bool initial, reset, detached;
};

// Direction 0 runs forward in time, direction 1 in reverse.
struct Sequences {
  const Boundaries& boundaries;
  int64_t steps;

  // Never above L, whatever was given: the masks are read by it.
  HSM_HOST_DEVICE int64_t length(int64_t n) const {
    return boundaries.lengths && boundaries.lengths[n] < steps ? boundaries.lengths[n] : steps;
  }

  // Whether the state that crosses an edge of sequence n is replaced, or its gradient cut. An edge at or behind the sequence's
  // end does nothing.
  HSM_HOST_DEVICE bool resets(int64_t edge, int64_t n) const {
    const Boundaries& b = boundaries;
    return b.reset_mask && edge < length(n) && b.reset_mask[edge * b.reset_step_stride + n * b.reset_batch_stride];
  }
  HSM_HOST_DEVICE bool detaches(int64_t edge, int64_t n) const {
    const Boundaries& b = boundaries;
    return b.detach_mask && edge < length(n) && b.detach_mask[edge * b.detach_step_stride + n * b.detach_batch_stride];
  }

  // A segment that begins inside its sequence was cut there: by a reset, or else by a detach.
  HSM_HOST_DEVICE Entry entry(int direction, const Segment& segment) const {
    const int64_t n = segment.sequence;
    if (direction) {
      // The reverse direction crosses no edge to enter the last step.
      if (segment.end == length(n)) return {true, false, false};
      const bool reset = resets(segment.end, n);
      return {false, reset, !reset};
    }
    const bool reset = resets(segment.begin, n);
    if (segment.begin == 0) return {true, reset, !reset && detaches(0, n)};
    return {false, reset, !reset};
  }

  // Whether a direction leaves its sequence at the end of the segment.
  HSM_HOST_DEVICE bool leaves(int direction, const Segment& segment) const {
    return direction ? segment.begin == 0 : segment.end == length(segment.sequence);
  }
};

}  // namespace hsm
