// SPDX-License-Identifier: Apache-2.0
// What the exact mode of packed_gemm needs around a panel kernel: weights dequantized to fp32, rows
// of activations side by side, sums added to y. A header of the AVX2 and AVX-512 files only.
#pragma once

#if defined(__x86_64__)

#include "cpu/kernels.h"
#include "cpu/layout.h"
#include "cpu/packed_gemm_avx2.h"
#include "cpu/parallel.h"
#include "cpu/target_avx2.h"

MMQ_AVX2_BEGIN

namespace mmq::cpu::avx2 {
namespace {

// Measured: from so many rows on a panel wins (Zen 3, 2 threads, 4096x4096, 4 bits).
constexpr int64_t kPanelFromRows = 12;

// Whether decoding in registers serves the product, instead of a panel.
inline bool takes_few_rows(const PackedGemmArgs& a) {
  const bool whole_blocks = a.group_size % kBlockCols == 0 || a.group_size >= a.k;
  return a.k == 0 || (whole_blocks && a.m < kPanelFromRows);
}

// Stores the 8 weights whose codes are the low bytes of the dwords.
inline void store_weights(__m256i dwords, const Grid& grid, float* out) {
  const __m256i codes = _mm256_and_si256(dwords, _mm256_set1_epi32(0xff));
  _mm256_store_ps(out, _mm256_fmadd_ps(_mm256_cvtepi32_ps(codes), grid.scale, grid.minimum));
}

// Columns [begin, end) of a tile to fp32: 8 rows at panel + (k - begin) * kStride. begin is a
// multiple of a block.
template <int kBits, int kStride>
void dequantize(const PackedGemmArgs& a, int64_t tile, int64_t begin, int64_t end, float* panel) {
  const TileAffine affine = tile_affine(a, tile);
  const uint8_t* block =
      a.tiles + tile * tile_bytes(a.k, kBits) + begin / kBlockCols * block_bytes(kBits);
  alignas(32) uint8_t codes[kBlockCodes];
  int64_t group = begin / a.group_size, group_end = group * a.group_size;
  Grid grid = {};
  for (int64_t k = begin; k < end; block += block_bytes(kBits)) {
    __m256i quads[kBlockQuads];
    decode_block<kBits>(block, quads);
#pragma GCC unroll 8
    for (int quad = 0; quad < kBlockQuads; ++quad)
      _mm256_store_si256(reinterpret_cast<__m256i*>(codes + quad * kQuadBytes), quads[quad]);
    const int64_t block_begin = k, block_end = smaller(k + kBlockCols, end);
    while (k < block_end) {
      if (k >= group_end) {
        group = k / a.group_size;
        group_end = (group + 1) * a.group_size;
        grid = load_grid(affine, group);
      }
      const int64_t stop = smaller(group_end, block_end);
      while (k < stop) {
        const int64_t at = k - block_begin;
        const __m256i quad = load_vector(codes + at / kQuadCols * kQuadBytes);
        float* out = panel + (k - begin) * kStride;
        if (at % kQuadCols == 0 && k + kQuadCols <= stop) {
          store_weights(quad, grid, out);
          store_weights(_mm256_srli_epi32(quad, 8), grid, out + kStride);
          store_weights(_mm256_srli_epi32(quad, 16), grid, out + 2 * kStride);
          store_weights(_mm256_srli_epi32(quad, 24), grid, out + 3 * kStride);
          k += kQuadCols;
        } else {
          const __m128i shift = _mm_cvtsi32_si128(static_cast<int>(8 * (at % kQuadCols)));
          store_weights(_mm256_srl_epi32(quad, shift), grid, out);
          ++k;
        }
      }
    }
  }
}

// Copies x to [row block][k][row].
void pack_rows(const PackedGemmArgs& a, const RowBlocks& rows, float* packed) {
  parallel_for(rows.count, 1 + kMinTaskMacs * rows.count / (a.m * a.k + 1),
               [&](int64_t begin, int64_t end) {
                 for (int64_t block = begin; block < end; ++block) {
                   const int64_t first = rows.begin(block), count = rows.rows(block);
                   const float* from = a.x + first * a.k;
                   float* to = packed + first * a.k;
                   for (int64_t j = 0; j < a.k; ++j)
                     for (int64_t row = 0; row < count; ++row) *to++ = from[row * a.k + j];
                 }
               });
}

// Adds the sums of one kernel call to y, or begins y with them and the bias.
inline void accumulate(const PackedGemmArgs& a, int64_t row, int64_t tile, __m256 sums,
                       bool begin) {
  if (begin) return store_outputs(a, row, tile, sums);
  const int64_t first = tile * kTileRows;
  float* y = a.y + row * a.n + first;
  if (first + kTileRows <= a.n) {
    _mm256_storeu_ps(y, _mm256_add_ps(_mm256_loadu_ps(y), sums));
    return;
  }
  alignas(32) float lanes[kTileRows];
  _mm256_store_ps(lanes, sums);
  for (int64_t i = 0; first + i < a.n; ++i) y[i] += lanes[i];
}

}  // namespace
}  // namespace mmq::cpu::avx2

MMQ_AVX2_END

#endif
