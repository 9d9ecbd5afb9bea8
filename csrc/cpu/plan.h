// The schedule of one pass on the CPU: where its memory is, and how many slots it has.
#pragma once

#include <vector>

#include "common/params.h"

namespace hsm {
namespace cpu {

class Plan {
 public:
  // Reads the masks. Throws std::length_error for more segments than can be counted.
  Plan(const Sizes& sizes, const Boundaries& boundaries, bool backward);

  // Valid as long as the plan.
  Schedule schedule() const;

 private:
  std::vector<Segment> segments_;
  std::vector<int32_t> slot_starts_, sequence_starts_;
};

// How many segments to run side by side, of `segments` that belong to `sequences` sequences which have steps. As many as
// sequences: none is taken out of its sequence.
int64_t choose_slots(int64_t segments, int64_t sequences);

}  // namespace cpu
}  // namespace hsm
