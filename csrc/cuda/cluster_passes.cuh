// The rounds of a pass by the cluster variant.
#pragma once

#include <type_traits>

#include "cuda/backward.cuh"
#include "cuda/cluster.h"
#include "cuda/forward.cuh"

namespace hsm {
namespace cuda {

// Rounds [begin, end), from the states in `round` to the states there.
cudaError_t cluster_forward(const ForwardRound& round, int64_t begin, int64_t end, const Plan& plan, cudaStream_t stream);

// Calls function(std::integral_constant<Arithmetic, ...>{}).
template <class Function>
cudaError_t with_arithmetic(Arithmetic arithmetic, Function function) {
  switch (arithmetic) {
    case Arithmetic::bfloat16: return function(std::integral_constant<Arithmetic, Arithmetic::bfloat16>{});
    case Arithmetic::float16: return function(std::integral_constant<Arithmetic, Arithmetic::float16>{});
    case Arithmetic::tf32: return function(std::integral_constant<Arithmetic, Arithmetic::tf32>{});
    default: return function(std::integral_constant<Arithmetic, Arithmetic::float32>{});
  }
}

}  // namespace cuda
}  // namespace hsm
