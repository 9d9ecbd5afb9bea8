// The product inside the recurrence: a few rows of states times one block of packed weights.
//
// A matrix W of `depth` rows (what is summed over) is packed in blocks of up to `columns * lanes` outputs: block after block,
// and in a block one group of `columns` vectors per row of W. Outputs behind the end are zero.
#pragma once

#include <utility>

#include "cpu/simd.h"

namespace hsm {
namespace cpu {
namespace HSM_ISA {

// Rows that share one pass over the weights: accumulators, weights and one broadcast value must fit the registers.
#if HSM_VECTOR_REGISTERS >= 32
constexpr int max_rows = 6;
#else
constexpr int max_rows = 2;
#endif
constexpr int max_columns = 4;

// What the sums are added to: row r at data + r * row_stride. Nowhere: to zero.
template <class A>
struct Start {
  const A* data = nullptr;
  int64_t row_stride = 0;
};

// Sums of so many products are added up before they are added to what there is: rounding errors grow with the length of a sum.
constexpr int64_t longest_sum = 256;

// The sums run in the same order whatever the number of rows: a sequence gives the same bits in any batch.
// Element k of row r of the states is state[r * row_stride + k * depth_stride].
template <class A, int rows, int columns>
HSM_INLINE void multiply_rows(
    Start<A> start, const A* state, int64_t row_stride, int64_t depth_stride, const A* packed, int64_t depth, A* result) {
  constexpr int width = lanes<A>();
  int64_t k = 0;
  do {
    Vector<A> sums[rows][columns];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < columns; ++v) sums[r][v] = Vector<A>{};
    for (const int64_t end = smaller(k + longest_sum, depth); k < end; ++k) {
      Vector<A> weights[columns];
#pragma GCC unroll 4
      for (int v = 0; v < columns; ++v) memcpy(&weights[v], packed + (k * columns + v) * width, sizeof(Vector<A>));
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) {
        const A value = state[r * row_stride + k * depth_stride];
#pragma GCC unroll 4
        for (int v = 0; v < columns; ++v) sums[r][v] += weights[v] * value;
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < columns; ++v) {
        if (start.data) {
          Vector<A> before;
          memcpy(&before, start.data + r * start.row_stride + v * width, sizeof before);
          sums[r][v] += before;
        }
        memcpy(result + (r * columns + v) * width, &sums[r][v], sizeof(Vector<A>));
      }
    start = {result, columns * width};
  } while (k < depth);
}

template <class A, int columns>
void multiply_block(
    int rows, Start<A> start, const A* state, int64_t row_stride, int64_t depth_stride, const A* packed, int64_t depth, A* result) {
  static_assert(max_rows <= 6, "the switch below lists every number of rows");
  switch (rows) {
    case 1: return multiply_rows<A, 1, columns>(start, state, row_stride, depth_stride, packed, depth, result);
    case 2: return multiply_rows<A, 2, columns>(start, state, row_stride, depth_stride, packed, depth, result);
#if HSM_VECTOR_REGISTERS >= 32
    case 3: return multiply_rows<A, 3, columns>(start, state, row_stride, depth_stride, packed, depth, result);
    case 4: return multiply_rows<A, 4, columns>(start, state, row_stride, depth_stride, packed, depth, result);
    case 5: return multiply_rows<A, 5, columns>(start, state, row_stride, depth_stride, packed, depth, result);
    case 6: return multiply_rows<A, 6, columns>(start, state, row_stride, depth_stride, packed, depth, result);
#endif
  }
}

// One row of states times two packed blocks of no more than `longest_sum`: the sums of one block alone would wait for each other.
template <class A, int columns>
void multiply_two_blocks(const Start<A> (&start)[2], const A* state, const A* const (&packed)[2], int64_t depth, A* const (&result)[2]) {
  constexpr int width = lanes<A>();
  Vector<A> sums[2][columns] = {};
  for (int64_t k = 0; k < depth; ++k) {
    const A value = state[k];
#pragma GCC unroll 2
    for (int b = 0; b < 2; ++b)
#pragma GCC unroll 4
      for (int v = 0; v < columns; ++v) {
        Vector<A> weights;
        memcpy(&weights, packed[b] + (k * columns + v) * width, sizeof weights);
        sums[b][v] += weights * value;
      }
  }
#pragma GCC unroll 2
  for (int b = 0; b < 2; ++b)
#pragma GCC unroll 4
    for (int v = 0; v < columns; ++v) {
      Vector<A> before;
      memcpy(&before, start[b].data + v * width, sizeof before);
      sums[b][v] += before;
      memcpy(result[b] + v * width, &sums[b][v], sizeof(Vector<A>));
    }
}

// result (rows, columns * lanes) = state (rows, depth) @ one packed block.
template <class A>
HSM_INLINE void multiply_tile(
    int rows, int columns, const A* state, int64_t state_stride, const A* packed, int64_t depth, A* result) {
  switch (columns) {
    case 1: return multiply_block<A, 1>(rows, Start<A>{}, state, state_stride, 1, packed, depth, result);
    case 2: return multiply_block<A, 2>(rows, Start<A>{}, state, state_stride, 1, packed, depth, result);
    case 3: return multiply_block<A, 3>(rows, Start<A>{}, state, state_stride, 1, packed, depth, result);
    case 4: return multiply_block<A, 4>(rows, Start<A>{}, state, state_stride, 1, packed, depth, result);
  }
}

// a[0], b[0], a[1], b[1], ... from lane `first` on.
template <int first, class V, int... k>
HSM_INLINE V interleave(V a, V b, std::integer_sequence<int, k...>) {
  return __builtin_shufflevector(a, b, (first + k / 2 + k % 2 * static_cast<int>(sizeof...(k)))...);
}

// Turns the rows of a square into its columns: each pass shuffles the rows, and the lanes within them, by one digit.
template <class A>
HSM_INLINE void transpose(Vector<A> (&rows)[lanes<A>()]) {
  constexpr int width = lanes<A>();
  constexpr std::make_integer_sequence<int, width> all{};
#pragma GCC unroll 4
  for (int pass = 1; pass < width; pass *= 2) {
    Vector<A> shuffled[width];
#pragma GCC unroll 8
    for (int j = 0; j < width / 2; ++j) {
      shuffled[2 * j] = interleave<0>(rows[j], rows[j + width / 2], all);
      shuffled[2 * j + 1] = interleave<width / 2>(rows[j], rows[j + width / 2], all);
    }
#pragma GCC unroll 16
    for (int j = 0; j < width; ++j) rows[j] = shuffled[j];
  }
}

// Packs rows of W (outputs, depth) as one vector of outputs per column of W: sums run over the columns, states @ W^T. The rows,
// `row_stride` apart, are `first` and the ones behind it, up to `count`, at column k the vector `packed + k * stride`.
template <class T, class A>
void pack_transposed(const T* w, int64_t row_stride, int64_t depth, int64_t first, int count, int64_t stride, A* packed) {
  constexpr int width = lanes<A>();
  const T* rows = w + first * row_stride;
  for (int64_t k = 0; k < depth; k += width) {
    const int columns = static_cast<int>(smaller(width, depth - k));
    Vector<A> square[width];
    if (count >= width && columns == width) {
#pragma GCC unroll 16
      for (int j = 0; j < width; ++j) square[j] = load(rows + j * row_stride + k);
    } else {
      for (int j = 0; j < width; ++j) square[j] = j < count ? load(rows + j * row_stride + k, columns) : Vector<A>{};
    }
    transpose<A>(square);
#pragma GCC unroll 16
    for (int c = 0; c < width; ++c)
      if (c < columns) store<A>(square[c], packed + (k + c) * stride);
  }
}

// Packs the columns `first` and the ones behind it, `columns` vectors of them, of W (depth, outputs), whose rows are `row_stride`
// apart: sums run over the rows of W, gradients @ W.
template <class T, class A>
void pack_straight(const T* w, int64_t row_stride, int64_t outputs, int64_t depth, int64_t first, int columns, A* packed) {
  constexpr int width = lanes<A>();
  for (int64_t k = 0; k < depth; ++k)
    for (int v = 0; v < columns; ++v) {
      const int64_t at = first + v * width;
      const Vector<A> vector = at < outputs ? load(w + k * row_stride + at, static_cast<int>(smaller(width, outputs - at))) : Vector<A>{};
      store(vector, packed + (k * columns + v) * width);
    }
}

// Each of `states` states (depth) . each of `outputs` rows of W that lie behind each other, at most one vector of them: into one
// vector for each state, zero behind the outputs. For weights that are used once, where packing them would take longer. W is read
// from its first element to its last, as fast as memory gives it.
template <int states, class T, class A>
void multiply_unpacked(const A* state, int64_t state_stride, const T* w, int64_t depth, int outputs, Vector<A> (&result)[states]) {
  constexpr int width = lanes<A>();
  Vector<A> sums[states][width] = {};
  const int64_t pairs = depth / (2 * width) * (2 * width);
  for (int j = 0; j < outputs; ++j) {
    const T* row = w + j * depth;
    Vector<A> even[states] = {}, odd[states] = {};
    for (int64_t k = 0; k < pairs; k += 2 * width) {
      const Vector<A> first = load(row + k), second = load(row + k + width);
#pragma GCC unroll 8
      for (int r = 0; r < states; ++r) {
        even[r] += load(state + r * state_stride + k) * first;
        odd[r] += load(state + r * state_stride + k + width) * second;
      }
    }
    for (int64_t k = pairs; k < depth; k += width) {
      const int rest = static_cast<int>(smaller(width, depth - k));
      for (int r = 0; r < states; ++r) even[r] += load(state + r * state_stride + k, rest) * load(row + k, rest);
    }
    for (int r = 0; r < states; ++r) sums[r][j] = even[r] + odd[r];
  }
  for (int r = 0; r < states; ++r) {
    transpose<A>(sums[r]);
    result[r] = sums[r][0];
#pragma GCC unroll 16
    for (int lane = 1; lane < width; ++lane) result[r] += sums[r][lane];
  }
}

}  // namespace HSM_ISA
}  // namespace cpu
}  // namespace hsm
