// sigmoid and tanh on vectors. float: polynomials of our own (least squares, reweighted towards the minimax error);
// double: the C library, lane by lane.
#pragma once

#if HSM_VECTOR_BYTES == 64
#include <immintrin.h>
#endif

#include "cpu/simd.h"

namespace hsm {
namespace cpu {
namespace HSM_ISA {

using Floats = Vector<float>;
using Doubles = Vector<double>;

HSM_INLINE Floats choose(Integers condition, Floats yes, Floats no) { return condition ? yes : no; }

// 1 / x, to 2 units in the last place where an instruction gives a first guess: for normal x whose reciprocal is normal.
HSM_INLINE Floats reciprocal(Floats x) {
#if HSM_VECTOR_BYTES == 64
  const Floats guess = (Floats)_mm512_rcp14_ps((__m512)x);
  return guess * (1.0f - x * guess) + guess;
#else
  return 1.0f / x;
#endif
}

// NaN stays NaN.
HSM_INLINE Floats clamp(Floats x, float low, float high) {
  const Floats zero = {};
  x = choose(x < zero + low, zero + low, x);
  return choose(x > zero + high, zero + high, x);
}

// e^x = scale * (1 + rest), for |x| <= 87.3; scale is a power of two.
struct Exponential {
  Floats scale, rest;
};
HSM_INLINE Exponential exponential(Floats x) {
  const Floats zero = {};
  // Adding 1.5 * 2^23 rounds x / ln 2 to an integer n and leaves n in the low bits.
  const Floats magic = zero + 12582912.0f;
  const Floats shifted = x * 1.44269504088896341f + magic;
  const Floats n = shifted - magic;
  const Floats r = (x - n * 0.693145751953125f) - n * 1.42860682030941723e-6f;
  Floats q = zero + 0.00138825216f;
  q = q * r + 0.00836652069f;
  q = q * r + 0.0416671999f;
  q = q * r + 0.166665436f;
  q = q * r + 0.499999982f;
  return {(Floats)(((Integers)shifted << 23) + 0x3f800000), q * (r * r) + r};
}

struct FloatMath {
  static HSM_INLINE Floats sigmoid(Floats x) {
    const Exponential e = exponential(clamp(-x, -87.3f, 87.3f));
    return reciprocal(1.0f + (e.scale * e.rest + e.scale));
  }

  // From e^2x - 1, which loses nothing near zero: (e^2x - 1) / (e^2x + 1). Beyond |x| = 10 it is 1.
  static HSM_INLINE Floats tanh(Floats x) {
    const Exponential e = exponential(clamp(x + x, -20.0f, 20.0f));
    const Floats minus_one = e.scale * e.rest + (e.scale - 1.0f);
    return minus_one / (minus_one + 2.0f);
  }
};

struct DoubleMath {
  static HSM_INLINE Doubles sigmoid(Doubles x) {
    for (int k = 0; k < lanes<double>(); ++k) x[k] = 1.0 / (1.0 + ::exp(-x[k]));
    return x;
  }

  static HSM_INLINE Doubles tanh(Doubles x) {
    for (int k = 0; k < lanes<double>(); ++k) x[k] = ::tanh(x[k]);
    return x;
  }
};

template <class A>
struct MathOf {
  using type = FloatMath;
};
template <>
struct MathOf<double> {
  using type = DoubleMath;
};

}  // namespace HSM_ISA
}  // namespace cpu
}  // namespace hsm
