#include "binding/cuda/cublas.h"

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <limits>

#include "binding/tensors.h"

namespace hsm {
namespace binding {
namespace {

using cuda::BatchedProduct;

// The numbers of cublas_api.h and library_types.h, which have not changed since cuBLAS 11.
enum { no_transpose = 0, transpose = 1 };
enum { type_of_float32 = 0, type_of_float64 = 1, type_of_float16 = 2, type_of_bfloat16 = 14 };
enum { compute_in_float32 = 68, compute_in_float64 = 70 };
enum { default_math = 0, tf32_math = 3, disallow_reduced_precision_reduction = 16 };
constexpr int default_algorithm = -1;

int type_of(ScalarKind dtype) {
  switch (dtype) {
    case ScalarKind::float64: return type_of_float64;
    case ScalarKind::float32: return type_of_float32;
    case ScalarKind::bfloat16: return type_of_bfloat16;
    default: return type_of_float16;
  }
}

struct Functions {
  AOTITorchError (*current_handle)(void**);
  int (*get_math_mode)(void*, int*);
  int (*set_math_mode)(void*, int);
  const char* (*status_string)(int);
  int (*gemm)(void*, int, int, int, int, int, const void*, const void*, int, int, const void*, int, int, const void*, void*, int, int, int, int);
  int (*batched_gemm)(void*, int, int, int, int, int, const void*, const void*, int, int, long long, const void*, int, int, long long, const void*,
                      void*, int, int, long long, int, int, int);
};

template <class Function>
void look_up(const char* op, const char* name, Function*& function) {
  function = reinterpret_cast<Function*>(torch_cuda_function(op, name));
}

const Functions& functions(const char* op) {
  static const Functions found = [op] {
    Functions f;
    look_up(op, "torch_get_current_cuda_blas_handle", f.current_handle);
    look_up(op, "cublasGetMathMode", f.get_math_mode);
    look_up(op, "cublasSetMathMode", f.set_math_mode);
    look_up(op, "cublasGetStatusString", f.status_string);
    look_up(op, "cublasGemmEx", f.gemm);
    look_up(op, "cublasGemmStridedBatchedEx", f.batched_gemm);
    return f;
  }();
  return found;
}

// A matrix as cuBLAS takes it, which counts down columns: it is contiguous that way, or transposed. Of a single column or row the
// leading dimension does not matter, but must be large enough.
struct Operand {
  int operation;
  int64_t leading;
};

Operand operand(int64_t row_stride, int64_t column_stride, int64_t rows, int64_t columns) {
  if (row_stride == 1) return {no_transpose, std::max(column_stride, rows)};
  return {transpose, std::max(row_stride, columns)};
}

}  // namespace

void* torch_cuda_function(const char* op, const char* name) {
  // torch loads it before anything is on a GPU, but not for all to see.
  static void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  STD_TORCH_CHECK(library, op, ": torch has loaded no libtorch_cuda.so; install a torch with CUDA");
  void* const function = dlsym(library, name);
  STD_TORCH_CHECK(function, op, ": neither libtorch_cuda.so nor a library that it is linked to has ", name,
                  "; use backend='reference' with this torch");
  return function;
}

Cublas::Cublas(const char* op, bool allow_tf32) : op_(op) {
  const Functions& f = functions(op);
  if (f.current_handle(&handle_) != AOTI_TORCH_SUCCESS) fail_for_memory(op, "cuBLAS handle, or workspace for it,", "the current GPU");
  check(f.get_math_mode(handle_, &mode_before_));
  check(f.set_math_mode(handle_, (allow_tf32 ? tf32_math : default_math) | disallow_reduced_precision_reduction));
}

Cublas::~Cublas() { functions(op_).set_math_mode(handle_, mode_before_); }

cuda::Products Cublas::products() { return {&Cublas::multiply, this}; }

void Cublas::check(int status) const {
  if (status) STD_TORCH_CHECK(false, op_, ": cuBLAS failed: ", functions(op_).status_string(status));
}

// C = A @ B by rows is C^T = B^T @ A^T by columns.
void Cublas::multiply(void* context, const BatchedProduct& p) {
  const Cublas& self = *static_cast<const Cublas*>(context);
  const Functions& f = functions(self.op_);
  const Operand b = operand(p.b_column_stride, p.b_depth_stride, p.columns, p.depth);
  const Operand a = operand(p.a_depth_stride, p.a_row_stride, p.depth, p.rows);
  const int64_t largest = std::max({p.batch, p.rows, p.columns, p.depth, a.leading, b.leading, p.c_row_stride});
  STD_TORCH_CHECK(largest <= std::numeric_limits<int>::max(), self.op_, ": a matrix has ", largest, " rows or columns, cuBLAS counts up to 2^31 - 1");
  const bool wide = p.dtype == ScalarKind::float64;
  const double one_64 = 1, beta_64 = p.add;
  const float one_32 = 1, beta_32 = p.add;
  const void* one = wide ? static_cast<const void*>(&one_64) : &one_32;
  const void* beta = wide ? static_cast<const void*>(&beta_64) : &beta_32;
  const int compute = wide ? compute_in_float64 : compute_in_float32;
  const int type = type_of(p.dtype), type_of_c = type_of(p.dtype_of_c);
  const int m = static_cast<int>(p.columns), n = static_cast<int>(p.rows), k = static_cast<int>(p.depth);
  const int leading_a = static_cast<int>(a.leading), leading_b = static_cast<int>(b.leading), leading_c = static_cast<int>(p.c_row_stride);
  if (p.batch == 1) {
    self.check(f.gemm(self.handle_, b.operation, a.operation, m, n, k, one, p.b, type, leading_b, p.a, type, leading_a, beta, p.c, type_of_c,
                      leading_c, compute, default_algorithm));
  } else {
    self.check(f.batched_gemm(self.handle_, b.operation, a.operation, m, n, k, one, p.b, type, leading_b, p.b_batch_stride, p.a, type, leading_a,
                              p.a_batch_stride, beta, p.c, type_of_c, leading_c, p.c_batch_stride, static_cast<int>(p.batch), compute,
                              default_algorithm));
  }
}

}  // namespace binding
}  // namespace hsm
