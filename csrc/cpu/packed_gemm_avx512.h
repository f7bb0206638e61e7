// SPDX-License-Identifier: Apache-2.0
// What both modes of packed_gemm share on AVX-512; a header of the AVX-512 files only. A vector is
// the 16 rows of two neighbouring tiles; a last tile without a neighbour is read twice.
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

constexpr int kVectorTiles = 2;
constexpr int kVectorRows = kVectorTiles * kTileRows;

// Two vectors of 32 bytes, `stride` bytes apart, as one.
inline __m512i load_pair(const void* from, int64_t stride) {
  const uint8_t* first = static_cast<const uint8_t*>(from);
  return _mm512_inserti64x4(_mm512_castsi256_si512(avx2::load_vector(first)),
                            avx2::load_vector(first + stride), 1);
}

// Scales and minima of 16 rows.
struct Grid {
  __m512 scale, minimum;
};

inline __m512 join(__m256 low, __m256 high) {
  return _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
}

inline __attribute__((always_inline)) Grid load_grid(const avx2::TileAffine* pair, int64_t group) {
  const avx2::Grid low = avx2::load_grid(pair[0], group), high = avx2::load_grid(pair[1], group);
  return {join(low.scale, high.scale), join(low.minimum, high.minimum)};
}

inline __m256 upper_half(__m512 v) { return _mm512_extractf32x8_ps(v, 1); }

// As in packed_gemm_avx2.h, for two tiles whose blocks are `stride` bytes apart.
template <int kWidth, int kLow>
inline void add_plane(const uint8_t* vectors, int64_t stride, __m512i* quads) {
  constexpr int kQuadsPerVector = 8 / kWidth;
  constexpr int kAndOr = 0xea;  // (a & b) | c
  const __m512i mask = _mm512_set1_epi8(static_cast<char>(((1 << kWidth) - 1) << kLow));
  __m512i vector = {};
#pragma GCC unroll 8
  for (int quad = 0; quad < kBlockQuads; ++quad) {
    if (quad % kQuadsPerVector == 0)
      vector = load_pair(vectors + quad / kQuadsPerVector * kQuadBytes, stride);
    const int shift = kWidth * (quad % kQuadsPerVector) - kLow;
    __m512i bits = vector;
    if (shift > 0) bits = _mm512_srli_epi16(vector, shift);
    if (shift < 0) bits = _mm512_slli_epi16(vector, -shift);
    if constexpr (kLow > 0)
      quads[quad] = _mm512_ternarylogic_epi32(bits, mask, quads[quad], kAndOr);
    else
      quads[quad] = kWidth < 8 ? _mm512_and_si512(bits, mask) : bits;
  }
}

// One block of two tiles to 8 quads of bytes.
template <int kBits>
inline void decode_block(const uint8_t* block, int64_t stride, __m512i* quads) {
  if constexpr ((kBits & 8) != 0) add_plane<8, 0>(block, stride, quads);
  if constexpr ((kBits & 4) != 0) add_plane<4, 0>(block, stride, quads);
  if constexpr ((kBits & 2) != 0)
    add_plane<2, (kBits & 4)>(block + (kBits & 4) * kQuadBytes, stride, quads);
  if constexpr ((kBits & 1) != 0)
    add_plane<1, (kBits & 6)>(block + (kBits & 6) * kQuadBytes, stride, quads);
}

// The sums of tiles `tile` and, if there is one, `tile + 1`.
inline void store_outputs(const PackedGemmArgs& a, int64_t row, int64_t tile, __m512 sums) {
  avx2::store_outputs(a, row, tile, _mm512_castps512_ps256(sums));
  if ((tile + 1) * kTileRows < a.n) avx2::store_outputs(a, row, tile + 1, upper_half(sums));
}

}  // namespace
}  // namespace mmq::cpu::avx512

MMQ_AVX512_END

#endif
