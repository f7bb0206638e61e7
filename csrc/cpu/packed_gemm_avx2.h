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

// The bits of a quad, of one half of a tile, that the plane of width kWidth holds, whose lowest bit
// is bit kLow of a code. 16-bit shifts carry bits across bytes; the mask drops them.
template <int kWidth, int kLow>
inline __attribute__((always_inline)) __m256i plane_bits(const uint8_t* vectors, int quad) {
  constexpr int kQuadsPerVector = 8 / kWidth;
  const int shift = kWidth * (quad % kQuadsPerVector) - kLow;
  __m256i bits = load_vector(vectors + quad / kQuadsPerVector * kQuadBytes);
  if (shift > 0) bits = _mm256_srli_epi16(bits, shift);
  if (shift < 0) bits = _mm256_slli_epi16(bits, -shift);
  if constexpr (kWidth == 8) return bits;
  return _mm256_and_si256(bits, _mm256_set1_epi8(static_cast<char>(((1 << kWidth) - 1) << kLow)));
}

// One quad of one half of a block, as bytes: unpack_block of layout.cpp in registers. The planes
// above a plane have the widths that remain in kBits, so their sum is both its low bit and its
// offset.
template <int kBits>
inline __attribute__((always_inline)) __m256i decode_quad(const uint8_t* block, int quad) {
  __m256i codes = _mm256_setzero_si256();
  if constexpr ((kBits & 8) != 0) codes = plane_bits<8, 0>(block, quad);
  if constexpr ((kBits & 4) != 0) codes = plane_bits<4, 0>(block, quad);
  if constexpr ((kBits & 2) != 0)
    codes =
        _mm256_or_si256(codes, plane_bits<2, (kBits & 4)>(block + (kBits & 4) * kQuadBytes, quad));
  if constexpr ((kBits & 1) != 0)
    codes =
        _mm256_or_si256(codes, plane_bits<1, (kBits & 6)>(block + (kBits & 6) * kQuadBytes, quad));
  return codes;
}

// ORs a plane into the 8 quads.
template <int kWidth, int kLow>
inline void add_plane(const uint8_t* vectors, __m256i* quads) {
#pragma GCC unroll 8
  for (int quad = 0; quad < kBlockQuads; ++quad) {
    const __m256i bits = plane_bits<kWidth, kLow>(vectors, quad);
    quads[quad] = kLow == 0 ? bits : _mm256_or_si256(quads[quad], bits);
  }
}

// All 8 quads, plane after plane: at widths of several planes much faster than quad after quad.
template <int kBits>
inline void decode_block(const uint8_t* block, __m256i* quads) {
  if constexpr ((kBits & 8) != 0) add_plane<8, 0>(block, quads);
  if constexpr ((kBits & 4) != 0) add_plane<4, 0>(block, quads);
  if constexpr ((kBits & 2) != 0)
    add_plane<2, (kBits & 4)>(block + (kBits & 4) * kQuadBytes, quads);
  if constexpr ((kBits & 1) != 0)
    add_plane<1, (kBits & 6)>(block + (kBits & 6) * kQuadBytes, quads);
}

// Reads a byte of every line of a block in the order of memory. Measured: compilers load planes in
// another order, which the processor's prefetching follows badly: one row took up to 1.3 times as
// long.
template <int kBits>
inline __attribute__((always_inline)) void touch_block(const uint8_t* block) {
  for (int i = 0; i < kBits; ++i)
    static_cast<void>(*static_cast<const volatile uint8_t*>(block + i * kQuadBytes));
}

// Scales and minima of 8 rows.
struct Grid {
  __m256 scale, minimum;
};

// The affine of one tile, or of one half.
struct TileAffine {
  const uint8_t* data;  // [group][scale, zero or minimum][16], from the first row on
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

// Halves are counted through all tiles.
inline __attribute__((always_inline)) TileAffine half_affine(const PackedGemmArgs& a,
                                                             int64_t half) {
  TileAffine affine = tile_affine(a, half / kHalves);
  const int number_bytes = a.affine_kind == AffineKind::kScaleMin32 ? 4 : 2;
  affine.data += half % kHalves * kHalfRows * number_bytes;
  return affine;
}

// Eight numbers of 16 bits.
inline __attribute__((always_inline)) __m256 load_scales(const uint8_t* from, ScaleType type) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  if (type == ScaleType::kFloat16) return _mm256_cvtph_ps(half);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

// Of one half. The branches go the same way all through a call.
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

// Tiles of a task where few rows read weights from memory, which takes longer than multiplying:
// half as many multiply-adds are worth a fork, and fewer of them even out the threads' ends.
inline int64_t few_rows_grain(const PackedGemmArgs& a) {
  return ceil_div(kMinTaskMacs / 2, larger(a.m * kTileRows * a.k, 1));
}

// Writes the 8 sums of a half, plus bias, to row `row` of y; fewer at the end of n, or none.
inline void store_outputs(const PackedGemmArgs& a, int64_t row, int64_t half, __m256 sums) {
  const int64_t first = half * kHalfRows;
  float* y = a.y + row * a.n + first;
  if (first + kHalfRows <= a.n) {
    if (a.bias) sums = _mm256_add_ps(sums, _mm256_loadu_ps(a.bias + first));
    _mm256_storeu_ps(y, sums);
    return;
  }
  alignas(32) float lanes[kHalfRows];
  _mm256_store_ps(lanes, sums);
  for (int64_t i = 0; first + i < a.n; ++i) y[i] = lanes[i] + (a.bias ? a.bias[first + i] : 0.f);
}

}  // namespace
}  // namespace mmq::cpu::avx2

MMQ_AVX2_END

#endif
