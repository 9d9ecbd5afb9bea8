// The rounds of a pass by the cluster variant.
#pragma once

#include "cuda/backward.cuh"
#include "cuda/cluster.h"
#include "cuda/forward.cuh"
#include "cuda/primitives.cuh"

namespace hsm {
namespace cuda {

// The rounds of a chunk.
cudaError_t cluster_forward(const ForwardRound& round, const Plan& plan, cudaStream_t stream);
cudaError_t cluster_backward(const BackwardRound& round, const Plan& plan, cudaStream_t stream);

// What a kernel gets: the rounds and how they are shared out.
template <class Round, class Shape>
struct ClusterRun {
  Round round;
  Shape shape;
};

// A cluster for every shape.slots() slots of each direction.
template <class Run>
cudaError_t launch_clusters(void (*kernel)(Run), const Run& s, cudaStream_t stream) {
  const int64_t clusters = (s.round.visits.slots + s.shape.slots() - 1) / s.shape.slots();
  LaunchShape shape{static_cast<unsigned>(s.shape.blocks * clusters)};
  shape.grid_y = static_cast<unsigned>(s.round.params.sizes.directions);
  shape.threads = static_cast<unsigned>(32 * s.shape.warps);
  shape.shared_bytes = static_cast<size_t>(s.shape.shared_bytes());
  Together together;
  together.cluster = static_cast<unsigned>(s.shape.blocks);
  return launch_together(kernel, shape, together, stream, s);
}

}  // namespace cuda
}  // namespace hsm
