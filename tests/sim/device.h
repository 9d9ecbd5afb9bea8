// The CUDA part of csrc/cuda/device.cuh, which includes this, for a C++ compiler: the same names, by the simulator.
#pragma once

#include <cstring>

#include "runtime.h"
#include "scalars.h"
#include "warp.h"

#define HSM_KERNEL(threads) void
#define HSM_ARGUMENT const
#define HSM_DEVICE inline

// As in the CUDA runtime.
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };
struct CUstream_st;
using cudaStream_t = CUstream_st*;

inline const char* cudaGetErrorString(cudaError_t) { return sim::last_error().c_str(); }
inline cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 13000, cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = 12040, cudaSuccess; }

namespace hsm {
namespace cuda {

template <class... Arguments>
cudaError_t launch(void (*kernel)(Arguments...), const LaunchShape& shape, cudaStream_t, const Arguments&... arguments) {
  if (const int failure = sim::planned_failure()) return static_cast<cudaError_t>(failure);
  sim::LaunchConfig config;
  config.grid = {shape.grid_x, shape.grid_y, shape.grid_z};
  config.block = {shape.threads, 1, 1};
  config.shared_bytes = shape.shared_bytes;
  return sim::launch(config, [&] { kernel(arguments...); }) ? cudaSuccess : cudaErrorLaunchFailure;
}

// Those of an H200.
inline cudaError_t facts_of_device(void (*)(), DeviceFacts& facts) {
  facts = {90, 132, 227 << 10, 16};
  return cudaSuccess;
}

inline cudaError_t fill_async(void* data, int byte, size_t bytes, cudaStream_t) {
  if (bytes) std::memset(data, byte, bytes);
  return cudaSuccess;
}

inline cudaError_t copy_async(void* to, const void* from, size_t bytes, cudaStream_t) {
  if (bytes) std::memmove(to, from, bytes);
  return cudaSuccess;
}

inline unsigned block_x() { return sim::position().block.x; }
inline unsigned block_y() { return sim::position().block.y; }
inline unsigned block_z() { return sim::position().block.z; }
inline unsigned thread() { return sim::position().thread.x; }

template <class T>
T* shared_storage() {
  return static_cast<T*>(sim::shared_memory());
}

inline void sync_threads(sim::Where where = sim::Where::here()) { sim::block_barrier(where); }

template <class T>
T shuffle_down(T value, unsigned lanes, sim::Where where = sim::Where::here()) {
  return sim::shuffle(sim::all_lanes, value, sim::position().lane + lanes, where);
}

using sim::bfloat16;
using sim::float16;

inline double widen(double x) { return x; }
inline float widen(float x) { return x; }
inline float widen(bfloat16 x) { return static_cast<float>(x); }
inline float widen(float16 x) { return static_cast<float>(x); }

template <class T, class A>
T narrow(A x) {
  return static_cast<T>(x);
}

}  // namespace cuda
}  // namespace hsm
