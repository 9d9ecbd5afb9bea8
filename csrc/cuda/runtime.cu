// What callers that do not include CUDA's headers want to know of it.
#include "cuda/device.cuh"
#include "cuda/step.h"

namespace hsm {
namespace cuda {

const char* status_text(Status status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }

}  // namespace cuda
}  // namespace hsm
