// The products outside the recurrence, C = A @ B, with the same inner loop as the recurrence.
//
// The sum is cut into chunks. Each worker packs a chunk of B in blocks of columns, and of A where its rows are not contiguous, and
// adds the product of the chunks to its share of C.
#pragma once

#include "cpu/matrix_tile.h"
#include "cpu/schedule.h"

namespace hsm {
namespace cpu {
namespace HSM_ISA {

template <class T>
class Product {
  static constexpr int width = lanes<T>();
  static constexpr int columns = max_columns * width;
  // Chunks of A and of a block of B stay in the cache while they are gone through again. The longer they are, the seldomer C is.
  static constexpr int64_t most_depth = 512, most_depth_packed = 256, most_rows = 16 * max_rows;

 public:
  Product(const ProductParams& params, const Threads& threads, void* workspace) : p_(params), threads_(threads) {
    const double flops = 2.0 * static_cast<double>(p_.rows) * p_.columns * p_.depth;
    const int64_t row_tiles = (p_.rows + max_rows - 1) / max_rows, blocks = (p_.columns + columns - 1) / columns;
    // Workers that share the rows each pack all of B; those that share the columns take A as it is, if it is contiguous.
    const bool even = blocks % threads.count == 0 || blocks >= 4 * threads.count;
    by_rows_ = row_tiles >= blocks && !(p_.a_depth_stride == 1 && even);
    constexpr double flops_worth_a_thread = 2e6;
    workers_ = flops < 2 * flops_worth_a_thread ? 1 : larger(1, smaller(threads.count, by_rows_ ? row_tiles : blocks));
    depth_ = smaller(p_.a_depth_stride == 1 ? most_depth : most_depth_packed, p_.depth);
    Arena arena(workspace);
    b_ = arena.take<T>(workers_ * b_size());
    a_ = arena.take<T>(workers_ * a_size());
    workspace_bytes_ = arena.used();
  }

  size_t workspace_bytes() const { return workspace_bytes_; }

  void run() {
    auto work = [this](int64_t worker) { run_worker(worker); };
    run_items(threads_, workers_ > 1, workers_, work);
  }

 private:
  // What one worker packs: a chunk of its columns of B, and of some rows of A.
  int64_t b_size() const { return round_up(p_.columns, columns) * depth_; }
  int64_t a_size() const { return p_.a_depth_stride == 1 ? 0 : most_rows * depth_; }

  // Whole tiles, or whole blocks, for each worker.
  Range share(int64_t worker, int64_t size, int64_t piece) const {
    const Range pieces = Range::part((size + piece - 1) / piece, workers_, worker);
    return {pieces.begin * piece, smaller(pieces.end * piece, size)};
  }

  void run_worker(int64_t worker) {
    const Range rows = by_rows_ ? share(worker, p_.rows, max_rows) : Range{0, p_.rows};
    const Range cols = by_rows_ ? Range{0, p_.columns} : share(worker, p_.columns, columns);
    T* b = b_ + worker * b_size();
    T* a = a_ + worker * a_size();
    if (p_.depth == 0 && !p_.add) clear(rows, cols);
    for (int64_t k = 0; k < p_.depth; k += depth_) {
      const int64_t depth = smaller(depth_, p_.depth - k);
      for (int64_t j = cols.begin; j < cols.end; j += columns) pack_b(k, depth, j, cols.end, b + (j - cols.begin) * depth);
      for (int64_t i = rows.begin; i < rows.end; i += most_rows) {
        const int64_t count = smaller(most_rows, rows.end - i);
        const T* operand = static_cast<const T*>(p_.a) + i * p_.a_row_stride + k * p_.a_depth_stride;
        const bool packs = p_.a_depth_stride != 1;
        if (packs) pack_a(operand, count, depth, a);
        const Operand rows_of_a = packs ? Operand{a, 1, most_rows} : Operand{operand, p_.a_row_stride, 1};
        for (int64_t j = cols.begin; j < cols.end; j += columns)
          multiply(rows_of_a, count, b + (j - cols.begin) * depth, depth, i, j, k > 0 || p_.add);
      }
    }
  }

  void clear(const Range& rows, const Range& cols) {
    for (int64_t i = rows.begin; i < rows.end; ++i)
      for (int64_t j = cols.begin; j < cols.end; ++j) static_cast<T*>(p_.c)[i * p_.c_row_stride + j] = 0;
  }

  void pack_b(int64_t k, int64_t depth, int64_t j, int64_t end, T* packed) const {
    const T* b = static_cast<const T*>(p_.b) + k * p_.b_depth_stride + j * p_.b_column_stride;
    if (p_.b_column_stride == 1) return pack_straight(b, p_.b_depth_stride, end - j, depth, 0, max_columns, packed);
    for (int v = 0; v < max_columns; ++v) {
      const int count = static_cast<int>(larger(0, smaller(width, end - j - v * width)));
      pack_transposed(b, p_.b_column_stride, depth, v * width, count, columns, packed + v * width);
    }
  }

  struct Operand {
    const T* data;
    int64_t row_stride, depth_stride;
  };

  // Columns of A, which are contiguous, brought together from far apart.
  void pack_a(const T* a, int64_t rows, int64_t depth, T* packed) const {
    constexpr int64_t ahead = 8;  // every column is on a page of its own, where no prefetcher of the CPU's goes
    for (int64_t k = 0; k < depth; ++k) {
      const T* from = a + k * p_.a_depth_stride;
      T* to = packed + k * most_rows;
      for (int64_t r = 0; r < rows; r += width) __builtin_prefetch(from + ahead * p_.a_depth_stride + r);
      for (int64_t r = 0; r < rows; r += width) store(load(from + r, static_cast<int>(smaller(width, rows - r))), to + r);
    }
  }

  // One block of columns of C for `count` rows from row i on.
  void multiply(const Operand& a, int64_t count, const T* b, int64_t depth, int64_t i, int64_t j, bool add) const {
    for (int64_t first = 0; first < count; first += max_rows) {
      const int rows = static_cast<int>(smaller(max_rows, count - first));
      const T* operand = a.data + first * a.row_stride;
      T* c = static_cast<T*>(p_.c) + (i + first) * p_.c_row_stride + j;
      if (p_.columns - j >= columns) {
        const Start<T> start{add ? c : nullptr, p_.c_row_stride};
        multiply_block<T, max_columns>(rows, start, operand, a.row_stride, a.depth_stride, b, depth, c, p_.c_row_stride);
      } else {
        alignas(64) T product[max_rows * columns];
        multiply_block<T, max_columns>(rows, Start<T>{}, operand, a.row_stride, a.depth_stride, b, depth, product);
        store_part(product, rows, c, static_cast<int>(p_.columns - j), add);
      }
    }
  }

  // The first `units` columns of a tile.
  void store_part(const T* product, int rows, T* c, int units, bool add) const {
    for (int r = 0; r < rows; ++r)
      for (int u = 0; u < units; u += width) {
        T* to = c + r * p_.c_row_stride + u;
        const int count = smaller(width, units - u);
        Vector<T> sum = load(product + r * columns + u);
        if (add) sum += load(to, count);
        store(sum, to, count);
      }
  }

  const ProductParams& p_;
  const Threads& threads_;
  int64_t workers_, depth_;
  bool by_rows_;  // whether workers share the rows of C, or else its columns
  T* a_;
  T* b_;
  size_t workspace_bytes_;
};

}  // namespace HSM_ISA
}  // namespace cpu
}  // namespace hsm
