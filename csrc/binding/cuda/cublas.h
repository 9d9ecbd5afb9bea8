// Products by the cuBLAS that torch has loaded, on the handle, stream and workspace that torch keeps for the current stream.
//
// Not by torch's operators: they round the products of 16-bit types to 16 bits, cannot multiply both directions with weights of
// their own at once, and take longer on the host than a step takes on the GPU. The functions are looked up at run time, so that the
// library needs no header of cuBLAS and loads where torch has no CUDA.
#pragma once

#include "cuda/passes.h"

namespace hsm {
namespace binding {

class Cublas {
 public:
  // `allow_tf32`: products of float32 may round their operands to TF32.
  Cublas(const char* op, bool allow_tf32);
  ~Cublas();
  Cublas(const Cublas&) = delete;
  Cublas& operator=(const Cublas&) = delete;

  cuda::Products products();

 private:
  static void multiply(void* context, const cuda::BatchedProduct& product);
  void check(int status) const;

  const char* op_;
  void* handle_ = nullptr;
  int mode_before_ = 0;
};

// A function of libtorch_cuda, or of a library that it is linked to; throws where there is none.
void* torch_cuda_function(const char* op, const char* name);

}  // namespace binding
}  // namespace hsm
