// Products of whole tensors: by the kernel, or by torch.
#pragma once

#include "binding/workspace.h"

namespace hsm {
namespace binding {

inline bool has_product(ScalarType type) { return type == ScalarType::Float || type == ScalarType::Double; }

inline bool has_unit_stride(const Tensor& matrix) { return matrix.stride(0) == 1 || matrix.stride(1) == 1; }

// out = a @ b, or out += a @ b, by the kernel. One of the strides of `a` is 1, and of `b`, and the second of `out`.
inline void own_product(const Tensor& a, const Tensor& b, const Tensor& out, bool add) {
  ProductParams p{};
  p.dtype = scalar_kind("product", a);
  p.rows = a.size(0), p.columns = b.size(1), p.depth = a.size(1);
  p.a = a.const_data_ptr(), p.a_row_stride = a.stride(0), p.a_depth_stride = a.stride(1);
  p.b = b.const_data_ptr(), p.b_depth_stride = b.stride(0), p.b_column_stride = b.stride(1);
  p.c = out.mutable_data_ptr(), p.c_row_stride = out.stride(0);
  p.add = add;
  const cpu::Threads pool = threads();
  const Workspace workspace(cpu::kernels().product_workspace(p, pool));
  cpu::kernels().product(p, pool, workspace.data());
}

inline bool takes_own_product(ScalarType type, int64_t rows, int64_t columns) {
  return has_product(type) && cpu::has_faster_product(rows, columns);
}

// out (rows, columns) = a (rows, depth) @ b (depth, columns), or out += that; by torch where torch is faster.
inline void multiply_into(const Tensor& a, const Tensor& b, const Tensor& out, bool add = false) {
  const bool fits = has_unit_stride(a) && has_unit_stride(b) && out.stride(1) == 1;
  if (fits && takes_own_product(a.scalar_type(), a.size(0), b.size(1))) return own_product(a, b, out, add);
  if (add) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_addmm_out(out.get(), out.get(), a.get(), b.get(), 1, 1));
  } else {
    TORCH_ERROR_CODE_CHECK(aoti_torch_mm_out(out.get(), a.get(), b.get()));
  }
}

}  // namespace binding
}  // namespace hsm
