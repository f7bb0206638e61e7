// SPDX-License-Identifier: Apache-2.0
// One row of activations by one tile on AVX-512 VNNI; a header of packed_gemm_int8_avx512.cpp only.
//
// A row is bound by memory, and how well it is read depends on how far ahead the processor gets in
// the instructions: so few instructions a block matter, not their cycles. A vector of 64 bytes is
// two quads of a tile ("low" and "high", kTwin quads apart) and meets their two quads of
// activations. Which quads are twins is up to the widest plane, whose vectors lie side by side:
//
//   widest plane of 8 bits | q1  q0  |   4 bits | q3:q2  q1:q0 |   2 bits | q7:..:q4  q3:..:q0 |
//
// so (0,1), (2,3).. or (0,2), (1,3), (4,6).. or (0,4), (1,5).. For the planes of odd widths, whose
// twins lie in one vector, that vector is repeated, and each half is rotated by a count of its own.
#pragma once

#if defined(__x86_64__)

#include "cpu/activations_avx2.h"
#include "cpu/packed_gemm_avx512.h"
#include "cpu/target_avx512.h"

MMQ_AVX512_BEGIN

namespace mmq::cpu::avx512 {
namespace {

constexpr int kPairs = kBlockQuads / 2;

template <int kBits>
constexpr int kTwin = kBits >= 8   ? 1
                      : kBits >= 4 ? 2
                                   : 4;

template <int kBits>
constexpr int low_quad(int pair) {
  return pair / kTwin<kBits> * 2 * kTwin<kBits> + pair % kTwin<kBits>;
}

// All dwords of the low half, and of the high half.
inline __m512i halves(int low, int high) {
  return _mm512_inserti64x4(_mm512_set1_epi32(low), _mm256_set1_epi32(high), 1);
}

// Puts the bit plane of width kWidth, whose lowest bit is bit kLow of a code, into the 4 pairs.
template <int kBits, int kWidth, int kLow>
inline void add_pairs(const uint8_t* vectors, __m512i* pairs) {
  constexpr int kQuadsPerVector = 8 / kWidth;
  constexpr int kAndOr = 0xea;  // (a & b) | c
  const __m512i mask = _mm512_set1_epi8(static_cast<char>(((1 << kWidth) - 1) << kLow));
#pragma GCC unroll 4
  for (int pair = 0; pair < kPairs; ++pair) {
    const int low = low_quad<kBits>(pair), high = low + kTwin<kBits>;
    const uint8_t* at = vectors + low / kQuadsPerVector * kQuadBytes;
    const int shift = kWidth * (low % kQuadsPerVector) - kLow;
    if constexpr (kLow == 0) {  // the widest plane
      __m512i bits = _mm512_loadu_si512(at);
      if (shift > 0) bits = _mm512_srli_epi16(bits, shift);
      pairs[pair] = kWidth < 8 ? _mm512_and_si512(bits, mask) : bits;
    } else {
      const int other = kWidth * (high % kQuadsPerVector) - kLow;
      const __m512i bits = _mm512_rorv_epi32(_mm512_broadcast_i64x4(avx2::load_vector(at)),
                                             halves(shift & 31, other & 31));
      pairs[pair] = _mm512_ternarylogic_epi32(bits, mask, pairs[pair], kAndOr);
    }
  }
}

// One block of a tile to its 4 pairs of quads of bytes.
template <int kBits>
inline void decode_pairs(const uint8_t* block, __m512i* pairs) {
  if constexpr ((kBits & 8) != 0) add_pairs<kBits, 8, 0>(block, pairs);
  if constexpr ((kBits & 4) != 0) add_pairs<kBits, 4, 0>(block, pairs);
  if constexpr ((kBits & 2) != 0)
    add_pairs<kBits, 2, (kBits & 4)>(block + (kBits & 4) * kQuadBytes, pairs);
  if constexpr ((kBits & 1) != 0)
    add_pairs<kBits, 1, (kBits & 6)>(block + (kBits & 6) * kQuadBytes, pairs);
}

// The 8 outputs of a tile; segments are whole blocks. The sums are those of packed_gemm_int8_avx2.
// Where segments begin is computed: reading it would take more of the L1 cache than x does.
template <int kBits>
__m256 one_row(const PackedGemmArgs& a, const uint8_t* block, const avx2::TileAffine& affine,
               const avx2::Activations& x) {
  __m512i order[kPairs];  // of the 8 quads of activations
#pragma GCC unroll 4
  for (int pair = 0; pair < kPairs; ++pair)
    order[pair] = halves(low_quad<kBits>(pair), low_quad<kBits>(pair) + kTwin<kBits>);
  const uint8_t* codes = x.codes;
  const int64_t group_cols = smaller(a.group_size, a.k);
  int64_t begin = 0, group = 0, group_end = group_cols;
  __m256 out = _mm256_setzero_ps();
  for (int64_t segment = 0; segment < x.segment_count; ++segment) {
    const int64_t stop = smaller(group_end, begin + avx2::kSegmentCols);
    const uint8_t* end = codes + ceil_div(smaller(stop, a.k) - begin, kBlockCols) * kBlockCols;
    __m512i even = _mm512_setzero_si512(), odd = even;
    for (; codes != end; block += block_bytes(kBits), codes += kBlockCols) {
      __m512i pairs[kPairs];
      decode_pairs<kBits>(block, pairs);
      const __m512i values = _mm512_broadcast_i64x4(avx2::load_vector(codes));
      even = _mm512_dpbusd_epi32(even, pairs[0], _mm512_permutexvar_epi32(order[0], values));
      odd = _mm512_dpbusd_epi32(odd, pairs[1], _mm512_permutexvar_epi32(order[1], values));
      even = _mm512_dpbusd_epi32(even, pairs[2], _mm512_permutexvar_epi32(order[2], values));
      odd = _mm512_dpbusd_epi32(odd, pairs[3], _mm512_permutexvar_epi32(order[3], values));
    }
    const __m512i sums = _mm512_add_epi32(even, odd);
    const __m256i products =
        _mm256_add_epi32(_mm512_castsi512_si256(sums), _mm512_extracti64x4_epi64(sums, 1));
    avx2::end_segment<1, 1>(affine, group, x.scales + segment, x.sums + segment, &products, &out);
    begin = stop;
    if (stop == group_end) {
      ++group;
      group_end += group_cols;
    }
  }
  return out;
}

}  // namespace
}  // namespace mmq::cpu::avx512

MMQ_AVX512_END

#endif
