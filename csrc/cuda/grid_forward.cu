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
  const GridPlace place(shape, s.first_direction, z.batch);
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
  int turn = 0;
  for (int round = 0; round < s.rounds; ++round) {
    const int64_t index = s.begin + round;
    for (int pass = 0; pass < shape.passes; ++pass, turn ^= 1) {
      const int64_t sequences = place.columns - pass * grid_columns;
      const bool exists = unit < z.hidden && column < grid_columns && column < sequences;
      const int64_t n = place.first_column + pass * grid_columns + column, state = (d * z.batch + n) * z.hidden + unit;
      // What does not depend on the others is loaded first.
      ForwardVisit visit{};
      float pre[4] = {0, 0, 0, 0}, h = 0, c = 0, reset_h = 0, reset_c = 0;
      if (exists) {
        visit = visit_of(z, index, d, n, runs(s.round, index, d, n), resets_behind(s.round, index, d, n));
        if (visit.runs) input_preactivations<T, kind>(p.weights[d], z.hidden, unit, input_of<T>(s.round, visit), pre);
        h = load<T>(s.round.state_h, state);
        if (kind == CellKind::lstm) c = static_cast<const float*>(s.round.state_c)[state];
        if (visit.reset) reset_h = load<T>(p.boundaries.reset_h, state);
        if (visit.reset && kind == CellKind::lstm) reset_c = load<T>(p.boundaries.reset_c, state);
      }

      float* const partial = partials + turn * shape.partial_floats();
      weights.multiply(exchange_buffer(shape, s.exchange, place.group, pass, round), sequences, partial);
      sync_threads();

      UnitStep<float> out{};
      T entering = narrow<T>(0.0f);
      if (exists) {
        float product[gates];
#pragma unroll
        for (int g = 0; g < gates; ++g) product[g] = sum_of_parts(shape, partial, g * shape.units + in_block, column);
        add_state_product<kind>(product, pre);
        out = forward_unit<kind>(visit, pre, h, c);
        entering = narrow<T>(next_state(visit, out.h, h, reset_h));
      }
      // What the others wait for goes first.
      const uint32_t word = travelling_word(operand<arithmetic>(widen(entering)));
      if (!exists) continue;
      if (has_word<T>(unit)) send<T>(shape, s.exchange, place.group, pass, round, 0, unit, column, word);
      write_unit<T, kind>(s.round, visit, unit, out);
      write_hidden<T>(s.round, visit, unit, out.h, h);
      static_cast<T*>(s.round.state_h)[state] = entering;
      if (kind == CellKind::lstm) static_cast<float*>(s.round.state_c)[state] = next_state(visit, out.c, c, reset_c);
    }
    end_round(round);
  }
#else
  trap();
#endif
}

}  // namespace

cudaError_t grid_forward(const ForwardRound& round, int64_t begin, int64_t end, const GridShape& shape, void* exchange, cudaStream_t stream) {
  const Sizes& z = round.params.sizes;
  const GridForward s{round, shape, 0, begin, static_cast<int>(end - begin), static_cast<uint32_t*>(exchange)};
  const GridBeginning beginning{shape, z.hidden, 0, z.batch, z.batch, round.state_h, s.exchange};
  return with_arithmetic_and_cell(shape.arithmetic, z.cell, [&](auto arithmetic, auto cell) {
    constexpr Arithmetic a = decltype(arithmetic)::value;
    return launch_grid<a>(grid_forward_kernel<a, decltype(cell)::value>, s, beginning, z.directions, stream);
  });
}

}  // namespace cuda
}  // namespace hsm
