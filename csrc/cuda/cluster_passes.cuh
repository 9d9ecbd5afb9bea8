// The rounds of a pass by the cluster variant.
#pragma once

#include "cuda/backward.cuh"
#include "cuda/cluster.h"
#include "cuda/forward.cuh"
#include "cuda/primitives.cuh"

namespace hsm {
namespace cuda {

// Rounds [begin, end), from what rounds before them left in `round` to what they leave there.
cudaError_t cluster_forward(const ForwardRound& round, int64_t begin, int64_t end, const Plan& plan, cudaStream_t stream);

cudaError_t cluster_backward(const BackwardRound& round, int64_t begin, int64_t end, const Plan& plan, cudaStream_t stream);

// What a kernel gets: rounds [begin, end) and how they are shared out.
template <class Round, class Shape>
struct ClusterRun {
  Round round;
  int64_t begin, end;
  Shape shape;
};

// A cluster for every shape.sequences() of `rows`, in each direction.
template <class Run>
cudaError_t launch_clusters(void (*kernel)(Run), int64_t rows, const Run& s, cudaStream_t stream) {
  const int64_t clusters = (rows + s.shape.sequences() - 1) / s.shape.sequences();
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
