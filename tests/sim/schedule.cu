// The scheduler of the persistent kernels, alone.
#include "cuda/schedule.cuh"

#include <algorithm>
#include <cstring>
#include <vector>

#include "sim/library.h"

using namespace hsm;
using namespace hsm::cuda;

namespace {

struct Call {
  Sizes sizes{};
  int64_t slots;
  Scheduler scheduler;

  Call(int64_t steps, int64_t batch, int directions, int64_t slots) : slots(slots) {
    sizes.steps = steps, sizes.batch = batch, sizes.directions = directions;
  }
  size_t reserve(void* workspace, int64_t chunk_steps) {
    Arena arena(workspace);
    scheduler.reserve(arena, sizes, slots, chunk_steps);
    return arena.used();
  }
};

}  // namespace

// Masks are (L, N). Copies up to `room` visits of each slot, (D, slots, room), and how many there are, (D, slots). Returns how many a slot has room for in the
// table, or -1.
SIM_EXPORT int schedule_make(int steps, int batch, int directions, int slots, int begin, int end, bool backward, const bool* reset, const bool* detach,
                             const int64_t* lengths, int room, Visit* visits, int32_t* rounds) {
  Call call(steps, batch, directions, slots);
  // Where a fault is planted, kernels may write beside what they should.
  const size_t bytes = call.reserve(nullptr, end - begin), margin = bytes + (1 << 20);
  std::vector<char> memory(margin + bytes + margin, '\xff');
  call.reserve(memory.data() + margin / 64 * 64, end - begin);
  Boundaries boundaries{};
  boundaries.reset_mask = reset, boundaries.reset_step_stride = batch, boundaries.reset_batch_stride = 1;
  boundaries.detach_mask = detach, boundaries.detach_step_stride = batch, boundaries.detach_batch_stride = 1;
  boundaries.lengths = lengths;
  Visits made{backward, steps, begin, end};
  const Products none{};
  Queue queue(nullptr, none);
  call.scheduler.make(queue, boundaries, made);
  if (!queue.ok()) return -1;
  const int most_rounds = static_cast<int>(made.most_rounds);
  for (int slot = 0; slot < directions * slots; ++slot)
    std::memcpy(visits + int64_t{slot} * room, made.table + slot * made.most_rounds, sizeof(Visit) * std::min(room, most_rounds));
  std::memcpy(rounds, made.rounds, sizeof(int32_t) * directions * slots);
  return most_rounds;
}
