// Rounds of the forward pass by the grid variant.
#include "cuda/grid.cuh"

namespace hsm {
namespace cuda {
namespace {

using GridForward = GridRun<ForwardRound>;

// Shared memory: two buffers of partial products, then weights.
template <Arithmetic arithmetic, CellKind kind>
HSM_KERNEL(grid_threads) grid_forward_kernel(HSM_ARGUMENT GridForward s) {
#ifdef HSM_HAS_MMA
  using T = Element<arithmetic>;
  constexpr int gates = gate_count<kind>;
  const GridShape& shape = s.shape;
  const ForwardParams& p = s.round.params;
  const Sizes& z = p.sizes;
  const GridPlace place(shape, s.first_direction, s.round.visits.slots);
  const int d = place.direction;
  float* const partials = shared_storage<float>();

  const T* const weight = static_cast<const T*>(p.weights[d].weight_hh);
  const GridWeights<PassKind::forward, arithmetic, kind> weights(
      shape, reinterpret_cast<Words4*>(partials), reinterpret_cast<Words4*>(partials + 2 * shape.partial_floats()), [&](int row, int chunk, int part) {
        const int gate = row / shape.units, unit = place.first_unit + row % shape.units;
        const int k = (4 * chunk + part) * part_elements<arithmetic>;
        const bool exists = gate < gates && unit < z.hidden;
        return pack_row<arithmetic>(weight + (int64_t{gate} * z.hidden + unit) * z.hidden + k, exists ? z.hidden - k : 0);
      });
  sync_threads();

  const int in_block = static_cast<int>(thread()) % shape.units, column = static_cast<int>(thread()) / shape.units;
  const int unit = place.first_unit + in_block;
  const int rounds = rounds_of(s.round.visits, d, place.first_slot, place.slots);
  int turn = 0;
  for (int round = 0; round < rounds; ++round) {
    for (int pass = 0; pass < shape.passes; ++pass, turn ^= 1) {
      const int64_t slots = place.slots - pass * grid_columns, slot = place.first_slot + pass * grid_columns + column;
      const bool exists = unit < z.hidden && column < grid_columns && column < slots;
      float* const slot_state = static_cast<float*>(s.round.slot_state) + (d * s.round.visits.slots + slot) * z.hidden + unit;
      // What does not depend on the others is loaded first.
      Visit visit{}, next{};
      float pre[4] = {0, 0, 0, 0}, state = 0, next_h = 0;
      if (exists) {
        visit = visit_at(s.round.visits, d, slot, round), next = visit_at(s.round.visits, d, slot, round + 1);
        if (visit.has(Visit::is_step)) input_preactivations<T, kind>(p.weights[d], z.hidden, unit, input_of<T>(s.round, visit_of(d, visit)), pre);
        if (!visit.has(Visit::first))
          state = *slot_state;
        else
          state = kind == CellKind::lstm ? entering_c<T>(s.round, d, visit, unit) : entering_h<T>(s.round, d, visit, unit);
        if (next.has(Visit::first)) next_h = entering_h<T>(s.round, d, next, unit);
      }

      float* const partial = partials + turn * shape.partial_floats();
      weights.multiply(exchange_buffer(shape, s.exchange, place.group, pass, round), slots, partial);
      sync_threads();

      UnitStep<float> out{};
      T entering = narrow<T>(0.0f);
      if (exists) {
        float product[gates];
#pragma unroll
        for (int g = 0; g < gates; ++g) product[g] = sum_of_parts(shape, partial, g * shape.units + in_block, column);
        add_state_product<kind>(product, pre);
        out = forward_unit<kind>(visit.has(Visit::is_step), pre, state, state);
        out.h = widen(narrow<T>(out.h));
        entering = narrow<T>(next.has(Visit::first) ? next_h : out.h);
      }
      // What the others wait for goes first.
      const uint32_t word = travelling_word(operand<arithmetic>(widen(entering)));
      if (!exists) continue;
      if (has_word<T>(unit)) send<T>(shape, s.exchange, place.group, pass, round, 0, unit, column, word);
      write_step<T, kind>(s.round, d, visit, unit, out);
      *slot_state = kind == CellKind::lstm ? out.c : out.h;
    }
    end_round(round);
  }
#else
  trap();
#endif
}

}  // namespace

cudaError_t grid_forward(const ForwardRound& round, const GridShape& shape, void* exchange, cudaStream_t stream) {
  const GridForward s{round, shape, 0, static_cast<uint32_t*>(exchange)};
  return with_arithmetic_and_cell(shape.arithmetic, round.params.sizes.cell, [&](auto arithmetic, auto cell) {
    constexpr Arithmetic a = decltype(arithmetic)::value;
    return launch_grid<a>(grid_forward_kernel<a, decltype(cell)::value>, s, stream);
  });
}

}  // namespace cuda
}  // namespace hsm
