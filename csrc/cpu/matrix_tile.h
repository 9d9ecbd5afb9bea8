// The product inside the recurrence: a few rows of states times one block of packed weights.
//
// A matrix W of `depth` rows (what is summed over) is packed in blocks of up to `columns * lanes` outputs: block after block,
// and in a block one group of `columns` vectors per row of W. Outputs behind the end are zero.
//
// Where an instruction multiplies pairs of small numbers and adds both products to one sum, a lane holds a pair: of two rows of
// W for the same output, or of two neighbours in a row of states. An odd depth is filled up with zero, in W and in the states.
// Where instructions multiply tiles, the depth of a tile is filled up so.
#pragma once

#include <utility>

#include "cpu/simd.h"
#ifdef HSM_BFLOAT16_TILES
#include "cpu/tile_product.h"
#endif

namespace hsm {
namespace cpu {
namespace HSM_ISA {

// Rows that share one pass over the weights: accumulators, weights and one broadcast value must fit the registers.
#ifdef HSM_BFLOAT16_TILES
constexpr int max_rows = 2 * tile_rows, enough_rows = tile_rows;
#elif HSM_VECTOR_REGISTERS >= 32
constexpr int max_rows = 6, enough_rows = max_rows;
#else
constexpr int max_rows = 2, enough_rows = max_rows;
#endif
constexpr int max_columns = 4;

#ifdef HSM_BFLOAT16_TILES
constexpr bool multiplies_tiles = true;
#else
constexpr bool multiplies_tiles = false;
struct TileUse {};
#endif

// How many of `left` rows to multiply at once. Where there are enough, no remainder is smaller than a tile: 33 rows are 17 and 16.
inline int rows_at_once(int64_t left) {
  if (multiplies_tiles && left > max_rows && left < max_rows + enough_rows) return static_cast<int>(left - enough_rows);
  return static_cast<int>(smaller(left, max_rows));
}

// How operands kept as E are multiplied: one of them in a lane.
template <class E>
struct Multiplication {
  static constexpr int per_lane = 1, depth_step = per_lane;  // depths are whole steps
  // What is in one lane of the states, for all lanes.
  static HSM_INLINE E spread(const E* state) { return *state; }
  template <class T>
  static HSM_INLINE Vector<E> load_lanes(const T* from, int count = lanes<E>()) {
    return load(from, count);
  }
  // `count` outputs of as many rows of W as a lane holds, of which `rows` are left.
  template <class T>
  static HSM_INLINE Vector<E> load_rows(const T* from, int64_t /*row_stride*/, int64_t /*rows*/, int count) {
    return load(from, count);
  }
  template <class Value>
  static HSM_INLINE void add_product(Vector<E>& sum, Vector<E> weights, Value value) {
    sum += weights * value;
  }
};

#ifdef HSM_BFLOAT16_PAIRS
// A pair of them in a lane. vdpbf16ps adds both products to the sum in an order and with roundings of its own. It takes subnormal
// numbers for zero, in operands and sums, whatever the thread's mode.
template <>
struct Multiplication<BFloat16> {
  static constexpr int per_lane = 2, depth_step = multiplies_tiles ? 16 * per_lane : per_lane;
  static HSM_INLINE Vector<float> spread(const BFloat16* state) {
    int pair;
    memcpy(&pair, state, sizeof pair);
    return (Vector<float>)_mm512_set1_epi32(pair);
  }
  static HSM_INLINE Vector<float> load_lanes(const BFloat16* from, int count = 2 * lanes<float>()) {
    typedef uint16_t Elements __attribute__((vector_size(HSM_VECTOR_BYTES)));
    Elements pairs = {};
    if (__builtin_expect(count == 2 * lanes<float>(), 1)) {
      memcpy(&pairs, from, sizeof pairs);
    } else {
      copy_elements<BFloat16>(from, &pairs, count);
    }
    return (Vector<float>)pairs;
  }
  static HSM_INLINE Vector<float> load_rows(const BFloat16* from, int64_t row_stride, int64_t rows, int count) {
    const Words first = (Words)load(from, count), second = rows > 1 ? (Words)load(from + row_stride, count) : Words{};
    return (Vector<float>)(first >> 16 | second);
  }
  static HSM_INLINE void add_product(Vector<float>& sum, Vector<float> weights, Vector<float> value) {
    sum = (Vector<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)weights, (__m512bh)value);
  }
};
#endif

// The length of `depth` numbers and of the zeros that fill them up.
template <class E>
constexpr int64_t filled_depth(int64_t depth) {
  return round_up(depth, Multiplication<E>::depth_step);
}

// What operands kept as E are summed in.
template <class E>
using Sum = typename Accumulator<E>::type;

// What the sums are added to: row r at data + r * row_stride. Nowhere: to zero.
template <class A>
struct Start {
  const A* data = nullptr;
  int64_t row_stride = 0;
};

// Sums of so many products are added up before they are added to what there is: rounding errors grow with the length of a sum.
constexpr int64_t longest_sum = 256;

// Weights that no near cache holds arrive as fast as they can only if they are asked for so many bytes ahead.
constexpr int64_t bytes_ahead = 2048;
// So few rows wait for them; more rows compute for longer than the weights take to come.
constexpr int most_waiting_rows = 2;

// The sums run in the same order whatever the number of rows: a sequence gives the same bits in any batch.
// Element k of row r of the states is state[r * row_stride + k * depth_stride]; those of a lane lie behind each other.
template <class E, int rows, int columns, bool prefetches = false>
HSM_INLINE void multiply_rows(
    Start<Sum<E>> start, const E* state, int64_t row_stride, int64_t depth_stride, const E* packed, int64_t depth, Sum<E>* result,
    int64_t result_stride = columns * lanes<Sum<E>>()) {
  using A = Sum<E>;
  using By = Multiplication<E>;
  constexpr int width = lanes<A>();
  int64_t k = 0;
  do {
    Vector<A> sums[rows][columns];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < columns; ++v) sums[r][v] = Vector<A>{};
    for (const int64_t end = smaller(k + longest_sum, depth); k < end; k += By::per_lane) {
      Vector<A> weights[columns];
#pragma GCC unroll 4
      for (int v = 0; v < columns; ++v) {
        const E* from = packed + (k * columns + v * By::per_lane) * width;
        if (prefetches) __builtin_prefetch(reinterpret_cast<const char*>(from) + bytes_ahead);
        memcpy(&weights[v], from, sizeof(Vector<A>));
      }
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) {
        const auto value = By::spread(state + r * row_stride + k * depth_stride);
#pragma GCC unroll 4
        for (int v = 0; v < columns; ++v) By::add_product(sums[r][v], weights[v], value);
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
        memcpy(result + r * result_stride + v * width, &sums[r][v], sizeof(Vector<A>));
      }
    start = {result, result_stride};
  } while (k < depth);
}

// The product of at most `most_waiting_rows` rows, where the packed weights come from far away.
template <class E, int columns>
void multiply_far_block(
    int rows, Start<Sum<E>> start, const E* state, int64_t row_stride, int64_t depth_stride, const E* packed, int64_t depth, Sum<E>* result) {
  static_assert(most_waiting_rows <= 2 && most_waiting_rows <= max_rows, "the cases below are all numbers of rows");
  if (rows == 1) return multiply_rows<E, 1, columns, true>(start, state, row_stride, depth_stride, packed, depth, result);
  return multiply_rows<E, 2, columns, true>(start, state, row_stride, depth_stride, packed, depth, result);
}

template <class E, int columns>
void multiply_block(int rows, Start<Sum<E>> start, const E* state, int64_t row_stride, [[maybe_unused]] int64_t depth_stride, const E* packed,
                    int64_t depth, Sum<E>* result, [[maybe_unused]] int64_t result_stride = columns * lanes<Sum<E>>()) {
#ifdef HSM_BFLOAT16_TILES
  return multiply_block_by_tiles<columns>(rows, start.data, start.row_stride, state, row_stride, packed, depth, result);
#else
  static_assert(max_rows <= 6, "the switch below lists every number of rows");
  switch (rows) {
    case 1: return multiply_rows<E, 1, columns>(start, state, row_stride, depth_stride, packed, depth, result, result_stride);
    case 2: return multiply_rows<E, 2, columns>(start, state, row_stride, depth_stride, packed, depth, result, result_stride);
#if HSM_VECTOR_REGISTERS >= 32
    case 3: return multiply_rows<E, 3, columns>(start, state, row_stride, depth_stride, packed, depth, result, result_stride);
    case 4: return multiply_rows<E, 4, columns>(start, state, row_stride, depth_stride, packed, depth, result, result_stride);
    case 5: return multiply_rows<E, 5, columns>(start, state, row_stride, depth_stride, packed, depth, result, result_stride);
    case 6: return multiply_rows<E, 6, columns>(start, state, row_stride, depth_stride, packed, depth, result, result_stride);
#endif
  }
#endif
}

// One row of states times two packed blocks of no more than `longest_sum`: the sums of one block alone would wait for each other.
template <class E, int columns>
void multiply_two_blocks(
    const Start<Sum<E>> (&start)[2], const E* state, const E* const (&packed)[2], int64_t depth, Sum<E>* const (&result)[2]) {
  using A = Sum<E>;
  using By = Multiplication<E>;
  constexpr int width = lanes<A>();
  Vector<A> sums[2][columns] = {};
  for (int64_t k = 0; k < depth; k += By::per_lane) {
    const auto value = By::spread(state + k);
#pragma GCC unroll 2
    for (int b = 0; b < 2; ++b)
#pragma GCC unroll 4
      for (int v = 0; v < columns; ++v) {
        Vector<A> weights;
        memcpy(&weights, packed[b] + (k * columns + v * By::per_lane) * width, sizeof weights);
        By::add_product(sums[b][v], weights, value);
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
template <class E>
HSM_INLINE void multiply_tile(
    int rows, int columns, const E* state, int64_t state_stride, const E* packed, int64_t depth, Sum<E>* result) {
  using From = Start<Sum<E>>;
  switch (columns) {
    case 1: return multiply_block<E, 1>(rows, From{}, state, state_stride, 1, packed, depth, result);
    case 2: return multiply_block<E, 2>(rows, From{}, state, state_stride, 1, packed, depth, result);
    case 3: return multiply_block<E, 3>(rows, From{}, state, state_stride, 1, packed, depth, result);
    case 4: return multiply_block<E, 4>(rows, From{}, state, state_stride, 1, packed, depth, result);
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

// The sum of each vector's lanes: each pass halves the vectors, and the lanes that belong to the same sum.
template <class A>
HSM_INLINE Vector<A> sum_of_each(Vector<A> (&vectors)[lanes<A>()]) {
  constexpr int width = lanes<A>();
  constexpr std::make_integer_sequence<int, width> all{};
#pragma GCC unroll 4
  for (int half = width / 2; half > 0; half /= 2)
#pragma GCC unroll 8
    for (int j = 0; j < half; ++j)
      vectors[j] = interleave<0>(vectors[j], vectors[j + half], all) + interleave<width / 2>(vectors[j], vectors[j + half], all);
  return vectors[0];
}

// Packs rows of W (outputs, depth) as one vector of outputs per column of W: sums run over the columns, states @ W^T. The rows,
// `row_stride` apart, are `first` and the ones behind it, up to `count`, at column k the vector `packed + k * stride`. A column
// is a pair of columns where a lane holds a pair.
template <class T, class E>
void pack_transposed(const T* w, int64_t row_stride, int64_t depth, int64_t first, int count, int64_t stride, E* packed) {
  using A = Sum<E>;
  using By = Multiplication<E>;
  constexpr int width = lanes<A>(), most = width * By::per_lane;
  const T* rows = w + first * row_stride;
  for (int64_t k = 0; k < depth; k += most) {
    const int columns = static_cast<int>(smaller(most, depth - k));
    Vector<A> square[width];
    if (count >= width && columns == most) {
#pragma GCC unroll 16
      for (int j = 0; j < width; ++j) square[j] = By::load_lanes(rows + j * row_stride + k);
    } else {
      for (int j = 0; j < width; ++j) square[j] = j < count ? By::load_lanes(rows + j * row_stride + k, columns) : Vector<A>{};
    }
    transpose<A>(square);
#pragma GCC unroll 16
    for (int c = 0; c < width; ++c)
      if (k + c * By::per_lane < filled_depth<E>(depth)) memcpy(packed + (k + c * By::per_lane) * stride, &square[c], sizeof square[c]);
  }
}

// Packs the columns `first` and the ones behind it, `columns` vectors of them, of W (depth, outputs), whose rows are `row_stride`
// apart: sums run over the rows of W, gradients @ W. A row is a pair of rows where a lane holds a pair.
template <class T, class E>
void pack_straight(const T* w, int64_t row_stride, int64_t outputs, int64_t depth, int64_t first, int columns, E* packed) {
  using A = Sum<E>;
  using By = Multiplication<E>;
  constexpr int width = lanes<A>();
  for (int64_t k = 0; k < filled_depth<E>(depth); k += By::per_lane)
    for (int v = 0; v < columns; ++v) {
      const int64_t at = first + v * width;
      Vector<A> vector{};
      const int count = static_cast<int>(smaller(width, outputs - at));
      if (count > 0 && k < depth) vector = By::load_rows(w + k * row_stride + at, row_stride, depth - k, count);
      memcpy(packed + (k * columns + v * By::per_lane) * width, &vector, sizeof vector);
    }
}

// Each of `states` states (depth) . each of `outputs` rows of W that lie behind each other: to sums[state][output] a vector of partial sums.
template <int states, int outputs, class T, class E, class Sums>
HSM_INLINE void multiply_rows_unpacked(const E* state, int64_t state_stride, const T* w, int64_t depth, Sums sums) {
  using A = Sum<E>;
  using By = Multiplication<E>;
  constexpr int most = lanes<A>() * By::per_lane;
  constexpr int chains = outputs == 1 ? 2 : 1;  // of additions that do not wait for each other
  Vector<A> parts[chains][states][outputs] = {};
  const int64_t whole = depth / (chains * most) * (chains * most);
  for (int64_t k = 0; k < whole; k += chains * most) {
#pragma GCC unroll 2
    for (int c = 0; c < chains; ++c) {
      Vector<A> weights[outputs];
#pragma GCC unroll 4
      for (int j = 0; j < outputs; ++j) {
        const T* from = w + j * depth + k + c * most;
        if (outputs > 1) __builtin_prefetch(from + outputs * depth);  // of the rows that come next
        weights[j] = By::load_lanes(from);
      }
#pragma GCC unroll 8
      for (int r = 0; r < states; ++r) {
        const auto values = By::load_lanes(state + r * state_stride + k + c * most);
#pragma GCC unroll 4
        for (int j = 0; j < outputs; ++j) By::add_product(parts[c][r][j], weights[j], values);
      }
    }
  }
  for (int64_t k = whole; k < depth; k += most) {
    const int rest = static_cast<int>(smaller(most, depth - k));
#pragma GCC unroll 8
    for (int r = 0; r < states; ++r)
#pragma GCC unroll 4
      for (int j = 0; j < outputs; ++j)
        By::add_product(parts[0][r][j], By::load_lanes(w + j * depth + k, rest), By::load_lanes(state + r * state_stride + k, rest));
  }
#pragma GCC unroll 8
  for (int r = 0; r < states; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < outputs; ++j) sums[r][j] = chains == 2 ? parts[0][r][j] + parts[chains - 1][r][j] : parts[0][r][j];
}

// Each of `states` states (depth) . each of `outputs` rows of W that lie behind each other, at most one vector of them: into one
// vector for each state, zero behind the outputs. For weights that are used so seldom that packing them would take longer. W is read
// from its first element to its last, as fast as memory gives it.
template <int states, class T, class E>
void multiply_unpacked(const E* state, int64_t state_stride, const T* w, int64_t depth, int outputs, Vector<Sum<E>> (&result)[states]) {
  using A = Sum<E>;
  constexpr int width = lanes<A>();
  // Several rows of W share what is loaded of several states. For one state a row at a time is as fast, or faster, unless its
  // numbers are to be widened first.
  constexpr int together = (states == 1 && sizeof(T) == sizeof(A)) || width < 4 ? 1 : 4;
  Vector<A> sums[states][width] = {};
  int j = 0;
  for (; j + together <= outputs; j += together) {
    Vector<A>* to[states];
    for (int r = 0; r < states; ++r) to[r] = sums[r] + j;
    multiply_rows_unpacked<states, together>(state, state_stride, w + j * depth, depth, to);
  }
  for (; j < outputs; ++j) {
    Vector<A>* to[states];
    for (int r = 0; r < states; ++r) to[r] = sums[r] + j;
    multiply_rows_unpacked<states, 1>(state, state_stride, w + j * depth, depth, to);
  }
  for (int r = 0; r < states; ++r) result[r] = sum_of_each<A>(sums[r]);
}

}  // namespace HSM_ISA
}  // namespace cpu
}  // namespace hsm
