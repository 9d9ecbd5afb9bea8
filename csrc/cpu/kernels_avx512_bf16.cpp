// What x86-64 with AVX-512 does better where it can multiply pairs of bfloat16, AVX512_BF16: both passes of bfloat16 tensors.
// The standard headers come first, so that nothing of theirs is compiled for it.
#include "cpu/kernels.h"
#ifdef HSM_HAS_AVX512_BF16
#include <immintrin.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#define HSM_ISA avx512_bf16
#define HSM_VECTOR_BYTES 64
#define HSM_VECTOR_REGISTERS 32
#define HSM_BFLOAT16_PAIRS
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,prefer-vector-width=512")
#endif
#include "cpu/instantiate_bfloat16.h"
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
