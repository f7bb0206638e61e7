// SPDX-License-Identifier: Apache-2.0
// Half, bfloat16 and directed rounding: the number formats of PTX that C++17 does not have.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace ptxsim {

template <class To, class From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

enum class Round : uint8_t { kNearest, kZero, kDown, kUp };

// Rounds an exact value to `digits` significant bits with the smallest normal exponent
// `min_exponent` (as frexp counts). Overflow is the caller's.
inline double round_digits(double x, int digits, int min_exponent, Round mode) {
  if (x == 0 || !std::isfinite(x)) return x;
  int exponent = 0;
  std::frexp(x, &exponent);
  if (exponent < min_exponent) exponent = min_exponent;
  const double scaled = std::ldexp(x, digits - exponent);
  double rounded = 0;
  switch (mode) {
    case Round::kNearest:
      rounded = std::nearbyint(scaled);
      break;
    case Round::kZero:
      rounded = std::trunc(scaled);
      break;
    case Round::kDown:
      rounded = std::floor(scaled);
      break;
    case Round::kUp:
      rounded = std::ceil(scaled);
      break;
  }
  return std::copysign(std::ldexp(rounded, exponent - digits), x);
}

// The finite maximum or infinity, as the rounding mode says for a value above `largest`.
inline double overflow(double x, double largest, Round mode) {
  if (!(std::fabs(x) > largest) || std::isinf(x)) return x;
  const bool stay =
      mode == Round::kZero || (mode == Round::kDown && x > 0) || (mode == Round::kUp && x < 0);
  return std::copysign(stay ? largest : std::numeric_limits<double>::infinity(), x);
}

inline float half_to_float(uint16_t h) {
#if defined(__F16C__)
  return _cvtsh_ss(h);
#else
  const uint32_t sign = (h & 0x8000u) << 16, magnitude = h & 0x7fffu;
  if (magnitude >= 0x7c00u) return bit_cast<float>(sign | 0x7f800000u | (magnitude & 0x3ff) << 13);
  if (magnitude < 0x400u) return std::copysign(magnitude * 0x1p-24f, bit_cast<float>(sign));
  return bit_cast<float>(sign | ((magnitude << 13) + 0x38000000u));
#endif
}

// To half from a value held exactly in double: one rounding. NaN becomes PTX's 0x7fff.
inline uint16_t double_to_half(double x, Round mode) {
  if (std::isnan(x)) return 0x7fff;
  x = overflow(round_digits(x, 11, -13, mode), 65504.0, mode);
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  x = std::fabs(x);
  if (std::isinf(x)) return sign | 0x7c00;
  if (x < 0x1p-14) return sign | static_cast<uint16_t>(x * 0x1p24);
  int exponent = 0;
  const double fraction = std::frexp(x, &exponent);  // [0.5, 1)
  return sign |
         static_cast<uint16_t>((exponent + 14) << 10 | (static_cast<int>(fraction * 2048) & 0x3ff));
}

inline uint16_t float_to_half(float x) {
#if defined(__F16C__)
  if (std::isnan(x)) return 0x7fff;
  return _cvtss_sh(x, 0);
#else
  return double_to_half(x, Round::kNearest);
#endif
}

inline float bf16_to_float(uint16_t h) { return bit_cast<float>(static_cast<uint32_t>(h) << 16); }

inline uint16_t float_to_bf16(float x) {
  if (std::isnan(x)) return 0x7fff;
  const uint32_t u = bit_cast<uint32_t>(x);
  return static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

inline uint16_t double_to_bf16(double x, Round mode) {
  if (std::isnan(x)) return 0x7fff;
  x = overflow(round_digits(x, 8, -125, mode), 0x1.fep127, mode);
  return static_cast<uint16_t>(bit_cast<uint32_t>(static_cast<float>(x)) >> 16);
}

inline float double_to_float(double x, Round mode) {
  if (mode == Round::kNearest) return static_cast<float>(x);
  return static_cast<float>(
      overflow(round_digits(x, 24, -125, mode), std::numeric_limits<float>::max(), mode));
}

// The element types of f16 and bf16 arithmetic: values in fp32, one rounding on the way back.
struct Half {
  uint16_t bits;
  static float widen(uint16_t h) { return half_to_float(h); }
  static uint16_t narrow(float x) { return float_to_half(x); }
  static uint16_t narrow(double x, Round mode) { return double_to_half(x, mode); }
};
struct Bfloat {
  uint16_t bits;
  static float widen(uint16_t h) { return bf16_to_float(h); }
  static uint16_t narrow(float x) { return float_to_bf16(x); }
  static uint16_t narrow(double x, Round mode) { return double_to_bf16(x, mode); }
};

}  // namespace ptxsim
