// SPDX-License-Identifier: Apache-2.0
// Enumerations that CPU and CUDA kernels share. Their numbers are part of the binding's interface.
#pragma once

namespace mmq {

// How a range [lo, hi] becomes a grid.
enum class GridKind : int {
  kInteger = 0,     // w = (q - z) * s, z an integer code; 0 is always representable
  kFloat = 1,       // w = q * s + m
  kSymmetric = 2,   // w = (q - 2^(b-1)) * s, s = 2 * max|w| / (2^b - 1)
  kRestricted = 3,  // w = (q - 2^(b-1)) * s, s = max|w| / (2^(b-1) - 1), code 0 unused
};

// The type that scales (and minima) are stored in; they are rounded to it before codes are chosen.
enum class ScaleType : int { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2 };

// What packed_gemm reads for every group of an output row; its order is that of the device. Every
// zero up to 255 is exact in both 16-bit types.
enum class AffineKind : int {
  kScale16 = 0,      // a scale of 16 bits; the zero is 2^(b-1)
  kScaleZero16 = 1,  // scale and integer zero, both numbers of the same 16-bit type
  kScaleMin32 = 2,   // float32 scale and minimum, w = q * s + m
};

}  // namespace mmq
