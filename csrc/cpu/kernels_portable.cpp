// The kernels for any CPU: 16-byte vectors (SSE2 on x86-64, NEON on aarch64).
#define HSM_ISA portable
#define HSM_VECTOR_BYTES 16
#ifdef __aarch64__
#define HSM_VECTOR_REGISTERS 32
#else
#define HSM_VECTOR_REGISTERS 16
#endif
#include "cpu/instantiate.h"
