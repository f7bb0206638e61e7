// SPDX-License-Identifier: Apache-2.0
// Codes to mma operands: one decoder for all widths and both activation types.
//
// The operand holds the integers q - 2^(b-1), exact in f16 (to 2048) and bf16 (to 256); scales
// multiply fp32 sums later. No conversion instruction is used. In f16 the numbers from 1024 to 2047
// have unit spacing, so bits OR-ed into the mantissa of 0x6400 (1024) at bit p read as
// 1024 + 2^p q, and for p + b <= 10
//
//   p = 0:  (1024 + q) - (1024 + mid)                           = q - mid   (one subtraction)
//   p > 0:  (1024 + 2^p q) * 2^-p + -(1024 * 2^-p + mid)        = q - mid   (one fma, exact)
//
// A nonzero p spares the shift that would move the field down. bf16 has 7 mantissa bits: 0x4300 | q
// is 128 + q for q < 128, minus 128 + mid by fma with 1; no room for p. At 8 bits the top bit moves
// to the other summand: (128 + (q & 127)) - (256 - 128 * (q >> 7)), where -256 and -128 differ in
// bit 7 of their encoding alone, the place where the top bit of q lies.
#pragma once

#include <cstdint>

#include "activation.cuh"
#include "ptx.cuh"
#include "tiles.h"

namespace mmq::cuda {

// Two equal 16-bit patterns in a register.
__device__ constexpr uint32_t both(uint32_t half) { return half | half << 16; }

template <int kBits>
__device__ constexpr int mid_code() {
#ifdef MMQ_MUTATE_WRONG_ZERO
  return (1 << (kBits - 1)) + 1;
#else
  return 1 << (kBits - 1);
#endif
}

// The word with the field that starts at `bit` moved to `target`; shifts across the halves do not
// matter, the caller masks.
__device__ inline uint32_t move_field(uint32_t word, int bit, int target) {
  return bit >= target ? word >> (bit - target) : word << (target - bit);
}

// Bit p where the decoded field of (reg, step) lies: the position of the widest plane's field after
// a shift by 0 or 8, if the type's mantissa has room for it there, else 0.
template <int kBits, class Activation>
__device__ constexpr int field_target(int reg, int step) {
  const int at = field_bit(plane_of(kBits, 0).width, reg, step) % 8;
  return !Activation::kIsBfloat && at + kBits <= 10 ? at : 0;
}

// The f16 encoding of minus an integer in [64, 1280].
__device__ constexpr uint32_t negative_f16(int value) {
  int exponent = 15;
  for (int rest = value; rest > 1; rest /= 2) ++exponent;
  const int mantissa = (value << 10 >> (exponent - 15)) - 1024;
  return 0x8000u | static_cast<uint32_t>(exponent << 10 | mantissa);
}
static_assert(negative_f16(1032) == 0xe408u && negative_f16(72) == 0xd480u);

// bf16 of an integer in [128, 255]: spacing 1, exponent 2^7.
__device__ constexpr uint32_t negative_bf16(int value) {
  return 0xc300u | static_cast<uint32_t>(value - 128);
}

// The fields of a register from all planes, side by side from bit kTarget on, over the bits of
// kOne.
template <int kBits, int kTarget, uint32_t kOne, int kReg, int kStep, int kIndex = 0>
__device__ inline uint32_t merge_planes(const uint32_t (&words)[kBits], uint32_t bits = 0) {
  if constexpr (kIndex == plane_count(kBits)) {
    return bits;
  } else {
    constexpr Plane kPlane = plane_of(kBits, kIndex);
    constexpr int kAt = kTarget + kPlane.low;
    const uint32_t word = move_field(words[kPlane.low + field_word(kPlane.width, kReg, kStep)],
                                     field_bit(kPlane.width, kReg, kStep), kAt);
    constexpr uint32_t kMask = both(((1u << kPlane.width) - 1) << kAt);
    uint32_t merged;
    if constexpr (kIndex == 0) {
      merged = and_or<kMask, kOne>(word);
    } else {
      merged = and_or<kMask>(word, bits);
    }
    return merge_planes<kBits, kTarget, kOne, kReg, kStep, kIndex + 1>(words, merged);
  }
}

// Register `reg` of the operand for k step `step` from the kBits words of a lane and tile.
// Registers and steps are template parameters so that masks and shifts are immediate operands.
template <int kBits, class Activation, int kReg, int kStep>
__device__ inline uint32_t decode(const uint32_t (&words)[kBits]) {
  constexpr int kMid = mid_code<kBits>();
  constexpr int kTarget = field_target<kBits, Activation>(kReg, kStep);
  if constexpr (Activation::kIsBfloat && kBits == 8) {
    const uint32_t q = move_field(words[field_word(8, kReg, kStep)], field_bit(8, kReg, kStep), 0);
    const uint32_t low = and_or<both(0x7f), both(0x4300)>(q);
    const uint32_t high = and_xor<both(0x80), both(0xc380 + (kMid - 128))>(q);
    return fma_bf16x2<both(0x3f80)>(low, high);
  } else {
    constexpr uint32_t kOne = both(Activation::kIsBfloat ? 0x4300 : 0x6400);
    const uint32_t bits = merge_planes<kBits, kTarget, kOne, kReg, kStep>(words);
    if constexpr (Activation::kIsBfloat) {
      return fma_bf16x2<both(0x3f80), both(negative_bf16(128 + kMid))>(bits);
    } else if constexpr (kTarget == 0) {
      return sub_f16x2<both(0x7fff & negative_f16(1024 + kMid))>(bits);
    } else {
      constexpr uint32_t kFactor = both(static_cast<uint32_t>(15 - kTarget) << 10);  // 2^-p
      return fma_f16x2<kFactor, both(negative_f16((1024 >> kTarget) + kMid))>(bits);
    }
  }
}

}  // namespace mmq::cuda
