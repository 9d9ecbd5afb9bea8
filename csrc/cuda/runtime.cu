// What callers that do not include CUDA's headers want to know of it.
#include "cuda/device.cuh"
#include "cuda/passes.h"

namespace hsm {
namespace cuda {
namespace {

HSM_KERNEL(32) nothing() {}

}  // namespace

const char* status_text(Status status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }

Status versions(int& runtime, int& driver) {
  const cudaError_t status = cudaRuntimeGetVersion(&runtime);
  return status == cudaSuccess ? cudaDriverGetVersion(&driver) : status;
}

Status find_device_facts(DeviceFacts& facts) { return facts_of_device(nothing, facts); }

Status fill(void* data, int byte, size_t bytes, CUstream_st* stream) { return fill_async(data, byte, bytes, stream); }

}  // namespace cuda
}  // namespace hsm
