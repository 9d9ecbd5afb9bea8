// What callers that do not include CUDA's headers want to know of it.
#include "cuda/device.cuh"
#include "cuda/step.h"

namespace hsm {
namespace cuda {

const char* status_text(Status status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }

Status versions(int& runtime, int& driver) {
  const cudaError_t status = cudaRuntimeGetVersion(&runtime);
  return status == cudaSuccess ? cudaDriverGetVersion(&driver) : status;
}

Status fill(void* data, int byte, size_t bytes, CUstream_st* stream) { return fill_async(data, byte, bytes, stream); }

}  // namespace cuda
}  // namespace hsm
