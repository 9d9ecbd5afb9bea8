// Which variant runs the recurrence of a pass, and how it shares it out. One table, read on the host, from the sizes of a call and from what the
// device can do; nothing is tried out.
//
// `step` runs everything. A persistent variant runs what fits on the chip: one kernel goes through many rounds and keeps the recurrent
// weights. None has been measured, so each runs only where it is asked for.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "common/params.h"

namespace hsm {
namespace cuda {

enum class Variant { step, cluster, grid };
const char* name_of(Variant variant);

// A visit (visits.cuh) has so many bits for the sequence.
constexpr int visit_flag_bits = 7;
constexpr int64_t most_persistent_sequences = (int64_t{1} << (32 - visit_flag_bits)) - 1;
// That segments are dealt to.
constexpr int64_t most_dealt_slots = 4096;

enum class PassKind { forward, backward };

// What the current device can do, as far as it decides.
struct DeviceFacts {
  int capability;        // 10 * major + minor: of the device, or of the code for it where that was made for an older one
  int multiprocessors;
  int64_t shared_bytes;  // that a block may have
  int largest_cluster;   // blocks
};

// A variant that was asked for, and of how many blocks its clusters or groups shall be; 0: as the table says.
struct Request {
  Variant variant = Variant::step;
  int blocks = 0;
};

// Reads "step", "cluster", "cluster:8", "grid" and the like; nothing where it is none of them.
std::optional<Request> parse_request(const char* text);

// What a call takes place in.
struct Setting {
  Request request;
  DeviceFacts device{};  // not looked at where nothing but `step` was asked for
  bool allow_tf32 = false;
};

// What products with the recurrent weights are computed in.
enum class Arithmetic { bfloat16, float16, tf32, float32 };

struct Plan {
  Variant variant = Variant::step;
  Arithmetic arithmetic{};
  int blocks = 0;  // of a cluster or group, which holds all weights of one direction
  int slots = 0;   // that it runs: each goes through one sequence, or through segments of them
  int units = 0;   // of a block
  int64_t shared_weight_bytes = 0;  // of a block: weights that registers have no room for
  int directions = 0;  // that run together; grid
  int64_t shared_bytes = 0;
  int64_t all_slots = 0;     // of a direction
  bool deals = false;        // segments to them
  const char* reason = "";   // for `step`
};

// How the recurrence of a pass would run. `cuts`: masks or lengths may cut the sequences into segments, which a persistent variant deals to as many slots
// as it has room for.
Plan plan_recurrence(const Sizes& sizes, PassKind pass, bool cuts, const Setting& setting);

// A plan in words.
std::string describe(const Plan& plan);

}  // namespace cuda
}  // namespace hsm
