// The rounds of a pass by the grid variant.
#pragma once

#include "cuda/backward.cuh"
#include "cuda/forward.cuh"
#include "cuda/grid.h"

namespace hsm {
namespace cuda {

// The rounds of a chunk. `exchange`: shape.exchange_words() words.
cudaError_t grid_forward(const ForwardRound& round, const GridShape& shape, void* exchange, cudaStream_t stream);
cudaError_t grid_backward(const BackwardRound& round, const GridShape& shape, void* exchange, cudaStream_t stream);

}  // namespace cuda
}  // namespace hsm
