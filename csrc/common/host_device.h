// Functions that the CPU and the CUDA kernels share.
#pragma once

#ifdef __CUDACC__
#define HSM_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define HSM_HOST_DEVICE inline __attribute__((always_inline))
#endif
