// hsm_kernels::product on the CPU. Schema and meaning: hsm_kernels/_ops.py.
#include "binding/product.h"

namespace hsm {
namespace binding {
namespace {

Tensor product(Tensor a, Tensor b) {
  const char* op = "product";
  STD_TORCH_CHECK(a.dim() == 2 && b.dim() == 2 && a.size(1) == b.size(0), op, ": a and b must have shapes (M, K) and (K, N), got ",
                  text(shape_of(a)), " and ", text(shape_of(b)));
  check_type(op, "b", b, a.scalar_type(), a);
  const Tensor out = empty(a, {a.size(0), b.size(1)});
  multiply_into(a, b, out);
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(hsm_kernels, CPU, m) { m.impl("product", TORCH_BOX(&product)); }

}  // namespace
}  // namespace binding
}  // namespace hsm
