#include "cuda/plan.h"

#include <cstdlib>
#include <cstring>

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

Plan plan_recurrence(const Sizes& sizes, int64_t rows, PassKind, const Setting& setting) {
  if (setting.request.variant == Variant::step) return step("no other variant was asked for");
  if (sizes.steps == 0 || rows == 0) return step("there are no steps to run");
  if (sizes.dtype == ScalarKind::float64) return step("only step runs float64");
  if (sizes.projection) return step("only step runs a projection");
  Plan plan = step("the variant that was asked for runs nothing yet");
  plan.arithmetic = arithmetic_of(sizes.dtype, setting.allow_tf32);
  return plan;
}

std::string describe(const Plan& plan) {
  if (plan.variant == Variant::step) return std::string("step: ") + plan.reason;
  return std::string(name_of(plan.variant)) + ": " + plan.reason + ", " + std::to_string(plan.blocks) + " blocks for every " +
         std::to_string(plan.rows) + " sequences, each with " + std::to_string(plan.units) + " units";
}

}  // namespace cuda
}  // namespace hsm
