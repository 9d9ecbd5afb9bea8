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
  const GridPlace place(shape, s.first_direction, s.round.visits.slots);
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
  // One more delivers what the last one left.
  const int rounds = rounds_of(s.round.visits, d, place.first_slot, place.slots) + 1;
  int turn = 0;
  for (int round = 0; round < rounds; ++round) {
    for (int pass = 0; pass < shape.passes; ++pass, turn ^= 1) {
      const int64_t slots = place.slots - pass * grid_columns, slot = place.first_slot + pass * grid_columns + column;
      const bool exists = unit < z.hidden && column < grid_columns && column < slots;
      float* const carried_at = static_cast<float*>(s.round.carried) + (d * s.round.visits.slots + slot) * z.hidden + unit;
      // What does not depend on the others is loaded first.
      BackwardVisit visit{};
      StepInputs<float> inputs{};
      float carried = 0;
      if (exists) {
        const Visit before = round > 0 ? visit_at(s.round.visits, d, slot, round - 1) : Visit{0, 0};
        visit = visit_of(d, visit_at(s.round.visits, d, slot, round), before);
        inputs = inputs_of<T, kind>(s.round, visit, unit);
        if (round > 0) carried = *carried_at;
      }

      float* const partial = partials + turn * shape.partial_floats();
      if (round > 0) weights.multiply(exchange_buffer(shape, s.exchange, place.group, pass, round), slots, partial);
      sync_threads();

      GateGradients<float> grad{};
      if (exists) {
        const float incoming = round > 0 ? sum_of_parts(shape, partial, in_block, column) : 0;
        grad = backward_unit<T, kind>(s.round, visit, unit, inputs, incoming, carried);
        *carried_at = carried;
      }
#pragma unroll
      for (int g = 0; g < gates; ++g) {
        const uint32_t word = travelling_word(operand<arithmetic>(widen(narrow<T>(grad.template of_hidden<kind>(g)))));
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

cudaError_t grid_backward(const BackwardRound& round, const GridShape& shape, void* exchange, cudaStream_t stream) {
  const GridBackward s{round, shape, 0, static_cast<uint32_t*>(exchange)};
  return with_arithmetic_and_cell(shape.arithmetic, round.params.sizes.cell, [&](auto arithmetic, auto cell) {
    constexpr Arithmetic a = decltype(arithmetic)::value;
    return launch_grid<a>(grid_backward_kernel<a, decltype(cell)::value>, s, stream);
  });
}

}  // namespace cuda
}  // namespace hsm
