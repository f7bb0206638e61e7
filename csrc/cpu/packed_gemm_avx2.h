// SPDX-License-Identifier: Apache-2.0
// What both modes of packed_gemm share on AVX2; a header of the AVX2 files only.
#pragma once

#if defined(__x86_64__)

#include "cpu/kernels.h"
#include "cpu/layout.h"
#include "cpu/target_avx2.h"

MMQ_AVX2_BEGIN

namespace mmq::cpu::avx2 {
namespace {

inline __m256i load_vector(const void* from) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(from));
}

// ORs the bit plane of width kWidth, whose lowest bit is bit kLow of a code, into the 8 quads.
// 16-bit shifts carry bits across bytes; the mask drops them.
template <int kWidth, int kLow>
inline void add_plane(const uint8_t* vectors, __m256i* quads) {
  constexpr int kQuadsPerVector = 8 / kWidth;
  const __m256i mask = _mm256_set1_epi8(static_cast<char>(((1 << kWidth) - 1) << kLow));
#pragma GCC unroll 8
  for (int quad = 0; quad < kBlockQuads; ++quad) {
    const int shift = kWidth * (quad % kQuadsPerVector) - kLow;
    __m256i bits = load_vector(vectors + quad / kQuadsPerVector * kQuadBytes);
    if (shift > 0) bits = _mm256_srli_epi16(bits, shift);
    if (shift < 0) bits = _mm256_slli_epi16(bits, -shift);
    if (kWidth < 8) bits = _mm256_and_si256(bits, mask);
    quads[quad] = kLow == 0 ? bits : _mm256_or_si256(quads[quad], bits);
  }
}

// One block to its 8 quads of bytes: unpack_block of layout.cpp in registers. The planes above a
// plane have the widths that remain in kBits, so their sum is both its low bit and its offset.
template <int kBits>
inline void decode_block(const uint8_t* block, __m256i* quads) {
  if constexpr ((kBits & 8) != 0) add_plane<8, 0>(block, quads);
  if constexpr ((kBits & 4) != 0) add_plane<4, 0>(block, quads);
  if constexpr ((kBits & 2) != 0)
    add_plane<2, (kBits & 4)>(block + (kBits & 4) * kQuadBytes, quads);
  if constexpr ((kBits & 1) != 0)
    add_plane<1, (kBits & 6)>(block + (kBits & 6) * kQuadBytes, quads);
}

// Scales and minima of 8 rows.
struct Grid {
  __m256 scale, minimum;
};

// The affine of one tile.
struct TileAffine {
  const uint8_t* data;  // [group][scale, zero or minimum][8]
  AffineKind kind;
  ScaleType type;
  float minus_zero;  // of kScale16
};

inline __attribute__((always_inline)) TileAffine tile_affine(const PackedGemmArgs& a,
                                                             int64_t tile) {
  const int64_t bytes = group_count(a.k, a.group_size) * affine_bytes(a.affine_kind);
  return {static_cast<const uint8_t*>(a.affine) + tile * bytes, a.affine_kind, a.scale_type,
          -static_cast<float>(1 << (a.bits - 1))};
}

// Eight numbers of 16 bits.
inline __attribute__((always_inline)) __m256 load_scales(const uint8_t* from, ScaleType type) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  if (type == ScaleType::kFloat16) return _mm256_cvtph_ps(half);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

// The branches go the same way all through a call.
inline __attribute__((always_inline)) Grid load_grid(const TileAffine& a, int64_t group) {
  const uint8_t* from = a.data + group * affine_bytes(a.kind);
  if (a.kind == AffineKind::kScaleMin32) {
    const float* both = reinterpret_cast<const float*>(from);
    return {_mm256_loadu_ps(both), _mm256_loadu_ps(both + kTileRows)};
  }
  const __m256 scale = load_scales(from, a.type);
  if (a.kind == AffineKind::kScale16)
    return {scale, _mm256_mul_ps(scale, _mm256_set1_ps(a.minus_zero))};
  const __m256 zero = load_scales(from + kTileRows * 2, a.type);
  return {scale, _mm256_sub_ps(_mm256_setzero_ps(), _mm256_mul_ps(scale, zero))};
}

// The m rows of activations cut into blocks of at most max_rows, as equal as possible. Operands
// prepared per row are stored block after block, [block][position][row of the block], so that a
// kernel reads them as one stream; block i starts at begin(i) * (positions of a row).
struct RowBlocks {
  int64_t m, count;
  RowBlocks(int64_t m_rows, int64_t max_rows) : m(m_rows), count(ceil_div(m_rows, max_rows)) {}
  int64_t begin(int64_t block) const { return block * m / count; }
  int64_t rows(int64_t block) const { return begin(block + 1) - begin(block); }
};

// Writes the 8 sums of a tile, plus bias, to row `row` of y; fewer at the end of n.
inline void store_outputs(const PackedGemmArgs& a, int64_t row, int64_t tile, __m256 sums) {
  const int64_t first = tile * kTileRows;
  float* y = a.y + row * a.n + first;
  if (first + kTileRows <= a.n) {
    if (a.bias) sums = _mm256_add_ps(sums, _mm256_loadu_ps(a.bias + first));
    _mm256_storeu_ps(y, sums);
    return;
  }
  alignas(32) float lanes[kTileRows];
  _mm256_store_ps(lanes, sums);
  for (int64_t i = 0; first + i < a.n; ++i) y[i] = lanes[i] + (a.bias ? a.bias[first + i] : 0.f);
}

}  // namespace
}  // namespace mmq::cpu::avx2

MMQ_AVX2_END

#endif
