// Vectors of neighbouring hidden units, by the compiler's vector extensions: one source for every instruction set.
//
// Included once per instruction set, with HSM_ISA naming its namespace and HSM_VECTOR_BYTES its register width. No function of
// the standard library may be instantiated from these headers: the linker would keep one copy for all instruction sets.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#ifdef __x86_64__
#include <immintrin.h>
#endif

#define HSM_INLINE inline __attribute__((always_inline))
#define HSM_STRING_(name) #name
#define HSM_STRING(name) HSM_STRING_(name)

namespace hsm {
namespace cpu {
namespace HSM_ISA {

constexpr char instruction_set[] = HSM_STRING(HSM_ISA);

// Storage types: arithmetic is done in float.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// What a storage type is computed in.
template <class T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};

// What the operands of a product of some storage type are kept in: as a rule what they are computed in.
template <class T>
struct Operand {
  using type = typename Accumulator<T>::type;
};
#ifdef HSM_BFLOAT16_PAIRS
template <>
struct Operand<BFloat16> {
  using type = BFloat16;
};
#endif

template <class A>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(HSM_VECTOR_BYTES)));
  typedef int32_t integers __attribute__((vector_size(HSM_VECTOR_BYTES)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(HSM_VECTOR_BYTES)));
};
template <class A>
using Vector = typename VectorOf<A>::type;
using Integers = VectorOf<float>::integers;

// Elements of A in one vector.
template <class A>
constexpr int lanes() {
  return HSM_VECTOR_BYTES / static_cast<int>(sizeof(A));
}

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Bits of a float vector, and the 16-bit elements of as many lanes.
typedef uint32_t Words __attribute__((vector_size(HSM_VECTOR_BYTES)));
typedef uint16_t Halfwords __attribute__((vector_size(HSM_VECTOR_BYTES / 2)));

// Each halfword as a word, and the low half of each word. What compilers make of a plain conversion goes in two halves.
HSM_INLINE Words widen_bits(Halfwords x) {
#if HSM_VECTOR_BYTES == 64
  return (Words)_mm512_cvtepu16_epi32((__m256i)x);
#elif HSM_VECTOR_BYTES == 32
  return (Words)_mm256_cvtepu16_epi32((__m128i)x);
#else
  return __builtin_convertvector(x, Words);
#endif
}
HSM_INLINE Halfwords narrow_bits(Words x) {
#if HSM_VECTOR_BYTES == 64
  return (Halfwords)_mm512_cvtepi32_epi16((__m512i)x);
#else
  return __builtin_convertvector(x, Halfwords);
#endif
}

HSM_INLINE Words choose_bits(Words condition, Words yes, Words no) { return (condition & yes) | (~condition & no); }

// Conversions between a storage type and the vector that is computed with.
template <class A>
struct Unconverted {
  using Stored = Vector<A>;
  static HSM_INLINE Vector<A> widen(Stored x) { return x; }
  static HSM_INLINE Stored narrow(Vector<A> x) { return x; }
};
template <class T>
struct Conversion;
template <>
struct Conversion<float> : Unconverted<float> {};
template <>
struct Conversion<double> : Unconverted<double> {};

template <>
struct Conversion<BFloat16> {
  using Stored = Halfwords;
  static HSM_INLINE Vector<float> widen(Stored x) {
    return (Vector<float>)(widen_bits(x) << 16);
  }
  // To nearest, ties to even; NaN stays NaN.
  static HSM_INLINE Stored narrow(Vector<float> x) {
#ifdef HSM_BFLOAT16_PAIRS
    return (Stored)_mm512_cvtneps_pbh((__m512)x);  // and subnormal numbers become zero, as in products
#else
    const Words bits = (Words)x;
    const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return narrow_bits(choose_bits((Words)(x != x), (bits >> 16) | 0x40u, rounded));
#endif
  }
};

template <>
struct Conversion<Float16> {
  using Stored = Halfwords;
  static HSM_INLINE Vector<float> widen(Stored x) {
    const Words bits = widen_bits(x), magnitude = bits & 0x7fffu;
    // Shifting moves the exponent field over; 2^112 corrects its bias and makes subnormal numbers normal.
    const Vector<float> scaled = (Vector<float>)(magnitude << 13) * 0x1p112f;
    const Words infinite = (Words)(magnitude >= 0x7c00u) & 0x7f800000u;
    return (Vector<float>)((Words)scaled | infinite | ((bits & 0x8000u) << 16));
  }
  // To nearest, ties to even; too large becomes infinite; NaN stays NaN.
  static HSM_INLINE Stored narrow(Vector<float> x) {
    const Words bits = (Words)x, magnitude = bits & 0x7fffffffu;
    const Words normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    // Adding 0.5 lines a subnormal result up with the low bits, rounded by the addition.
    const Words subnormal = (Words)((Vector<float>)magnitude + 0.5f) - 0x3f000000u;
    const Words finite = choose_bits((Words)(magnitude < 0x38800000u), subnormal, normal);
    const Words overflow = choose_bits((Words)(magnitude > 0x7f800000u), Words{} + 0x7e00u, Words{} + 0x7c00u);
    const Words result = choose_bits((Words)(magnitude >= 0x47800000u), overflow, finite);
    return narrow_bits(result | ((bits >> 16) & 0x8000u));
  }
};

// The parts of a vector at the end of a row, out of line to keep the code small.
template <class T>
__attribute__((noinline)) void copy_elements(const void* from, void* to, int count) {
  for (int k = 0; k < count; ++k) static_cast<T*>(to)[k] = static_cast<const T*>(from)[k];
}

// The first `count` elements at `from`, as computed with; the other lanes are zero.
template <class T, class A = typename Accumulator<T>::type>
HSM_INLINE Vector<A> load(const T* from, int count = lanes<A>()) {
  typename Conversion<T>::Stored stored = {};
  if (__builtin_expect(count == lanes<A>(), 1)) {
    memcpy(&stored, from, sizeof stored);
  } else {
    copy_elements<T>(from, &stored, count);
  }
  return Conversion<T>::widen(stored);
}

// Writes the first `count` elements of `vector` to `to`.
template <class T, class A = typename Accumulator<T>::type>
HSM_INLINE void store(Vector<A> vector, T* to, int count = lanes<A>()) {
  const typename Conversion<T>::Stored stored = Conversion<T>::narrow(vector);
  if (__builtin_expect(count == lanes<A>(), 1)) {
    memcpy(to, &stored, sizeof stored);
  } else {
    copy_elements<T>(&stored, to, count);
  }
}

}  // namespace HSM_ISA
}  // namespace cpu
}  // namespace hsm
