// What the operators find on a GPU beside the kernels - cuBLAS (csrc/binding/cuda/cublas.h) and a stream - and their registration.
#include "sim/torch_on_cpu.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/headeronly/util/Exception.h>

#include <cstring>
#include <string>

#include "binding/cuda/cublas.h"
#include "cuda/device.cuh"
#include "sim/library.h"

namespace hsm {
namespace binding {
namespace {

using cuda::BatchedProduct;

// By plain loops. `Sum`: what products are summed in.
template <class T, class Sum, class C>
void multiply_as(const BatchedProduct& p, bool as_tf32) {
  const auto operand = [&](const void* data, int64_t at) {
    const Sum value = static_cast<Sum>(cuda::widen(static_cast<const T*>(data)[at]));
    return as_tf32 ? static_cast<Sum>(sim::round_to_tf32(static_cast<float>(value))) : value;
  };
  for (int64_t i = 0; i < p.batch; ++i)
    for (int64_t row = 0; row < p.rows; ++row)
      for (int64_t column = 0; column < p.columns; ++column) {
        Sum sum = 0;
        for (int64_t k = 0; k < p.depth; ++k)
          sum += operand(p.a, i * p.a_batch_stride + row * p.a_row_stride + k * p.a_depth_stride) *
                 operand(p.b, i * p.b_batch_stride + k * p.b_depth_stride + column * p.b_column_stride);
        C& out = static_cast<C*>(p.c)[i * p.c_batch_stride + row * p.c_row_stride + column];
        out = cuda::narrow<C>(p.add ? sum + static_cast<Sum>(cuda::widen(out)) : sum);
      }
}

template <class Half>
void multiply_halves(const BatchedProduct& p) {
  p.dtype_of_c == ScalarKind::float32 ? multiply_as<Half, float, float>(p, false) : multiply_as<Half, float, Half>(p, false);
}

AOTITorchError no_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}

}  // namespace

Cublas::Cublas(const char* op, bool allow_tf32) : op_(op), mode_before_(allow_tf32) {}
Cublas::~Cublas() = default;

cuda::Products Cublas::products() { return {multiply, this}; }

void Cublas::multiply(void* context, const BatchedProduct& p) {
  const bool unit_strides = (p.a_row_stride == 1 || p.a_depth_stride == 1) && (p.b_depth_stride == 1 || p.b_column_stride == 1);
  STD_TORCH_CHECK(unit_strides && p.batch > 0 && p.rows > 0 && p.columns > 0, "simulator: cuBLAS would refuse this product");
  switch (p.dtype) {
    case ScalarKind::float64: return multiply_as<double, double, double>(p, false);
    case ScalarKind::float32: return multiply_as<float, float, float>(p, static_cast<Cublas*>(context)->mode_before_ != 0);
    case ScalarKind::bfloat16: return multiply_halves<cuda::bfloat16>(p);
    case ScalarKind::float16: return multiply_halves<cuda::float16>(p);
  }
}

void* torch_cuda_function(const char* op, const char* name) {
  STD_TORCH_CHECK(std::strcmp(name, "aoti_torch_get_current_cuda_stream") == 0, op, ": the simulator has no ", name);
  return reinterpret_cast<void*>(no_stream);
}

}  // namespace binding
}  // namespace hsm

namespace sim {

std::vector<Registration::Function>& Registration::all() {
  static std::vector<Function> functions;
  return functions;
}

}  // namespace sim

// Registers the operators in a namespace of torch.ops that has their schemas.
SIM_EXPORT void sim_register_operators(const char* name) {
  using torch::stable::detail::StableLibrary;
  using torch::stable::detail::StableTorchLibraryInit;
  for (const auto function : sim::Registration::all()) new StableTorchLibraryInit(StableLibrary::Kind::IMPL, function, name, "CPU", __FILE__, __LINE__);
}
