// Products of a matrix that stays on the chip with a few vectors that change, by one warp.
//
// Depth counts in words of 32 bits: two neighbours of a 16-bit type, or one float. A block is 16 words deep, two instructions of mma.sync; of its
// words, lane 4 g + t takes those from 4 t on, so that it reads 16 bytes at once. The matrix lies as fragments: for each tile of 16 rows and each of
// the two instructions 16 bytes for every lane. The vectors, 8 for each tile of columns, lie one after the other, `row_words` apart.
#pragma once

#include <cstring>
#include <type_traits>

#include "cuda/cluster.h"
#include "cuda/layer.cuh"
#include "cuda/primitives.cuh"

namespace hsm {
namespace cuda {

template <Arithmetic arithmetic>
struct ElementOf {
  using type = float;
};
template <>
struct ElementOf<Arithmetic::bfloat16> {
  using type = bfloat16;
};
template <>
struct ElementOf<Arithmetic::float16> {
  using type = float16;
};
template <Arithmetic arithmetic>
using Element = typename ElementOf<arithmetic>::type;

template <Arithmetic arithmetic>
constexpr int elements_per_word = 4 / static_cast<int>(sizeof(Element<arithmetic>));

// An operand as products take it.
template <Arithmetic arithmetic, class A>
HSM_DEVICE Element<arithmetic> operand(A x) {
  if constexpr (arithmetic == Arithmetic::tf32)
    return round_to_tf32(x);
  else
    return narrow<Element<arithmetic>>(x);
}

// A word, of neighbours whose values value(k) gives.
template <Arithmetic arithmetic, class Value>
HSM_DEVICE uint32_t word_of(int word, Value value) {
  constexpr int per_word = elements_per_word<arithmetic>;
  Element<arithmetic> elements[per_word];
#pragma unroll
  for (int i = 0; i < per_word; ++i) elements[i] = operand<arithmetic>(value(word * per_word + i));
  uint32_t bits;
  std::memcpy(&bits, elements, sizeof bits);
  return bits;
}

// Those of a block that the lane multiplies in one row.
template <Arithmetic arithmetic, class Value>
HSM_DEVICE Words4 words_of_lane(int block, Value value) {
  const int word = block * block_words + 4 * (static_cast<int>(lane()) % 4);
  return {word_of<arithmetic>(word, value), word_of<arithmetic>(word + 1, value), word_of<arithmetic>(word + 2, value),
          word_of<arithmetic>(word + 3, value)};
}

// Two neighbouring fragments of a lane: one tile of 16 rows, one block deep.
struct BlockFragments {
  Words4 of[2];
};

// From the words that the lane has of a row of the upper half of the tile and of one of the lower.
HSM_DEVICE BlockFragments fragments_of(const Words4& upper, const Words4& lower) {
  return {{{upper.x, lower.x, upper.y, lower.y}, {upper.z, lower.z, upper.w, lower.w}}};
}

// In shared memory: the fragments of all lanes of one warp.
HSM_DEVICE void put_fragments(Words4* warp_fragments, const BlockFragments& fragments) {
  warp_fragments[lane()] = fragments.of[0];
  warp_fragments[32 + lane()] = fragments.of[1];
}
HSM_DEVICE BlockFragments get_fragments(const Words4* warp_fragments) { return {{warp_fragments[lane()], warp_fragments[32 + lane()]}}; }

template <Arithmetic arithmetic>
HSM_DEVICE void multiply_add(float (&d)[4], const Words4& a, uint32_t b_0, uint32_t b_1) {
  const uint32_t left[4] = {a.x, a.y, a.z, a.w}, right[2] = {b_0, b_1};
  if constexpr (arithmetic == Arithmetic::bfloat16)
    mma_bf16(d, left, right);
  else if constexpr (arithmetic == Arithmetic::float16)
    mma_fp16(d, left, right);
  else
    mma_tf32(d, left, right);
}

// Sums of a lane: (rows of the tile, columns): of row g columns 2 t and 2 t + 1, then of row g + 8. Each of two for every other instruction, so
// that fewer wait for each other.
struct TileSums {
  float of[2][4];

  HSM_DEVICE float total(int i) const { return of[0][i] + of[1][i]; }
};

// The vectors of one block for a lane.
template <int n_tiles>
struct BlockVectors {
  Words4 of[n_tiles];
};
template <int n_tiles>
HSM_DEVICE BlockVectors<n_tiles> get_vectors(const uint32_t* block, int row_words) {
  BlockVectors<n_tiles> vectors;
#pragma unroll
  for (int n = 0; n < n_tiles; ++n)
    vectors.of[n] = *reinterpret_cast<const Words4*>(block + (8 * n + lane() / 4) * row_words + 4 * (lane() % 4));
  return vectors;
}

template <Arithmetic arithmetic, int n_tiles>
HSM_DEVICE void add_block(TileSums (&sums)[n_tiles], const BlockFragments& a, const BlockVectors<n_tiles>& b) {
#pragma unroll
  for (int n = 0; n < n_tiles; ++n) {
    multiply_add<arithmetic>(sums[n].of[0], a.of[0], b.of[n].x, b.of[n].y);
    multiply_add<arithmetic>(sums[n].of[1], a.of[1], b.of[n].z, b.of[n].w);
  }
}

// The same sums in float32, which no tensor core has: a lane goes through the words of its row's other three lanes, too.
template <int n_tiles>
HSM_DEVICE void add_block_in_float32(TileSums (&sums)[n_tiles], const Words4* warp_fragments, const uint32_t* block, int row_words) {
  const float* vectors = reinterpret_cast<const float*>(block) + 2 * (lane() % 4) * row_words;
  for (int t = 0; t < 4; ++t)
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      float a[4];
      std::memcpy(a, &warp_fragments[32 * k + lane() / 4 * 4 + t], sizeof a);
#pragma unroll
      for (int n = 0; n < n_tiles; ++n)
#pragma unroll
        for (int column = 0; column < 2; ++column) {
          const float* x = vectors + (8 * n + column) * row_words + 4 * t + 2 * k;
          sums[n].of[k][column] += a[0] * x[0] + a[2] * x[1];
          sums[n].of[k][2 + column] += a[1] * x[0] + a[3] * x[1];
        }
    }
}

// Calls function(arithmetic, cell), both as std::integral_constant.
template <class Function>
cudaError_t with_arithmetic_and_cell(Arithmetic arithmetic, CellKind cell, Function function) {
  const auto with_cell = [&](auto constant) {
    if (cell == CellKind::lstm) return function(constant, std::integral_constant<CellKind, CellKind::lstm>{});
    return function(constant, std::integral_constant<CellKind, CellKind::gru>{});
  };
  switch (arithmetic) {
    case Arithmetic::bfloat16: return with_cell(std::integral_constant<Arithmetic, Arithmetic::bfloat16>{});
    case Arithmetic::float16: return with_cell(std::integral_constant<Arithmetic, Arithmetic::float16>{});
    case Arithmetic::tf32: return with_cell(std::integral_constant<Arithmetic, Arithmetic::tf32>{});
    default: return with_cell(std::integral_constant<Arithmetic, Arithmetic::float32>{});
  }
}

}  // namespace cuda
}  // namespace hsm
