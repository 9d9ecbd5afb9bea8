// Rounds of the backward pass by the grid variant: blocks send each other the gradients of their units' pre-activations, and each multiplies those
// of all with its units' columns of the recurrent weights.
#include "cuda/grid.cuh"

namespace hsm {
namespace cuda {
namespace {

using GridBackward = GridRun<BackwardRound>;

// Shared memory: two buffers of partial products, then weights.
template <Arithmetic arithmetic, CellKind kind>
HSM_KERNEL(grid_threads) grid_backward_kernel(HSM_ARGUMENT GridBackward s) {
#ifdef HSM_HAS_MMA
  using T = Element<arithmetic>;
  constexpr int gates = gate_count<kind>;
  const GridShape& shape = s.shape;
  const Sizes& z = s.round.params.sizes;
  const GridPlace place(shape, s.first_direction, s.round.lanes);
  const int d = place.direction;
  float* const partials = shared_storage<float>();

  const T* const weight = static_cast<const T*>(s.round.params.weights[d].weight_hh);
  const GridWeights<PassKind::backward, arithmetic, kind> weights(
      shape, reinterpret_cast<Words4*>(partials), reinterpret_cast<Words4*>(partials + 2 * shape.partial_floats()), [&](int row, int chunk, int part) {
        const int gate = chunk / shape.part_chunks, unit = place.first_unit + row;
        const int k = (4 * (chunk % shape.part_chunks) + part) * part_elements<arithmetic>;
        const bool exists = row < shape.units && unit < z.hidden;
        const T* from = weight + (int64_t{gate} * z.hidden + k) * z.hidden + unit;
        return pack<arithmetic>([&](int i) { return exists && k + i < z.hidden ? widen(from[int64_t{i} * z.hidden]) : 0.0f; });
      });
  sync_threads();

  const int in_block = static_cast<int>(thread()) % shape.units, column = static_cast<int>(thread()) / shape.units;
  const int unit = place.first_unit + in_block;
  int turn = 0;
  for (int round = 0; round < s.rounds; ++round) {
    const int64_t index = s.begin + round;
    for (int pass = 0; pass < shape.passes; ++pass, turn ^= 1) {
      const int64_t lanes = place.columns - pass * grid_columns;
      const bool exists = unit < z.hidden && column < grid_columns && column < lanes;
      const int64_t lane = place.first_column + pass * grid_columns + column, row = d * s.round.lane_stride + lane;
      float* const carried_at = static_cast<float*>(s.round.carried) + row * z.hidden + unit;
      // What does not depend on the others is loaded first.
      BackwardVisit visit{};
      StepInputs<float> inputs{};
      float carried = 0;
      if (exists) {
        visit = visit_of(s.round, index, d, lane);
        inputs = inputs_of<T, kind>(s.round, visit, unit);
        carried = *carried_at;
      }

      float* const partial = partials + turn * shape.partial_floats();
      // Nobody has sent anything for the first round of all.
      if (index > 0) weights.multiply(exchange_buffer(shape, s.exchange, place.group, pass, round), lanes, partial);
      sync_threads();

      GateGradients<float> grad{};
      if (exists) {
        const float incoming = index > 0 ? sum_of_parts(shape, partial, in_block, column) : 0;
        grad = backward_unit<T, kind>(s.round, visit, unit, inputs, incoming, carried);
        *carried_at = carried;
      }
#pragma unroll
      for (int g = 0; g < gates; ++g) {
        const T hidden_grad = narrow<T>(grad.template of_hidden<kind>(g));
        // For the launch that goes on.
        if (exists && round + 1 == s.rounds) static_cast<T*>(s.round.hidden_gates)[(row * gates + g) * z.hidden + unit] = hidden_grad;
        const uint32_t word = travelling_word(operand<arithmetic>(widen(hidden_grad)));
        if (exists && has_word<T>(unit)) send<T>(shape, s.exchange, place.group, pass, round, g, unit, column, word);
      }
    }
    end_round(round);
  }
#else
  trap();
#endif
}

}  // namespace

cudaError_t grid_backward(const BackwardRound& round, int64_t begin, int64_t end, const GridShape& shape, void* exchange, cudaStream_t stream) {
  const Sizes& z = round.params.sizes;
  const GridBackward s{round, shape, 0, begin, static_cast<int>(end - begin), static_cast<uint32_t*>(exchange)};
  const GridBeginning beginning{shape, z.hidden, 0, round.lanes, round.lane_stride, begin > 0 ? round.hidden_gates : nullptr, s.exchange};
  return with_arithmetic_and_cell(shape.arithmetic, z.cell, [&](auto arithmetic, auto cell) {
    constexpr Arithmetic a = decltype(arithmetic)::value;
    return launch_grid<a>(grid_backward_kernel<a, decltype(cell)::value>, s, beginning, z.directions, stream);
  });
}

}  // namespace cuda
}  // namespace hsm
