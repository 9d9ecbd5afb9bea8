#include "cuda/grid.h"

namespace hsm {
namespace cuda {
namespace {

int64_t quotient_up(int64_t x, int64_t divisor) { return (x + divisor - 1) / divisor; }

Plan step(const char* reason) {
  Plan plan;
  plan.reason = reason;
  return plan;
}

}  // namespace

GridShape grid_shape(const Sizes& z, PassKind pass, const Plan& plan) {
  GridShape s{};
  if (plan.variant != Variant::grid) return s;
  const int gates = z.cell == CellKind::lstm ? 4 : 3;
  const int64_t element = z.dtype == ScalarKind::float32 ? 4 : 2;
  s.arithmetic = plan.arithmetic;
  s.groups = static_cast<int>(quotient_up(plan.all_slots, plan.slots));
  s.blocks = plan.blocks, s.units = plan.units, s.slots = plan.slots, s.directions = plan.directions;
  s.passes = static_cast<int>(quotient_up(s.slots, grid_columns));
  s.parts = pass == PassKind::forward ? 1 : gates;
  s.part_chunks = static_cast<int>(quotient_up(z.hidden * element, grid_chunk_bytes));
  s.chunks = s.parts * s.part_chunks;
  s.tiles = static_cast<int>(quotient_up((pass == PassKind::forward ? gates : 1) * s.units, 16));
  const int64_t tile_bytes = 16 * grid_chunk_bytes, sums_bytes = 2 * s.partial_floats() * int64_t{sizeof(float)};
  const int64_t in_shared = quotient_up(s.chunks, grid_warps) - grid_held_chunks(pass, plan.arithmetic);
  s.shared_bytes = sums_bytes + (in_shared > 0 ? in_shared * grid_warps * s.tiles * tile_bytes : 0);
  return s;
}

Plan plan_grid(const Sizes& z, PassKind pass, bool cuts, Arithmetic arithmetic, const DeviceFacts& device, int blocks) {
  if (device.capability < 80) return step("the grid variant needs a GPU of compute capability 8.0 or later");
  // An even number: two 16-bit numbers that travel together have one sender.
  const int asked = blocks ? static_cast<int>(2 * quotient_up(z.hidden, 2 * int64_t{blocks})) : 0;
  if (asked > grid_most_units) return step("so few blocks of the grid variant have no room for the recurrent weights");
  // Where segments are dealt, there is work for all columns of the products, and for more groups.
  const int64_t sequences = cuts && z.batch > most_dealt_slots ? most_dealt_slots : z.batch;
  Plan best = step("the multiprocessors have no room for the recurrent weights");
  int64_t fewest = 0;
  for (int directions = z.directions; directions > 0; --directions)
    for (int units = asked ? asked : 8; units <= (asked ? asked : grid_most_units); units += 4)
      for (int groups = 1; groups <= 4 && (cuts || groups <= sequences); groups *= 2) {
        Plan plan;
        plan.variant = Variant::grid, plan.arithmetic = arithmetic;
        plan.blocks = static_cast<int>(quotient_up(z.hidden, units));
        plan.slots = static_cast<int>(quotient_up(sequences, groups));
        if (cuts) plan.slots = static_cast<int>(quotient_up(plan.slots, grid_columns) * grid_columns);
        plan.all_slots = cuts ? int64_t{groups} * plan.slots : sequences;
        plan.deals = cuts, plan.units = units, plan.directions = directions;
        const GridShape shape = grid_shape(z, pass, plan);
        plan.shared_bytes = shape.shared_bytes;
        if (shape.shared_bytes > device.shared_bytes || int64_t{directions} * groups * plan.blocks > device.multiprocessors) continue;
        // One after the other in a round.
        const int64_t passes = shape.passes * quotient_up(z.directions, directions);
        const bool more_slots = cuts && passes == fewest && units == best.units && plan.all_slots > best.all_slots;
        if (best.variant == Variant::grid && passes >= fewest && !more_slots) continue;
        fewest = passes, best = plan;
      }
  return best;
}

}  // namespace cuda
}  // namespace hsm
