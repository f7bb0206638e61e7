// SPDX-License-Identifier: Apache-2.0
// Grid arithmetic that every implementation shares: from a range to scale and zero, and the
// rounding of scales to their storage type. Plain IEEE fp32, round to nearest even, no contraction.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "cpu/kernels.h"

namespace mmq::cpu {
namespace {  // Each translation unit keeps its own copy: no copy built for AVX can leak.

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Rounds the mantissa to `kept` of its 23 bits, ties to even.
inline float round_mantissa(float value, int kept) {
  const uint32_t bits = bits_of(value);
  const int dropped = 23 - kept;
  const uint32_t half = (1u << (dropped - 1)) - 1u + ((bits >> dropped) & 1u);
  return float_of((bits + half) & ~((1u << dropped) - 1u));
}

// fp16 has 10 mantissa bits, largest 65504, smallest normal 2^-14; below it, steps of 2^-24.
inline float round_to_fp16(float value) {
  if (!std::isfinite(value)) return value;
  if (std::fabs(value) < 6.103515625e-5f) return std::nearbyint(value * 16777216.f) / 16777216.f;
  const float rounded = round_mantissa(value, 10);
  if (std::fabs(rounded) > 65504.f)
    return std::copysign(std::numeric_limits<float>::infinity(), value);
  return rounded;
}

inline float round_to_bf16(float value) {
  return std::isfinite(value) ? round_mantissa(value, 7) : value;
}

inline float round_to(float value, ScaleType type) {
  switch (type) {
    case ScaleType::kFloat16:
      return round_to_fp16(value);
    case ScaleType::kBfloat16:
      return round_to_bf16(value);
    case ScaleType::kFloat32:
      return value;
  }
  return value;
}

inline float smallest_normal(ScaleType type) {
  return type == ScaleType::kFloat16 ? 6.103515625e-5f : std::numeric_limits<float>::min();
}

struct GroupGrid {
  float scale;
  float zero;  // integer zero, 2^(b-1) if symmetric, or the minimum
};

// The grid of the range [lo, hi]. Degenerate ranges get scale 1 (a constant group is then exact
// with a float zero, and an all-zero group with any other).
inline GroupGrid make_grid(float lo, float hi, int bits, GridKind kind, ScaleType type) {
  const float top = static_cast<float>((1 << bits) - 1);
  const float middle = static_cast<float>(1 << (bits - 1));
  float scale;
  switch (kind) {
    case GridKind::kFloat:
      scale = (hi - lo) / top;
      break;
    case GridKind::kInteger:
      lo = std::min(lo, 0.f);
      hi = std::max(hi, 0.f);
      scale = (hi - lo) / top;
      break;
    case GridKind::kSymmetric:
      hi = std::max(std::fabs(lo), std::fabs(hi));
      lo = -hi;
      scale = 2.f * hi / top;
      break;
    default:
      hi = std::max(std::fabs(lo), std::fabs(hi));
      lo = -hi;
      scale = hi / (middle - 1.f);
      break;
  }
  if (hi == lo) {
    scale = 1.f;
  } else {
    scale = std::max(round_to(scale, type), smallest_normal(type));
  }
  if (kind == GridKind::kFloat) return {scale, round_to(lo, type)};
  if (kind != GridKind::kInteger) return {scale, middle};
  return {scale, std::min(std::max(std::nearbyint(-lo / scale), 0.f), top)};
}

// The code of w, as a float.
inline float code_of(float w, GroupGrid grid, float top, bool float_zero) {
  const float code = float_zero ? std::nearbyint((w - grid.zero) / grid.scale)
                                : std::nearbyint(w / grid.scale) + grid.zero;
  return std::min(std::max(code, 0.f), top);
}

inline float value_of(float code, GroupGrid grid, bool float_zero) {
  return float_zero ? code * grid.scale + grid.zero : (code - grid.zero) * grid.scale;
}

}  // namespace
}  // namespace mmq::cpu
