#include "cuda/plan.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "cuda/cluster.h"
#include "cuda/grid.h"

namespace hsm {
namespace cuda {
namespace {

Plan step(const char* reason) {
  Plan plan;
  plan.reason = reason;
  return plan;
}

Arithmetic arithmetic_of(ScalarKind dtype, bool allow_tf32) {
  if (dtype == ScalarKind::bfloat16) return Arithmetic::bfloat16;
  if (dtype == ScalarKind::float16) return Arithmetic::float16;
  return allow_tf32 ? Arithmetic::tf32 : Arithmetic::float32;
}

constexpr int cluster_sizes[] = {1, 2, 4, 8, 16};
// Larger ones only where smaller ones do not hold the weights, or would read more of them from shared memory in every round than this, which takes
// longer than the exchange: the more blocks, the longer that is, and the fewer clusters find room on the chip.
constexpr int preferred_cluster = 8;
constexpr int64_t most_shared_weights = 64 << 10;

template <class Shape>
Plan cluster_of(const Shape& shape, Arithmetic arithmetic) {
  Plan plan;
  plan.variant = Variant::cluster;
  plan.arithmetic = arithmetic;
  plan.blocks = shape.blocks;
  plan.slots = shape.slots();
  plan.units = shape.units;
  plan.shared_weight_bytes = shape.shared_weight_bytes();
  plan.shared_bytes = shape.shared_bytes();
  return plan;
}

std::optional<Plan> cluster_of(const Sizes& z, PassKind pass, Arithmetic arithmetic, int blocks, int column_tiles, int64_t shared_bytes) {
  const int units = units_of_block(z.hidden, blocks);
  const bool all_have_units = (blocks - 1) * units < z.hidden;
  if (!all_have_units || units > most_block_units) return {};
  const Plan plan = pass == PassKind::forward
                        ? cluster_of(cluster_forward_shape(arithmetic, z.cell, z.hidden, blocks, column_tiles), arithmetic)
                        : cluster_of(cluster_backward_shape(arithmetic, z.cell, z.hidden, blocks, column_tiles), arithmetic);
  if (plan.shared_bytes > shared_bytes) return {};
  return plan;
}

// With few sequences as many blocks as there is room for share the work of a cluster; with many as few as hold the weights.
Plan plan_cluster(const Sizes& z, PassKind pass, bool cuts, const Setting& setting) {
  const DeviceFacts& device = setting.device;
  if (device.capability < 90) return step("clusters need compute capability 9.0, and code for it");
  const Arithmetic arithmetic = arithmetic_of(z.dtype, setting.allow_tf32);
  // Where segments are dealt, the rest of the chip takes some, too.
  const auto with_slots = [&](Plan plan) {
    const int64_t steps = z.steps * z.batch, most = std::min((steps + plan.slots - 1) / plan.slots, most_dealt_slots / plan.slots);
    const int64_t clusters = std::clamp<int64_t>(device.multiprocessors / (z.directions * plan.blocks), 1, most);
    plan.all_slots = cuts ? clusters * plan.slots : z.batch;
    plan.deals = cuts;
    return plan;
  };
  std::optional<Plan> fewest;
  for (int column_tiles = 1; column_tiles <= most_column_tiles; ++column_tiles) {
    std::optional<Plan> best;
    fewest.reset();
    for (const int blocks : cluster_sizes) {
      if (blocks > device.largest_cluster || (setting.request.blocks && blocks != setting.request.blocks)) continue;
      const std::optional<Plan> plan = cluster_of(z, pass, arithmetic, blocks, column_tiles, device.shared_bytes);
      if (!plan) continue;
      if (!fewest) fewest = plan;
      const int64_t clusters = z.directions * ((z.batch + plan->slots - 1) / plan->slots);
      const bool worth_it = blocks <= preferred_cluster || !best || best->shared_weight_bytes > most_shared_weights;
      if (worth_it && clusters * blocks <= device.multiprocessors) best = plan;
    }
    if (best) return with_slots(*best);
  }
  if (fewest) return with_slots(*fewest);
  return step("the recurrent weights do not fit into such a cluster");
}

constexpr Variant variants[] = {Variant::step, Variant::cluster, Variant::grid};

}  // namespace

const char* name_of(Variant variant) {
  switch (variant) {
    case Variant::cluster: return "cluster";
    case Variant::grid: return "grid";
    default: return "step";
  }
}

std::optional<Request> parse_request(const char* text) {
  for (const Variant variant : variants) {
    const char* name = name_of(variant);
    const size_t length = std::strlen(name);
    if (std::strncmp(text, name, length)) continue;
    if (!text[length]) return Request{variant, 0};
    if (text[length] != ':' || variant == Variant::step) return {};
    char* end = nullptr;
    const long blocks = std::strtol(text + length + 1, &end, 10);
    if (*end || blocks < 1 || blocks > 1024) return {};
    return Request{variant, static_cast<int>(blocks)};
  }
  return {};
}

Plan plan_recurrence(const Sizes& sizes, PassKind pass, bool cuts, const Setting& setting) {
  if (setting.request.variant == Variant::step) return step("no other variant was asked for");
  if (sizes.steps == 0 || sizes.batch == 0) return step("there are no steps to run");
  if (sizes.dtype == ScalarKind::float64) return step("only step runs float64");
  if (sizes.batch > most_persistent_sequences) return step("only step runs so many sequences");
  if (sizes.projection) return step("only step runs a projection");
  if (setting.request.variant == Variant::cluster) return plan_cluster(sizes, pass, cuts, setting);
  return plan_grid(sizes, pass, cuts, arithmetic_of(sizes.dtype, setting.allow_tf32), setting.device, setting.request.blocks);
}

std::string describe(const Plan& plan) {
  if (plan.variant == Variant::step) return std::string("step: ") + plan.reason;
  return std::string(name_of(plan.variant)) + ": as was asked for; " + std::to_string(plan.blocks) + " blocks share " +
         std::to_string(plan.slots) + (plan.deals ? " of " + std::to_string(plan.all_slots) + " slots for segments" : " sequences") + ", each has " +
         std::to_string(plan.units) + " units";
}

}  // namespace cuda
}  // namespace hsm
