#include "cpu/plan.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <stdexcept>

#include "common/segments.h"

namespace hsm {
namespace cpu {

int64_t choose_slots(int64_t segments, int64_t sequences) {
  // So many rows use every load of the weights well. Then it costs more to run segments out of their order, in which the hardware
  // fetches data ahead, than it gains to run more of them.
  constexpr int64_t enough = 12;
  // With still more, the rows' own memory leaves the cache.
  constexpr int64_t best = 48;
  if (segments == sequences || sequences >= enough) return sequences;
  // Equal segments fill all slots equally often.
  const int64_t turns = std::max<int64_t>(1, (segments + best / 2) / best);
  return std::max(sequences, (segments + turns - 1) / turns);
}

Plan::Plan(const Sizes& sizes, const Boundaries& boundaries, bool backward) : sequence_starts_(sizes.batch + 1) {
  const bool whole = !boundaries.lengths && !boundaries.reset_mask && !(backward && boundaries.detach_mask);
  if (whole && sizes.steps > 0 && sizes.batch <= std::numeric_limits<int32_t>::max()) {
    // What all that follows comes to: a slot for each sequence, which is one segment.
    std::iota(sequence_starts_.begin(), sequence_starts_.end(), 0);
    slot_starts_ = sequence_starts_;
    segments_.resize(sizes.batch);
    for (int32_t n = 0; n < sizes.batch; ++n) segments_[n] = {n, 0, static_cast<int32_t>(sizes.steps), n};
    return;
  }
  const Sequences at{boundaries, sizes.steps};
  int64_t count = 0, sequences = 0;
  for (int64_t n = 0; n < sizes.batch; ++n) {
    sequence_starts_[n] = static_cast<int32_t>(count);
    const int64_t more = count_segments(at, backward, n);
    count += more;
    sequences += more > 0;
    if (count > std::numeric_limits<int32_t>::max()) throw std::length_error("hsm_kernels: the masks cut the sequences into more than 2^31 segments");
  }
  sequence_starts_[sizes.batch] = static_cast<int32_t>(count);

  std::vector<Segment> by_sequence(count);
  for (int64_t n = 0; n < sizes.batch; ++n)
    write_segments(at, backward, n, sequence_starts_[n + 1] - sequence_starts_[n], sequence_starts_[n], by_sequence.data());

  const int64_t slots = choose_slots(count, sequences);
  std::vector<int32_t> order(count), slot_of(count), ranks(slots), scratch(slots);
  std::vector<int64_t> loads(slots);
  segments_.resize(count);
  slot_starts_.resize(slots + 1);
  if (slots == sequences) {
    order_by_time(by_sequence.data(), count, order.data(), slot_of.data(), loads.data());
  } else {
    std::vector<int32_t> starts(sizes.steps + 2);
    order_by_length(by_sequence.data(), count, sizes.steps, starts.data(), order.data());
    deal(by_sequence.data(), order.data(), count, slots, slot_of.data(), loads.data(), scratch.data());
  }
  rank_slots(loads.data(), slots, ranks.data(), scratch.data());
  collect(by_sequence.data(), order.data(), count, slots, slot_of.data(), ranks.data(), scratch.data(), slot_starts_.data(), segments_.data());
}

Schedule Plan::schedule() const {
  const int64_t slots = static_cast<int64_t>(slot_starts_.size()) - 1;
  int64_t rounds = 0;
  for (int32_t i = 0; slots > 0 && i < slot_starts_[1]; ++i) rounds += steps_of(segments_[i]);
  return {segments_.data(), slot_starts_.data(), sequence_starts_.data(), slots, rounds};
}

}  // namespace cpu
}  // namespace hsm
