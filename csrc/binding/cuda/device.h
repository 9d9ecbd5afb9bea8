// How the operators run on a GPU: on the caller's stream, in memory of torch's allocator, without waiting for anything.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include "binding/cuda/cublas.h"
#include "binding/layer.h"

namespace hsm {
namespace binding {

class CudaDevice {
 public:
  static constexpr bool takes_strides = false;  // of the input
  static constexpr bool widens_weights = false;

  // `like`: a tensor of the call, whose device becomes the current one. `allow_tf32`: for products of float32.
  CudaDevice(const char* op, const Tensor& like, bool allow_tf32);

  Tensor empty(const Shape& shape) const;
  // How the recurrence of a pass would run, in words: "cluster: ...".
  std::string explain(const Sizes& sizes, cuda::PassKind pass, bool cuts) const;
  void forward(ForwardParams& p) const;
  LayerGradients backward(BackwardParams& p, const BackwardTensors& tensors) const;

 private:
  Tensor empty(const Shape& shape, int32_t dtype) const;
  Tensor workspace(size_t bytes) const;
  // Read anew for each call: HSM_KERNELS_CUDA_VARIANT is for tests and benchmarks.
  cuda::Setting setting() const;
  void check(cuda::Status status) const;

  const char* op_;
  int32_t index_, dtype_;
  bool allow_tf32_;
  torch::stable::accelerator::DeviceGuard guard_;
  CUstream_st* stream_;
};

}  // namespace binding
}  // namespace hsm
