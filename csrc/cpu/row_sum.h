// Sums over the rows of a matrix: the gradients of biases.
#pragma once

#include "common/params.h"
#include "cpu/simd.h"

namespace hsm {
namespace cpu {
namespace HSM_ISA {

// One vector of columns at a time would take a line of memory from each row; a strip of them takes what lies together.
template <class T>
class RowSum {
  using A = typename Accumulator<T>::type;
  static constexpr int width = lanes<A>(), strip = 8;
  // Rows are summed in groups, and then the groups, so that rounding errors grow with the number of both and not of all rows.
  static constexpr int64_t group = 128;

 public:
  explicit RowSum(const RowSumParams& params) : p_(params) {}

  void run() const {
    for (int64_t j = 0; j < p_.columns; j += strip * width) {
      Vector<A> totals[strip] = {};
      for (int64_t first = 0; first < p_.rows; first += group) {
        Vector<A> sums[strip] = {};
        for (int64_t i = first; i < smaller(first + group, p_.rows); ++i)
          for (int v = 0; v < strip && j + v * width < p_.columns; ++v) sums[v] += load(row(i) + j + v * width, count(j, v));
        for (int v = 0; v < strip; ++v) totals[v] += sums[v];
      }
      for (int v = 0; v < strip && j + v * width < p_.columns; ++v) {
        T* to = static_cast<T*>(p_.sums) + j + v * width;
        store(p_.add ? totals[v] + load(to, count(j, v)) : totals[v], to, count(j, v));
      }
    }
  }

 private:
  const T* row(int64_t i) const { return static_cast<const T*>(p_.matrix) + i * p_.row_stride; }
  int count(int64_t j, int v) const { return static_cast<int>(smaller(width, p_.columns - j - v * width)); }

  const RowSumParams& p_;
};

}  // namespace HSM_ISA
}  // namespace cpu
}  // namespace hsm
