// float16 and bfloat16 as cuda_fp16.h and cuda_bf16.h have them: bits, and conversions that round to nearest even.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace sim {

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// `bits` shifted right, rounded to nearest even.
inline uint32_t rounded_shift(uint32_t bits, int shift) {
  if (shift > 31) return 0;
  const uint32_t half = uint32_t{1} << (shift - 1), odd = bits >> shift & 1;
  return static_cast<uint32_t>((uint64_t{bits} + half - 1 + odd) >> shift);
}

struct bfloat16 {
  uint16_t bits;

  bfloat16() = default;
  explicit bfloat16(float x) : bits(std::isnan(x) ? 0x7fff : static_cast<uint16_t>(rounded_shift(bits_of(x), 16))) {}
  explicit operator float() const { return float_of(uint32_t{bits} << 16); }
};

struct float16 {
  uint16_t bits;

  float16() = default;
  explicit float16(float x) : bits(from(x)) {}

  explicit operator float() const {
    const uint32_t sign = uint32_t{bits} >> 15 << 31, exponent = bits >> 10 & 31, mantissa = bits & 1023;
    if (exponent == 31) return float_of(sign | 0x7f800000 | mantissa << 13);
    if (exponent == 0) return std::ldexp(static_cast<float>(mantissa), -24) * (sign ? -1.0f : 1.0f);
    return float_of(sign | (exponent + 112) << 23 | mantissa << 13);
  }

 private:
  static uint16_t from(float x) {
    if (std::isnan(x)) return 0x7fff;
    const uint32_t sign = bits_of(x) >> 16 & 0x8000, magnitude = bits_of(x) & 0x7fffffff;
    const int exponent = static_cast<int>(magnitude >> 23) - 112;  // as float16 counts it
    if (exponent > 30) return static_cast<uint16_t>(sign | 0x7c00);
    // A carry out of the mantissa raises the exponent, up to infinity, as it should.
    if (exponent > 0) return static_cast<uint16_t>(sign | rounded_shift(magnitude - (112u << 23), 13));
    return static_cast<uint16_t>(sign | rounded_shift((magnitude & 0x7fffff) | 0x800000, 14 - exponent));
  }
};

// A float rounded to the 10 bits of mantissa of TF32, ties away from zero.
inline float round_to_tf32(float x) { return std::isfinite(x) ? float_of((bits_of(x) + 0x1000) & 0xffffe000) : x; }

}  // namespace sim
