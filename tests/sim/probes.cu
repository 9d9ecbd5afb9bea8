// The kernels of the GPU probes, run small.
#include "kernels.cuh"
#include "sim/library.h"

using namespace probes;

namespace {

LaunchShape shape_of(unsigned blocks, size_t shared_bytes) {
  LaunchShape shape{blocks};
  shape.threads = threads;
  shape.shared_bytes = shared_bytes;
  return shape;
}

Together together_of(unsigned cluster, bool cooperative) {
  Together together;
  together.cluster = cluster;
  together.cooperative = cooperative;
  return together;
}

}  // namespace

// Each returns a cudaError_t and fills errors (blocks * threads).
SIM_EXPORT int probe_exchange_in_cluster(unsigned ranks, unsigned chunks, unsigned steps, int* errors) {
  const LaunchShape shape = shape_of(ranks, 2 * chunks * sizeof(Words4) + 2 * sizeof(Mbarrier));
  return launch_together(exchange_in_cluster, shape, together_of(ranks, false), nullptr, chunks, steps, errors);
}
SIM_EXPORT int probe_gather_by_sentinel(unsigned blocks, unsigned chunks, unsigned steps, Words4* buffers, int* errors) {
  return launch_together(gather_by_sentinel, shape_of(blocks, 0), together_of(1, true), nullptr, chunks, steps, true, buffers, errors);
}
SIM_EXPORT int probe_multiply(unsigned passes, int* errors) {
  return launch(multiply_from_registers<16>, shape_of(1, b_words_per_column * 16 * sizeof(uint32_t)), nullptr, passes, errors);
}
SIM_EXPORT int probe_link(unsigned before, int* values) { return launch(probes::link, shape_of(1, 0), nullptr, before, values); }
