// SPDX-License-Identifier: Apache-2.0
// What both modes of packed_gemm share on AVX-512; a header of the AVX-512 files only. A vector is
// the 16 rows of a tile.
#pragma once

#if defined(__x86_64__)

#include "cpu/packed_gemm_avx2.h"
#include "cpu/target_avx512.h"

MMQ_AVX512_BEGIN

namespace mmq::cpu::avx512 {
namespace {

using avx2::larger;
using avx2::RowBlocks;
using avx2::smaller;
using avx2::TileAffine;

// Scales and minima of a tile.
struct Grid {
  __m512 scale, minimum;
};

// Sixteen numbers of 16 bits.
inline __attribute__((always_inline)) __m512 load_scales(const uint8_t* from, ScaleType type) {
  const __m256i half = avx2::load_vector(from);
  if (type == ScaleType::kFloat16) return _mm512_cvtph_ps(half);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

inline __attribute__((always_inline)) Grid load_tile_grid(const TileAffine& a, int64_t group) {
  const uint8_t* from = a.data + group * affine_bytes(a.kind);
  if (a.kind == AffineKind::kScaleMin32) {
    const float* both = reinterpret_cast<const float*>(from);
    return {_mm512_loadu_ps(both), _mm512_loadu_ps(both + kTileRows)};
  }
  const __m512 scale = load_scales(from, a.type);
  if (a.kind == AffineKind::kScale16)
    return {scale, _mm512_mul_ps(scale, _mm512_set1_ps(a.minus_zero))};
  const __m512 zero = load_scales(from + kTileRows * 2, a.type);
  return {scale, _mm512_sub_ps(_mm512_setzero_ps(), _mm512_mul_ps(scale, zero))};
}

// As in packed_gemm_avx2.h, for whole tiles.
template <int kWidth, int kLow>
inline void add_plane(const uint8_t* vectors, __m512i* quads) {
  constexpr int kQuadsPerVector = 8 / kWidth;
  constexpr int kAndOr = 0xea;  // (a & b) | c
  const __m512i mask = _mm512_set1_epi8(static_cast<char>(((1 << kWidth) - 1) << kLow));
#pragma GCC unroll 8
  for (int quad = 0; quad < kBlockQuads; ++quad) {
    const int shift = kWidth * (quad % kQuadsPerVector) - kLow;
    __m512i bits = _mm512_loadu_si512(vectors + quad / kQuadsPerVector * kQuadBytes);
    if (shift > 0) bits = _mm512_srli_epi16(bits, shift);
    if (shift < 0) bits = _mm512_slli_epi16(bits, -shift);
    if constexpr (kLow > 0)
      quads[quad] = _mm512_ternarylogic_epi32(bits, mask, quads[quad], kAndOr);
    else
      quads[quad] = kWidth < 8 ? _mm512_and_si512(bits, mask) : bits;
  }
}

// One block to 8 quads of bytes.
template <int kBits>
inline void decode_block(const uint8_t* block, __m512i* quads) {
  if constexpr ((kBits & 8) != 0) add_plane<8, 0>(block, quads);
  if constexpr ((kBits & 4) != 0) add_plane<4, 0>(block, quads);
  if constexpr ((kBits & 2) != 0)
    add_plane<2, (kBits & 4)>(block + (kBits & 4) * kQuadBytes, quads);
  if constexpr ((kBits & 1) != 0)
    add_plane<1, (kBits & 6)>(block + (kBits & 6) * kQuadBytes, quads);
}

// The sums of a tile.
inline void store_outputs(const PackedGemmArgs& a, int64_t row, int64_t tile, __m512 sums) {
  const int64_t half = tile * kHalves;
  avx2::store_outputs(a, row, half, _mm512_castps512_ps256(sums));
  avx2::store_outputs(a, row, half + 1, _mm512_extractf32x8_ps(sums, 1));
}

}  // namespace
}  // namespace mmq::cpu::avx512

MMQ_AVX512_END

#endif
