// SPDX-License-Identifier: Apache-2.0
// Grid arithmetic that every implementation, on CPU and GPU, shares: from a range to scale and
// zero, and the rounding of scales to their storage type. Plain IEEE fp32, round to nearest even,
// compiled without contraction everywhere (-ffp-contract=off, --fmad=false), so that all give the
// same bits. Only what nvcc accepts on the device: no std::min, no std::numeric_limits.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "host_device.h"
#include "quant_types.h"

namespace mmq {
namespace {  // Each translation unit keeps its own copy: no copy built for AVX can leak.

MMQ_HOST_DEVICE inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

MMQ_HOST_DEVICE inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// As std::min and std::max: the first operand if the two are equal or either is NaN.
MMQ_HOST_DEVICE inline float smaller(float a, float b) { return b < a ? b : a; }
MMQ_HOST_DEVICE inline float larger(float a, float b) { return a < b ? b : a; }

constexpr uint32_t kNanBits = 0x7fc00000u;  // quiet, as every conversion makes it
constexpr uint32_t kInfinityBits = 0x7f800000u;
constexpr float kSmallestNormal = 1.17549435e-38f;  // 2^-126
constexpr float kSmallestFp16 = 6.103515625e-5f;    // 2^-14, the smallest normal one

// Rounds the mantissa to `kept` of its 23 bits, ties to even.
MMQ_HOST_DEVICE inline float round_mantissa(float value, int kept) {
  const uint32_t bits = bits_of(value);
  const int dropped = 23 - kept;
  const uint32_t half = (1u << (dropped - 1)) - 1u + ((bits >> dropped) & 1u);
  return float_of((bits + half) & ~((1u << dropped) - 1u));
}

// fp16 has 10 mantissa bits, largest 65504, smallest normal 2^-14; below it, steps of 2^-24.
MMQ_HOST_DEVICE inline float round_to_fp16(float value) {
  if (!std::isfinite(value)) return value;
  if (std::fabs(value) < kSmallestFp16) return std::nearbyint(value * 16777216.f) / 16777216.f;
  const float rounded = round_mantissa(value, 10);
  if (std::fabs(rounded) > 65504.f) return std::copysign(float_of(kInfinityBits), value);
  return rounded;
}

MMQ_HOST_DEVICE inline float round_to_bf16(float value) {
  return std::isfinite(value) ? round_mantissa(value, 7) : value;
}

MMQ_HOST_DEVICE inline float round_to(float value, ScaleType type) {
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

// A number of 16 bits, fp16 or bf16, from its bits.
inline float widen(uint16_t bits, ScaleType type) {
  const uint32_t value = bits;
  if (type == ScaleType::kBfloat16) return float_of(value << 16);
  const uint32_t sign = (value & 0x8000u) << 16, magnitude = value & 0x7fffu;
  // Exponents from 5 bits to 8 (bias 15 to 127); below the smallest normal number, steps of 2^-24.
  if (magnitude >= 0x7c00u) return float_of(sign | kInfinityBits | (magnitude << 13));
  if (magnitude >= 0x0400u) return float_of(sign | ((magnitude << 13) + (112u << 23)));
  return std::copysign(static_cast<float>(magnitude) / 16777216.f, float_of(sign));
}

MMQ_HOST_DEVICE inline float smallest_normal(ScaleType type) {
  return type == ScaleType::kFloat16 ? kSmallestFp16 : kSmallestNormal;
}

struct GroupGrid {
  float scale;
  float zero;  // integer zero, 2^(b-1) if symmetric, or the minimum
};

// The codes a grid may use, and how a code becomes a value.
struct CodeRule {
  float lowest;     // 0, or 1 for the restricted grid, which leaves code 0 unused
  float highest;    // 2^b - 1
  bool float_zero;  // the zero is a minimum, not a code
};

MMQ_HOST_DEVICE inline CodeRule code_rule(int bits, GridKind kind) {
  return {kind == GridKind::kRestricted ? 1.f : 0.f, static_cast<float>((1 << bits) - 1),
          kind == GridKind::kFloat};
}

// The smallest and the largest of `count` >= 1 values; both NaN if any value is.
struct Range {
  float low;
  float high;
};

MMQ_HOST_DEVICE inline Range range_of(const float* values, int64_t count) {
  Range range{values[0], values[0]};
  bool ordered = true;
  for (int64_t i = 0; i < count; ++i) {
    range.low = smaller(range.low, values[i]);
    range.high = larger(range.high, values[i]);
    ordered &= values[i] == values[i];
  }
  if (ordered) return range;
  return {float_of(kNanBits), float_of(kNanBits)};
}

// Keeps value within [low, high]. NaN and a zero of either sign become low when low is +0: the
// operand order is that of the maxps and minps instructions.
MMQ_HOST_DEVICE inline float clamped(float value, float low, float high) {
  const float raised = value > low ? value : low;
  return raised < high ? raised : high;
}

// The grid of the range [lo, hi]. A range of width 0 gets scale 1: an all-zero group is then exact,
// and so is a constant group with a float zero, up to the rounding of the minimum. A scale beyond
// the largest number of its type becomes infinite and a NaN range gives a NaN scale; the caller
// refuses both.
MMQ_HOST_DEVICE inline GroupGrid make_grid(float lo, float hi, int bits, GridKind kind,
                                           ScaleType type) {
  const float top = static_cast<float>((1 << bits) - 1);
  const float middle = static_cast<float>(1 << (bits - 1));
  float scale;
  switch (kind) {
    case GridKind::kFloat:
      scale = (hi - lo) / top;
      break;
    case GridKind::kInteger:
      lo = smaller(lo, 0.f);
      hi = larger(hi, 0.f);
      scale = (hi - lo) / top;
      break;
    case GridKind::kSymmetric:
      hi = larger(std::fabs(lo), std::fabs(hi));
      lo = -hi;
      scale = 2.f * hi / top;
      break;
    default:
      hi = larger(std::fabs(lo), std::fabs(hi));
      lo = -hi;
      scale = hi / (middle - 1.f);
      break;
  }
  // larger() keeps its first operand when that is NaN.
  scale = hi == lo ? 1.f : larger(round_to(scale, type), smallest_normal(type));
  if (kind == GridKind::kFloat) return {scale, round_to(lo, type) + 0.f};  // never -0
  if (kind != GridKind::kInteger) return {scale, middle};
  return {scale, clamped(std::nearbyint(-lo / scale), 0.f, top)};
}

// Number of range shrink factors p = 1, 1 - 1/steps, ... that are not below 1 - shrink.
MMQ_HOST_DEVICE inline int shrink_count(int steps, float shrink) {
  return steps == 0 ? 1 : 1 + static_cast<int>(static_cast<double>(shrink) * steps + 1e-4);
}

MMQ_HOST_DEVICE inline float shrink_factor(int index, int steps) {
  return steps == 0 ? 1.f : 1.f - static_cast<float>(index) / static_cast<float>(steps);
}

// The code of w, as a float. NaN gets the lowest code.
MMQ_HOST_DEVICE inline float code_of(float w, GroupGrid grid, CodeRule rule) {
  const float code = rule.float_zero ? std::nearbyint((w - grid.zero) / grid.scale)
                                     : std::nearbyint(w / grid.scale) + grid.zero;
  return clamped(code, rule.lowest, rule.highest);
}

MMQ_HOST_DEVICE inline float value_of(float code, GroupGrid grid, CodeRule rule) {
  return rule.float_zero ? code * grid.scale + grid.zero : (code - grid.zero) * grid.scale;
}

}  // namespace
}  // namespace mmq
