// What the kernels ask of the machine, and the only file in which a GPU and the host simulator of tests/sim differ: the simulator's
// header defines the same names for a C++ compiler.
//
//   HSM_KERNEL(threads) name(HSM_ARGUMENT Type argument)   a kernel for blocks of at most `threads` threads
//   HSM_DEVICE                                             a function that kernels call
//   launch(kernel, shape, stream, arguments...)            -> cudaError_t; the arguments have exactly the kernel's types
//   block_x() block_y() block_z() thread()                 where a thread is; blocks have one dimension
//   shared_storage<T>()                                    the block's LaunchShape::shared_bytes, aligned to 16 bytes
//   sync_threads()                                         the barrier of a block
//   shuffle_down(value, lanes)                             the value of a higher lane of the warp; all lanes call it
//   bfloat16, float16, widen(x), narrow<T>(x)              the 16-bit types, to and from float, rounded to nearest even
//   cudaError_t, cudaSuccess, cudaStream_t                 as in the CUDA runtime
//   facts_of_device(kernel, facts)                         -> cudaError_t; of the current device, as a kernel of this library finds it
//   fill_async(data, byte, bytes, stream)                  cudaMemsetAsync
//   copy_async(to, from, bytes, stream)                    cudaMemcpyAsync between places on the device
#pragma once

#include <cstddef>

#include "cuda/plan.h"

namespace hsm {
namespace cuda {

struct LaunchShape {
  unsigned grid_x, grid_y = 1, grid_z = 1;
  unsigned threads = 1;
  size_t shared_bytes = 0;
};

}  // namespace cuda
}  // namespace hsm

#ifdef HSM_SIMULATOR
#include "sim/device.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// One block for each multiprocessor is enough; for more, ptxas spills registers of these latency-bound kernels.
#define HSM_KERNEL(threads) __global__ void __launch_bounds__(threads, 1)
// One copy for all threads, which may be referred to.
#define HSM_ARGUMENT const __grid_constant__
#define HSM_DEVICE __device__ __forceinline__

namespace hsm {
namespace cuda {

template <class... Arguments>
cudaError_t launch(void (*kernel)(Arguments...), const LaunchShape& shape, cudaStream_t stream, const Arguments&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(shape.grid_x, shape.grid_y, shape.grid_z);
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

inline cudaError_t facts_of_device(void (*kernel)(), DeviceFacts& facts) {
  int device = 0, major = 0, minor = 0, shared_bytes = 0;
  cudaFuncAttributes code{};
  cudaError_t status = cudaGetDevice(&device);
  const auto read = [&](int& value, cudaDeviceAttr attribute) {
    if (status == cudaSuccess) status = cudaDeviceGetAttribute(&value, attribute, device);
  };
  read(major, cudaDevAttrComputeCapabilityMajor);
  read(minor, cudaDevAttrComputeCapabilityMinor);
  read(facts.multiprocessors, cudaDevAttrMultiProcessorCount);
  read(shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  if (status == cudaSuccess) status = cudaFuncGetAttributes(&code, kernel);
  if (status != cudaSuccess) return status;
  // Code that the driver compiled from PTX has what the PTX was made for.
  facts.capability = code.ptxVersion < 10 * major + minor ? code.ptxVersion : 10 * major + minor;
  facts.shared_bytes = shared_bytes;
  facts.largest_cluster = 1;
  if (facts.capability < 90) return cudaSuccess;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(16);
  config.blockDim = dim3(32);
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (status == cudaSuccess) status = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (status == cudaSuccess) status = cudaOccupancyMaxPotentialClusterSize(&facts.largest_cluster, kernel, &config);
  return status;
}

inline cudaError_t fill_async(void* data, int byte, size_t bytes, cudaStream_t stream) {
  return bytes ? cudaMemsetAsync(data, byte, bytes, stream) : cudaSuccess;
}

inline cudaError_t copy_async(void* to, const void* from, size_t bytes, cudaStream_t stream) {
  return bytes ? cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream) : cudaSuccess;
}

HSM_DEVICE unsigned block_x() { return blockIdx.x; }
HSM_DEVICE unsigned block_y() { return blockIdx.y; }
HSM_DEVICE unsigned block_z() { return blockIdx.z; }
HSM_DEVICE unsigned thread() { return threadIdx.x; }

template <class T>
HSM_DEVICE T* shared_storage() {
  extern __shared__ __align__(16) unsigned char storage[];
  return reinterpret_cast<T*>(storage);
}

HSM_DEVICE void sync_threads() { __syncthreads(); }

template <class T>
HSM_DEVICE T shuffle_down(T value, unsigned lanes) {
  return __shfl_down_sync(0xffffffffu, value, lanes);
}

using bfloat16 = __nv_bfloat16;
using float16 = __half;

HSM_DEVICE double widen(double x) { return x; }
HSM_DEVICE float widen(float x) { return x; }
HSM_DEVICE float widen(bfloat16 x) { return __bfloat162float(x); }
HSM_DEVICE float widen(float16 x) { return __half2float(x); }

template <class T>
struct Narrow;
template <>
struct Narrow<double> {
  static HSM_DEVICE double from(double x) { return x; }
};
template <>
struct Narrow<float> {
  static HSM_DEVICE float from(float x) { return x; }
};
template <>
struct Narrow<bfloat16> {
  static HSM_DEVICE bfloat16 from(float x) { return __float2bfloat16_rn(x); }
};
template <>
struct Narrow<float16> {
  static HSM_DEVICE float16 from(float x) { return __float2half_rn(x); }
};

template <class T, class A>
HSM_DEVICE T narrow(A x) {
  return Narrow<T>::from(x);
}

}  // namespace cuda
}  // namespace hsm

#endif
