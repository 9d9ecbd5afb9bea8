// What the kernels of the forward and the backward pass share: who computes which unit, and the cell's mathematics.
#pragma once

#include <cmath>

#include "common/arena.h"
#include "common/cell_math.h"
#include "common/sequences.h"
#include "cuda/device.cuh"
#include "cuda/passes.h"

namespace hsm {
namespace cuda {

// What the elements of a dtype are computed in.
template <class T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <class T>
using Accumulator = typename AccumulatorOf<T>::type;

inline ScalarKind accumulator_kind(ScalarKind dtype) { return dtype == ScalarKind::float64 ? ScalarKind::float64 : ScalarKind::float32; }

inline int64_t at_least_1(int64_t x) { return x < 1 ? 1 : x; }
// The highest counts where it is below the lowest.
inline int64_t between(int64_t lowest, int64_t x, int64_t highest) {
  const int64_t raised = x < lowest ? lowest : x;
  return raised < highest ? raised : highest;
}

struct Math {
  template <class A>
  static HSM_DEVICE A sigmoid(A x) {
    return A{1} / (A{1} + std::exp(-x));
  }
  template <class A>
  static HSM_DEVICE A tanh(A x) {
    return std::tanh(x);
  }
};

// Element `at` of an array, which may be missing: zero then.
template <class T>
HSM_DEVICE Accumulator<T> load(const void* data, int64_t at) {
  return data ? widen(static_cast<const T*>(data)[at]) : Accumulator<T>{0};
}

template <class T>
HSM_DEVICE void store(void* data, int64_t at, Accumulator<T> value) {
  static_cast<T*>(data)[at] = narrow<T>(value);
}

// One thread for each unit of each row, in each direction. Neighbouring threads have neighbouring units; narrow rows share a block.
constexpr unsigned block_threads = 128;

HSM_HOST_DEVICE unsigned threads_of_a_row(int units) {
  const unsigned whole_warps = (static_cast<unsigned>(units) + 31) / 32 * 32;
  return whole_warps < block_threads ? whole_warps : block_threads;
}

// Blocks across a row are the y dimension of a grid, or part of its x dimension where there are too many.
constexpr unsigned most_grid_y = 65535;

HSM_HOST_DEVICE unsigned blocks_of_a_row(int units, unsigned across) { return (static_cast<unsigned>(units) + across - 1) / across; }

inline LaunchShape one_thread_each(int64_t rows, int units, int directions) {
  const unsigned across = threads_of_a_row(units), down = block_threads / across, blocks = blocks_of_a_row(units, across);
  LaunchShape shape{static_cast<unsigned>((rows + down - 1) / down)};
  if (blocks > most_grid_y) {
    shape.grid_x *= blocks;
  } else {
    shape.grid_y = blocks;
  }
  shape.grid_z = static_cast<unsigned>(directions);
  shape.threads = across * down;
  return shape;
}

struct Place {
  int direction;
  int64_t row;
  int unit;
  bool exists;
};

HSM_DEVICE Place place_of_thread(int64_t rows, int units) {
  const unsigned across = threads_of_a_row(units), down = block_threads / across, blocks = blocks_of_a_row(units, across);
  const bool in_x = blocks > most_grid_y;
  const unsigned rows_before = in_x ? block_x() / blocks : block_x(), units_before = in_x ? block_x() % blocks : block_y();
  const int64_t row = static_cast<int64_t>(rows_before) * down + thread() / across;
  const int unit = static_cast<int>(units_before * across + thread() % across);
  return {static_cast<int>(block_z()), row, unit, row < rows && unit < units};
}

// The pre-activations as lstm_gates and gru_gates take them, i, f, g, o or r, z and the two halves of n, but for the state's product.
// `input_product` is (G * H,) of one step of one sequence.
template <class T, CellKind kind>
HSM_DEVICE void input_preactivations(const Weights& w, int hidden, int unit, const Accumulator<T>* input_product, Accumulator<T> (&pre)[4]) {
  constexpr bool is_lstm = kind == CellKind::lstm;
#pragma unroll
  for (int g = 0; g < 4; ++g) {
    const int row = (is_lstm || g < 2 ? g : 2) * hidden + unit;
    pre[g] = 0;
    if (is_lstm || g != 3) pre[g] += input_product[row] + load<T>(w.bias_ih, row);
    if (is_lstm || g != 2) pre[g] += load<T>(w.bias_hh, row);
  }
}

template <CellKind kind>
constexpr int gate_count = kind == CellKind::lstm ? 4 : 3;

// `product`: of the state, for each gate of the unit.
template <CellKind kind, class A>
HSM_DEVICE void add_state_product(const A (&product)[gate_count<kind>], A (&pre)[4]) {
  constexpr bool is_lstm = kind == CellKind::lstm;
#pragma unroll
  for (int g = 0; g < 4; ++g)
    if (is_lstm || g != 2) pre[g] += product[is_lstm || g < 2 ? g : 2];
}

// All of it. `state_product` is (G * H,).
template <class T, CellKind kind>
HSM_DEVICE void preactivations(const Weights& w, int hidden, int unit, const Accumulator<T>* input_product, const Accumulator<T>* state_product,
                               Accumulator<T> (&pre)[4]) {
  Accumulator<T> product[gate_count<kind>];
#pragma unroll
  for (int g = 0; g < gate_count<kind>; ++g) product[g] = state_product[g * hidden + unit];
  input_preactivations<T, kind>(w, hidden, unit, input_product, pre);
  add_state_product<kind>(product, pre);
}

template <CellKind kind, class A>
HSM_DEVICE void activate(const A (&pre)[4], A (&gates)[4]) {
  if constexpr (kind == CellKind::lstm) {
    const LstmGates<A> active = lstm_gates<Math>(pre);
    gates[0] = active.i, gates[1] = active.f, gates[2] = active.g, gates[3] = active.o;
  } else {
    const GruGates<A> active = gru_gates<Math>(pre);
    gates[0] = active.r, gates[1] = active.z, gates[2] = active.n, gates[3] = active.h_n;
  }
}

template <class T>
HSM_DEVICE void store_gates(void* gates, int64_t at, int hidden, const Accumulator<T> (&values)[4]) {
#pragma unroll
  for (int g = 0; g < 4; ++g) store<T>(gates, at + g * hidden, values[g]);
}

// Calls function(T{}) for the type of a dtype.
template <class Function>
auto with_type(ScalarKind dtype, Function function) {
  switch (dtype) {
    case ScalarKind::float64: return function(double{});
    case ScalarKind::float32: return function(float{});
    case ScalarKind::bfloat16: return function(bfloat16{});
    default: return function(float16{});
  }
}

// Enqueues one thing after the other until one fails.
class Queue {
 public:
  Queue(cudaStream_t stream, const Products& products) : stream_(stream), products_(products) {}

  template <class... Parameters, class... Arguments>
  void run(void (*kernel)(Parameters...), const LaunchShape& shape, const Arguments&... arguments) {
    if (ok() && shape.grid_x > 0 && shape.grid_y > 0) status_ = launch(kernel, shape, stream_, arguments...);
  }
  void multiply(const BatchedProduct& product) {
    if (!ok() || product.rows == 0 || product.columns == 0) return;
    if (product.depth > 0) return products_.multiply(products_.context, product);
    // A sum of nothing, into a matrix without gaps.
    if (!product.add) fill(product.c, 0, product.batch * product.rows * product.columns * element_bytes(product.dtype_of_c));
  }
  void fill(void* data, int byte, int64_t bytes) {
    if (ok()) status_ = fill_async(data, byte, static_cast<size_t>(bytes), stream_);
  }
  void copy(void* to, const void* from, int64_t bytes) {
    if (ok()) status_ = copy_async(to, from, static_cast<size_t>(bytes), stream_);
  }
  // Work that enqueue() puts on a stream itself.
  template <class Enqueue>
  void take(Enqueue enqueue) {
    if (ok()) status_ = enqueue(stream_);
  }
  bool ok() const { return status_ == cudaSuccess; }
  cudaError_t status() const { return status_; }

 private:
  cudaStream_t stream_;
  const Products& products_;
  cudaError_t status_ = cudaSuccess;
};

// A pass for the types and the cell of its sizes.
template <class Pass>
cudaError_t run(Pass& pass, const Sizes& z, const Products& products, cudaStream_t stream) {
  return with_type(z.dtype, [&](auto type) {
    using T = decltype(type);
    return z.cell == CellKind::lstm ? pass.template run<T, CellKind::lstm>(products, stream) : pass.template run<T, CellKind::gru>(products, stream);
  });
}

// One matrix of every direction. Products of all directions at once want them at equal distances.
class StackedWeights {
 public:
  void reserve(Arena& arena, const Sizes& z, int64_t elements) {
    bytes_ = elements * element_bytes(z.dtype);
    copies_ = z.directions > 1 && bytes_ > 0;
    copy_ = arena.take_bytes(copies_ ? static_cast<size_t>(z.directions * bytes_) : 0);
  }
  void fill(Queue& queue, const void* forward, const void* reverse) {
    data_ = forward;
    if (!copies_) return;
    queue.copy(copy_, forward, bytes_);
    queue.copy(static_cast<char*>(copy_) + bytes_, reverse, bytes_);
    data_ = copy_;
  }
  const void* data() const { return data_; }

 private:
  int64_t bytes_ = 0;
  bool copies_ = false;
  void* copy_ = nullptr;
  const void* data_ = nullptr;
};

}  // namespace cuda
}  // namespace hsm
