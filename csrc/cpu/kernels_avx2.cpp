// The kernels for x86-64 with AVX2 and FMA. The standard headers come first, so that nothing of theirs is compiled for it.
#ifdef __x86_64__
#include <immintrin.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#define HSM_ISA avx2
#define HSM_VECTOR_BYTES 32
#define HSM_VECTOR_REGISTERS 16
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#include "cpu/instantiate.h"
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
