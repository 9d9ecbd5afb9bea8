// Products of matrices: by the kernel, or by torch.
#pragma once

#include "binding/workspace.h"

namespace hsm {
namespace binding {

// A matrix in the memory of a tensor. Strides count elements.
struct Matrix {
  ScalarKind dtype;
  char* data;
  int64_t rows, columns, row_stride, column_stride;

  Matrix row_range(int64_t first, int64_t count) const {
    return {dtype, data + first * row_stride * element_bytes(dtype), count, columns, row_stride, column_stride};
  }
  Matrix column_range(int64_t first, int64_t count) const { return transposed().row_range(first, count).transposed(); }
  Matrix transposed() const { return {dtype, data, columns, rows, column_stride, row_stride}; }
  bool has_unit_stride() const { return row_stride == 1 || column_stride == 1; }
};

// Rows of a contiguous tensor, from element `offset` on. What a product only reads is not written.
inline Matrix matrix_in(ScalarKind dtype, const Tensor& tensor, int64_t offset, int64_t rows, int64_t columns) {
  char* data = static_cast<char*>(const_cast<void*>(tensor.const_data_ptr()));
  return {dtype, data + offset * element_bytes(dtype), rows, columns, columns, 1};
}

inline Tensor as_tensor(const Matrix& matrix) {
  const int64_t sizes[] = {matrix.rows, matrix.columns}, strides[] = {matrix.row_stride, matrix.column_stride};
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  return torch::stable::from_blob(matrix.data, {sizes, 2}, {strides, 2}, cpu, scalar_type(matrix.dtype));
}

inline bool has_product(ScalarKind dtype) { return dtype == ScalarKind::float32 || dtype == ScalarKind::float64; }

// out = a @ b, or out += a @ b, by the kernel. One of the strides of `a` is 1, and of `b`, and the second of `out`.
inline void own_product(const Matrix& a, const Matrix& b, const Matrix& out, bool add) {
  ProductParams p{};
  p.dtype = a.dtype;
  p.rows = a.rows, p.columns = b.columns, p.depth = a.columns;
  p.a = a.data, p.a_row_stride = a.row_stride, p.a_depth_stride = a.column_stride;
  p.b = b.data, p.b_depth_stride = b.row_stride, p.b_column_stride = b.column_stride;
  p.c = out.data, p.c_row_stride = out.row_stride;
  p.add = add;
  const cpu::Threads pool = threads();
  const Workspace workspace(cpu::kernels().product_workspace(p, pool));
  cpu::kernels().product(p, pool, workspace.data());
}

inline bool takes_own_product(ScalarKind dtype, int64_t rows, int64_t columns) {
  return has_product(dtype) && cpu::has_faster_product(rows, columns);
}

// out (rows, columns) = a (rows, depth) @ b (depth, columns), or out += that; by torch where torch is faster.
inline void multiply_into(const Matrix& a, const Matrix& b, const Matrix& out, bool add = false) {
  const bool fits = a.has_unit_stride() && b.has_unit_stride() && out.column_stride == 1;
  if (fits && takes_own_product(a.dtype, a.rows, b.columns)) return own_product(a, b, out, add);
  const Tensor left = as_tensor(a), right = as_tensor(b), result = as_tensor(out);
  if (add) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_addmm_out(result.get(), result.get(), left.get(), right.get(), 1, 1));
  } else {
    TORCH_ERROR_CODE_CHECK(aoti_torch_mm_out(result.get(), left.get(), right.get()));
  }
}

}  // namespace binding
}  // namespace hsm
