// SPDX-License-Identifier: Apache-2.0
// packed_gemm with fp32 activations and many rows on AVX-512: a panel of weights is dequantized
// into the L2 cache, [k][16 rows] per pair of tiles, and multiplied 12 rows of x by 2 pairs = 24
// accumulators. Few rows, bound by memory, run on AVX2.
#if defined(__x86_64__)

#include "cpu/dense_panel_avx2.h"
#include "cpu/kernels.h"
#include "cpu/layout.h"
#include "cpu/packed_gemm_avx512.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/target_avx512.h"

MMQ_AVX512_BEGIN

namespace mmq::cpu::avx512 {
namespace {

constexpr int kRowsAtOnce = 12;
constexpr int kPanelVectors = 2;
// A pair of vectors over kChainCols columns takes 32 KB, a chunk of them 128 KB and a chunk of rows
// 120 KB, together half of a 512 KB L2 cache.
constexpr int64_t kChunkPairs = 8;
constexpr int64_t kChunkRowBlocks = 10;
constexpr int64_t kStride = kChainCols * kVectorRows;  // floats of a pair of tiles

struct PanelOperands {
  const float* x;
  const float* panel;
  int64_t depth;
};

// out[rows][vectors] = x[k][rows] . panel[vector][k][16].
template <int kRows, int kVectors>
void panel_kernel(const PanelOperands& a, __m512 (*out)[kPanelVectors]) {
  __m512 sums[kRows][kVectors] = {};
  const float* x = a.x;
  const float* w = a.panel;
  for (int64_t k = 0; k < a.depth; ++k, x += kRows, w += kVectorRows) {
    __m512 weights[kVectors];
#pragma GCC unroll 2
    for (int vector = 0; vector < kVectors; ++vector)
      weights[vector] = _mm512_load_ps(w + vector * kStride);
#pragma GCC unroll 12
    for (int row = 0; row < kRows; ++row) {
      const __m512 value = _mm512_set1_ps(x[row]);
#pragma GCC unroll 2
      for (int vector = 0; vector < kVectors; ++vector)
        sums[row][vector] = _mm512_fmadd_ps(value, weights[vector], sums[row][vector]);
    }
  }
#pragma GCC unroll 12
  for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 2
    for (int vector = 0; vector < kVectors; ++vector) out[row][vector] = sums[row][vector];
}

using PanelKernel = void (*)(const PanelOperands&, __m512 (*)[kPanelVectors]);
template <int kVectors>
constexpr PanelKernel kKernels[kRowsAtOnce] = {
    panel_kernel<1, kVectors>,  panel_kernel<2, kVectors>,  panel_kernel<3, kVectors>,
    panel_kernel<4, kVectors>,  panel_kernel<5, kVectors>,  panel_kernel<6, kVectors>,
    panel_kernel<7, kVectors>,  panel_kernel<8, kVectors>,  panel_kernel<9, kVectors>,
    panel_kernel<10, kVectors>, panel_kernel<11, kVectors>, panel_kernel<12, kVectors>};
constexpr const PanelKernel* kByVectors[kPanelVectors] = {kKernels<1>, kKernels<2>};

// All rows of x times pairs of tiles [begin, end), at most kChunkPairs.
template <int kBits>
void multiply_chunk(const PackedGemmArgs& a, const RowBlocks& rows, const float* x, int64_t begin,
                    int64_t end, float* panel) {
  const int64_t tiles = tile_count(a.n);
  for (int64_t k = 0; k < a.k; k += kChainCols) {
    const int64_t depth = smaller(kChainCols, a.k - k);
    for (int64_t tile = begin * kVectorTiles; tile < smaller(end * kVectorTiles, tiles); ++tile) {
      const int64_t at = tile - begin * kVectorTiles;
      avx2::dequantize<kBits, kVectorRows>(
          a, tile, k, k + depth,
          panel + at / kVectorTiles * kStride + at % kVectorTiles * kTileRows);
    }
    for (int64_t chunk = 0; chunk < rows.count; chunk += kChunkRowBlocks) {
      const int64_t chunk_end = smaller(chunk + kChunkRowBlocks, rows.count);
      for (int64_t pair = begin; pair < end; pair += kPanelVectors) {
        const int64_t vectors = smaller(kPanelVectors, end - pair);
        for (int64_t block = chunk; block < chunk_end; ++block) {
          const int64_t first = rows.begin(block), count = rows.rows(block);
          __m512 sums[kRowsAtOnce][kPanelVectors];
          kByVectors[vectors - 1][count - 1](
              {x + first * a.k + k * count, panel + (pair - begin) * kStride, depth}, sums);
          for (int64_t row = 0; row < count; ++row) {
            for (int64_t i = 0; i < vectors; ++i) {
              const int64_t tile = (pair + i) * kVectorTiles;
              avx2::accumulate(a, first + row, tile, _mm512_castps512_ps256(sums[row][i]), k == 0);
              if (tile + 1 < tiles)
                avx2::accumulate(a, first + row, tile + 1, upper_half(sums[row][i]), k == 0);
            }
          }
        }
      }
    }
  }
}

template <int kBits>
void multiply(const PackedGemmArgs& a) {
  const RowBlocks rows(a.m, kRowsAtOnce);
  Scratch packed(a.m * a.k);
  float* x = packed.take(a.m * a.k);
  avx2::pack_rows(a, rows, x);
  const int64_t pairs = ceil_div(tile_count(a.n), kVectorTiles);
  // Several tasks per thread even out their ends.
  const int64_t share = ceil_div(pairs, int64_t{4} * max_threads());
  const int64_t grain = larger(smaller(kChunkPairs, (share + 1) / 2 * 2),
                               ceil_div(kMinTaskMacs, larger(a.m * kVectorRows * a.k, 1)));
  parallel_for(pairs, grain, [&](int64_t begin, int64_t end) {
    Scratch scratch(kChunkPairs * kStride);
    float* panel = scratch.take(kChunkPairs * kStride);
    for (int64_t pair = begin; pair < end; pair += kChunkPairs)
      multiply_chunk<kBits>(a, rows, x, pair, smaller(pair + kChunkPairs, end), panel);
  });
}

constexpr void (*kByBits[])(const PackedGemmArgs&) = {
    multiply<2>, multiply<3>, multiply<4>, multiply<5>, multiply<6>, multiply<7>, multiply<8>};

}  // namespace
}  // namespace mmq::cpu::avx512

MMQ_AVX512_END

namespace mmq::cpu::avx512 {

void packed_gemm_exact(const PackedGemmArgs& a) {
  if (avx2::takes_few_rows(a)) return avx2::packed_gemm_exact(a);
  kByBits[a.bits - kMinBits](a);
}

}  // namespace mmq::cpu::avx512

#endif
