// The product of bfloat16 inside the recurrence, by tiles (AMX): rows of states times one block of packed weights.
//
// 16 rows of 32 numbers of states are a tile, the same 32 rows of one packed vector of W, and the sums of both. Sums take tiles 0 to 5,
// states tile 6, weights tile 7 and those of 4 and 5 that hold no sums.
//
// Arithmetic for Sapphire Rapids, not measured: a product occupies the unit for 16 cycles, a load of a tile takes 8. 16 rows and four
// vectors take 5 loads for 4 products, 32 rows and two vectors 4 for 4, 32 rows and three vectors 8 for 6, so that the products are the
// limit. They hide each other's latency, some 50 cycles, where four or more sums take turns. More rows halve what is read of
// the weights: 2 KB in 64 cycles, which the second cache can give, 4 KB it cannot.
#pragma once

#include <utility>

#include "cpu/amx_tiles.h"
#include "cpu/simd.h"

namespace hsm {
namespace cpu {
namespace HSM_ISA {

constexpr int tile_rows = 16, tile_depth = 32;

// Lives where a thread multiplies, and leaves its tiles as they were.
class TileUse {
 public:
  TileUse() = default;
  TileUse(const TileUse&) = delete;
  TileUse& operator=(const TileUse&) = delete;
  ~TileUse() {
    if (rows_ != 0) release_tiles();
    rows_ = 0;
  }

  // States and sums are to have so many rows.
  static HSM_INLINE void set_rows(int rows) {
    if (__builtin_expect(rows_ != rows, 0)) configure(rows);
  }

 private:
  // Costs some hundred cycles.
  static __attribute__((noinline)) void configure(int rows) {
    TileShapes shapes;
    for (int tile = 0; tile < 8; ++tile) {
      const bool of_weights = tile == 4 || tile == 5 || tile == 7;  // of whole tiles of sums, too
      shapes.rows[tile] = static_cast<uint8_t>(of_weights ? tile_rows : rows);
      shapes.row_bytes[tile] = 64;
    }
    configure_tiles(shapes);
    rows_ = rows;
  }

  static inline thread_local int rows_ = 0;
};

// Calls visit for the types of 0, 1, ...: the numbers of tiles are parts of instructions.
template <class Visit, int... k>
HSM_INLINE void for_each_of(std::integer_sequence<int, k...>, Visit visit) {
  (visit(std::integral_constant<int, k>()), ...);
}

// `row_tiles` tiles of rows, the last of which ends with row `rows`, and `vectors` of the `columns` vectors of the block.
template <int row_tiles, int vectors, int columns>
HSM_INLINE void multiply_tiles(int rows, const float* start, int64_t start_stride, const BFloat16* state, int64_t row_stride,
                               const BFloat16* packed, int64_t depth, float* result) {
  constexpr int width = lanes<float>(), sums = row_tiles * vectors, of_states = 6;
  constexpr int vector_bytes = HSM_VECTOR_BYTES, weight_tiles = sums > 4 ? 1 : 3;
  static_assert(width == tile_rows && sums <= 6, "a row of a tile is a vector, and the weights need a tile");
  constexpr std::make_integer_sequence<int, row_tiles> all_rows{};
  constexpr std::make_integer_sequence<int, vectors> all_vectors{};
  const int64_t last = row_tiles == 1 ? 0 : rows - tile_rows;  // tiles of rows may overlap
  for_each_of(all_rows, [&](auto r) __attribute__((always_inline)) {
    for_each_of(all_vectors, [&](auto v) __attribute__((always_inline)) {
      constexpr int sum = decltype(r)::value * vectors + decltype(v)::value;
      if (start) {
        load_tile<sum>(start + decltype(r)::value * last * start_stride + decltype(v)::value * width,
                       start_stride * static_cast<int64_t>(sizeof(float)));
      } else {
        zero_tile<sum>();
      }
    });
  });
  for (int64_t k = 0; k < depth; k += tile_depth)
    for_each_of(all_rows, [&](auto r) __attribute__((always_inline)) {
      load_tile<of_states>(state + decltype(r)::value * last * row_stride + k, row_stride * static_cast<int64_t>(sizeof(BFloat16)));
      for_each_of(all_vectors, [&](auto v) __attribute__((always_inline)) {
        constexpr int row_tile = decltype(r)::value, vector = decltype(v)::value;
        constexpr int of_weights = vector % weight_tiles == 0 ? 7 : 3 + vector % weight_tiles;
        if (row_tile == 0 || vectors > weight_tiles) load_tile<of_weights>(packed + (k * columns + vector * 2) * width, columns * vector_bytes);
        add_tile_product<row_tile * vectors + vector, of_states, of_weights>();
      });
    });
  for_each_of(all_rows, [&](auto r) __attribute__((always_inline)) {
    for_each_of(all_vectors, [&](auto v) __attribute__((always_inline)) {
      store_tile<decltype(r)::value * vectors + decltype(v)::value>(
          result + (decltype(r)::value * last * columns + decltype(v)::value) * width, columns * vector_bytes);
    });
  });
}

// result (rows, columns * 16) = start + state (rows, depth) @ one packed block; without a start, zero. `state` is zero behind `depth`.
template <int columns>
void multiply_block_by_tiles(int rows, const float* start, int64_t start_stride, const BFloat16* state, int64_t row_stride,
                             const BFloat16* packed, int64_t depth, float* result) {
  TileUse::set_rows(static_cast<int>(smaller(rows, tile_rows)));
  if (rows <= tile_rows) return multiply_tiles<1, columns, columns>(rows, start, start_stride, state, row_stride, packed, depth, result);
  constexpr int vectors = columns == 4 ? 2 : columns, width = lanes<float>();
  for (int v = 0; v < columns; v += vectors)
    multiply_tiles<2, vectors, columns>(rows, start ? start + v * width : nullptr, start_stride, state, row_stride, packed + v * 2 * width, depth,
                                        result + v * width);
}

}  // namespace HSM_ISA
}  // namespace cpu
}  // namespace hsm
