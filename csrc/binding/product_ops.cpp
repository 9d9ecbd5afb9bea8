// hsm_kernels::product on the CPU. Schema and meaning: hsm_kernels/_ops.py.
#include "binding/product.h"

namespace hsm {
namespace binding {
namespace {

Matrix matrix(const Tensor& tensor) {
  Matrix all = matrix_in(scalar_kind("product", tensor), tensor, 0, tensor.size(0), tensor.size(1));
  all.row_stride = tensor.stride(0), all.column_stride = tensor.stride(1);
  return all;
}

Tensor product(Tensor a, Tensor b) {
  const char* op = "product";
  STD_TORCH_CHECK(a.dim() == 2 && b.dim() == 2 && a.size(1) == b.size(0), op, ": a and b must have shapes (M, K) and (K, N), got ",
                  text(shape_of(a)), " and ", text(shape_of(b)));
  check_type(op, "b", b, a.scalar_type(), a);
  const Tensor out = empty(a, {a.size(0), b.size(1)});
  multiply_into(matrix(a), matrix(b), matrix(out));
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(hsm_kernels, CPU, m) { m.impl("product", TORCH_BOX(&product)); }

}  // namespace
}  // namespace binding
}  // namespace hsm
