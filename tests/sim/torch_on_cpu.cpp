// What the operators find on a GPU beside the kernels: a libtorch_cuda.so with cuBLAS and a stream, memory that may run out, launches
// that may fail; and the registration of the operators.
#include "sim/torch_on_cpu.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <cstring>
#include <string>

#include "binding/cuda/cublas.h"
#include "cuda/device.cuh"
#include "sim/library.h"

#undef aoti_torch_empty_strided
#undef torch_call_dispatcher

namespace sim {
namespace {

// The numbers of cublas_api.h and library_types.h.
enum Status { success = 0, invalid_value = 7, not_supported = 15 };
enum Type { float32 = 0, float64 = 1, float16_type = 2, bfloat16_type = 14 };
enum Compute { in_float32 = 68, in_float64 = 70 };
constexpr int tf32_math = 3, math_kind = 15, no_reduced_reduction = 16;

struct Handle {
  int math_mode = 0;
};
Handle handle;

int get_math_mode(void* given, int* mode) { return *mode = static_cast<Handle*>(given)->math_mode, success; }
int set_math_mode(void* given, int mode) { return static_cast<Handle*>(given)->math_mode = mode, success; }
const char* status_string(int status) { return status == invalid_value ? "CUBLAS_STATUS_INVALID_VALUE" : "CUBLAS_STATUS_NOT_SUPPORTED"; }

// A matrix that counts down columns, or the transposed one.
struct Matrix {
  bool transposed;
  int64_t leading;

  int64_t at(int64_t row, int64_t column) const { return transposed ? column + row * leading : row + column * leading; }
  bool holds(int64_t rows, int64_t columns) const { return leading >= std::max<int64_t>(1, transposed ? columns : rows); }
};

struct Product {
  int64_t m, n, k;
  Matrix a, b;
  int64_t c_leading, a_stride, b_stride, c_stride, batch;
};

// C = A @ B or C += A @ B by plain loops. `Sum`: what products are summed in.
template <class T, class Sum, class C>
int multiply(const Product& p, const void* a, const void* b, void* c, bool add, bool as_tf32) {
  const auto operand = [&](const void* data, int64_t at) {
    const Sum value = static_cast<Sum>(hsm::cuda::widen(static_cast<const T*>(data)[at]));
    return as_tf32 ? static_cast<Sum>(round_to_tf32(static_cast<float>(value))) : value;
  };
  for (int64_t i = 0; i < p.batch; ++i)
    for (int64_t column = 0; column < p.n; ++column)
      for (int64_t row = 0; row < p.m; ++row) {
        Sum sum = 0;
        for (int64_t k = 0; k < p.k; ++k) sum += operand(a, i * p.a_stride + p.a.at(row, k)) * operand(b, i * p.b_stride + p.b.at(k, column));
        C& out = static_cast<C*>(c)[i * p.c_stride + row + column * p.c_leading];
        out = hsm::cuda::narrow<C>(add ? sum + static_cast<Sum>(hsm::cuda::widen(out)) : sum);
      }
  return success;
}

template <class Sum>
bool is_add(const void* alpha, const void* beta, bool& add) {
  add = *static_cast<const Sum*>(beta) == 1;
  return *static_cast<const Sum*>(alpha) == 1 && (add || *static_cast<const Sum*>(beta) == 0);
}

// What cuBLAS's manual allows, of which only the scales 0 and 1 are needed.
int gemm_batched(void* given, int op_a, int op_b, int m, int n, int k, const void* alpha, const void* a, int type_a, int lda, long long stride_a,
                 const void* b, int type_b, int ldb, long long stride_b, const void* beta, void* c, int type_c, int ldc, long long stride_c,
                 int batch, int compute, int algorithm) {
  const Product p{m, n, k, {op_a == 1, lda}, {op_b == 1, ldb}, ldc, stride_a, stride_b, stride_c, batch};
  const bool valid = p.a.holds(m, k) && p.b.holds(k, n) && ldc >= std::max(1, m) && m > 0 && n > 0 && k > 0 && batch > 0;
  if (!valid || op_a / 2 || op_b / 2 || algorithm != -1) return invalid_value;
  const bool wide = compute == in_float64;
  bool add = false;
  if (type_a != type_b || !(wide ? is_add<double>(alpha, beta, add) : is_add<float>(alpha, beta, add))) return not_supported;
  if (wide) return type_a == float64 && type_c == float64 ? multiply<double, double, double>(p, a, b, c, add, false) : not_supported;
  const int mode = static_cast<Handle*>(given)->math_mode;
  if (compute != in_float32 || !(mode & no_reduced_reduction)) return not_supported;
  if (type_a == float32 && type_c == float32) return multiply<float, float, float>(p, a, b, c, add, (mode & math_kind) == tf32_math);
  if (type_a == bfloat16_type && type_c == float32) return multiply<bfloat16, float, float>(p, a, b, c, add, false);
  if (type_a == bfloat16_type && type_c == bfloat16_type) return multiply<bfloat16, float, bfloat16>(p, a, b, c, add, false);
  if (type_a == float16_type && type_c == float32) return multiply<float16, float, float>(p, a, b, c, add, false);
  if (type_a == float16_type && type_c == float16_type) return multiply<float16, float, float16>(p, a, b, c, add, false);
  return not_supported;
}

int gemm(void* given, int op_a, int op_b, int m, int n, int k, const void* alpha, const void* a, int type_a, int lda, const void* b, int type_b,
         int ldb, const void* beta, void* c, int type_c, int ldc, int compute, int algorithm) {
  return gemm_batched(given, op_a, op_b, m, n, k, alpha, a, type_a, lda, 0, b, type_b, ldb, 0, beta, c, type_c, ldc, 0, 1, compute, algorithm);
}

int allocations_left = -1;  // before torch has no memory; negative: it has
std::string words;          // what torch says then

AOTITorchError allocate() { return allocations_left < 0 || allocations_left-- > 0 ? AOTI_TORCH_SUCCESS : AOTI_TORCH_FAILURE; }

AOTITorchError current_handle(void** found) {
  *found = &handle;
  return allocate();
}

AOTITorchError no_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}

const struct {
  const char* name;
  void* function;
} functions[] = {
    {"aoti_torch_get_current_cuda_stream", reinterpret_cast<void*>(no_stream)},
    {"torch_get_current_cuda_blas_handle", reinterpret_cast<void*>(current_handle)},
    {"cublasGetMathMode", reinterpret_cast<void*>(get_math_mode)},
    {"cublasSetMathMode", reinterpret_cast<void*>(set_math_mode)},
    {"cublasGetStatusString", reinterpret_cast<void*>(status_string)},
    {"cublasGemmEx", reinterpret_cast<void*>(gemm)},
    {"cublasGemmStridedBatchedEx", reinterpret_cast<void*>(gemm_batched)},
};

}  // namespace

std::vector<Registration::Function>& Registration::all() {
  static std::vector<Function> functions;
  return functions;
}

}  // namespace sim

extern "C" {

void* sim_dlopen(const char* name, int) { return std::strcmp(name, "libtorch_cuda.so") ? nullptr : &sim::handle; }

void* sim_dlsym(void*, const char* name) {
  for (const auto& known : sim::functions)
    if (!std::strcmp(name, known.name)) return known.function;
  return nullptr;
}

const char* sim_exception_what() { return sim::words.c_str(); }

AOTITorchError sim_empty_strided(int64_t dims, const int64_t* sizes, const int64_t* strides, int32_t dtype, int32_t device_type, int32_t index,
                                 AtenTensorHandle* found) {
  return sim::allocate() ? AOTI_TORCH_FAILURE : aoti_torch_empty_strided(dims, sizes, strides, dtype, device_type, index, found);
}

AOTITorchError sim_call_dispatcher(const char* name, const char* overload, StableIValue* stack, uint64_t version) {
  return sim::allocate() ? TORCH_FAILURE : torch_call_dispatcher(name, overload, stack, version);
}

// After so many allocations torch has no memory for one, and says why.
SIM_EXPORT void sim_fail_allocation(int count, const char* words) {
  sim::allocations_left = count;
  sim::words = words;
}

// Why a product of matrices of these sizes is refused before cuBLAS sees it.
SIM_EXPORT const char* sim_refusal_of_product(int64_t rows, int64_t depth, int64_t columns) {
  hsm::cuda::BatchedProduct product{hsm::ScalarKind::float32, hsm::ScalarKind::float32, 1, rows, columns, depth};
  product.a_row_stride = depth, product.a_depth_stride = 1, product.b_depth_stride = columns, product.b_column_stride = 1;
  product.c_row_stride = columns;
  static std::string why;
  why.clear();
  hsm::binding::Cublas cublas("product", false);
  try {
    const hsm::cuda::Products products = cublas.products();
    products.multiply(products.context, product);
  } catch (const std::exception& error) {
    why = error.what();
  }
  return why.c_str();
}

SIM_EXPORT void sim_set_math_mode(int mode) { sim::handle.math_mode = mode; }
SIM_EXPORT int sim_math_mode() { return sim::handle.math_mode; }
}

// Registers the operators in a namespace of torch.ops that has their schemas.
SIM_EXPORT void sim_register_operators(const char* name) {
  using torch::stable::detail::StableLibrary;
  using torch::stable::detail::StableTorchLibraryInit;
  for (const auto function : sim::Registration::all()) new StableTorchLibraryInit(StableLibrary::Kind::IMPL, function, name, "CPU", __FILE__, __LINE__);
}
