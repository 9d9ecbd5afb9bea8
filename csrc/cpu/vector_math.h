// sigmoid and tanh on vectors. float: polynomials of our own (least squares, reweighted towards the minimax error);
// double: the C library, lane by lane.
#pragma once

#include "cpu/simd.h"

namespace hsm {
namespace cpu {
namespace HSM_ISA {

using Floats = Vector<float>;
using Doubles = Vector<double>;

HSM_INLINE Floats choose(Integers condition, Floats yes, Floats no) { return condition ? yes : no; }

// e^x for x up to 88.3; larger x gives the value there, x below -87.3 the value there. NaN stays NaN.
HSM_INLINE Floats exp_clamped(Floats x) {
  const Floats zero = {};
  const Floats low = zero - 87.3f, high = zero + 88.3f;
  x = choose(x < low, low, x);
  x = choose(x > high, high, x);
  // Adding 1.5 * 2^23 rounds x / ln 2 to an integer n and leaves n in the low bits.
  const Floats magic = zero + 12582912.0f;
  const Floats shifted = x * 1.44269504088896341f + magic;
  const Floats n = shifted - magic;
  const Floats r = (x - n * 0.693145751953125f) - n * 1.42860682030941723e-6f;
  Floats q = zero + 0.00139517197f;
  q = q * r + 0.00836959854f;
  q = q * r + 0.0416661873f;
  q = q * r + 0.166665122f;
  q = q * r + 0.5f;
  const Floats power = q * (r * r) + r + 1.0f;
  const Integers scale = ((Integers)shifted << 23) + 0x3f800000;
  return power * (Floats)scale;
}

struct FloatMath {
  static HSM_INLINE Floats sigmoid(Floats x) { return 1.0f / (1.0f + exp_clamped(-x)); }

  static HSM_INLINE Floats tanh(Floats x) {
    const Floats zero = {};
    const Floats magnitude = choose(x < zero, -x, x);
    const Floats z = x * x;
    Floats p = zero - 0.00569351809f;
    p = p * z + 0.0206304099f;
    p = p * z - 0.0537376143f;
    p = p * z + 0.133314252f;
    p = p * z - 0.333332807f;
    const Floats near_zero = p * z * x + x;
    const Floats positive = 1.0f - 2.0f / (exp_clamped(magnitude + magnitude) + 1.0f);
    const Floats far = choose(x < zero, -positive, positive);
    return choose(magnitude < zero + 0.625f, near_zero, far);
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
