// SPDX-License-Identifier: Apache-2.0
// packed_gemm with fp32 activations on AVX2; see few_rows_avx2.h and dense_panel_avx2.h for the two
// ways. Few rows: 16 outputs, decoded in registers, by up to 4 rows. Many rows: 6 rows by 16
// outputs = 12 accumulators.
#if defined(__x86_64__)

#include "cpu/dense_panel_avx2.h"
#include "cpu/few_rows_avx2.h"
#include "cpu/kernels.h"
#include "cpu/layout.h"
#include "cpu/packed_gemm_avx2.h"
#include "cpu/target_avx2.h"

MMQ_AVX2_BEGIN

namespace mmq::cpu::avx2 {
namespace {

// Measured: from so many rows on a panel wins (Zen 4, 2 threads, 4096x4096).
constexpr int64_t kPanelFromRows = 40;

// --- few rows ---

// The vectors that hold the fields of one half of a block.
template <int kBits>
inline void load_fields(const uint8_t* block, __m256i* vectors) {
  if constexpr (kFieldQuads<kBits> == 1) {
    decode_block<kBits>(block, vectors);
  } else {
#pragma GCC unroll 8
    for (int i = 0; i < kFieldVectors<kBits>; ++i) vectors[i] = load_vector(block + i * kQuadBytes);
  }
}

template <int kBits>
inline __m256 field_codes(__m256i vector, int position) {
  if (is_top_field<kBits>(position)) return _mm256_cvtepi32_ps(_mm256_srli_epi32(vector, position));
  return _mm256_cvtepi32_ps(
      _mm256_and_si256(vector, _mm256_set1_epi32(max_code(kBits) << position)));
}

// sums[rows][16] = sum_groups scale * sum(code * x) + minimum * sum(x). The two halves share the
// broadcast activations.
template <int kBits, int kRows>
void few_rows(const FewRowsOperands& a) {
  // 8 chains of additions in flight hide the latency of the multiply-add.
  constexpr int kChains = kRows == 1 ? 4 : kRows < 4 ? 2 : 1;
  constexpr int kVectors = kFieldVectors<kBits>, kQuads = kFieldQuads<kBits>;
  const uint8_t* block = a.tile;
  const float* x = a.x;
  int64_t left = a.blocks;
  __m256 out[kRows][kHalves] = {};
  for (int64_t group = 0; group < a.groups; ++group) {
    const Grid grids[kHalves] = {load_grid(a.affine[0], group), load_grid(a.affine[1], group)};
    for (int64_t todo = smaller(a.group_blocks, left); todo > 0;) {
      const int64_t count = smaller(todo, kChainBlocks);
      todo -= count;
      left -= count;
      __m256 sums[kRows][kHalves][kChains] = {};
      for (int64_t i = 0; i < count; ++i) {
        __m256i vectors[kHalves][kVectors];
        prefetch_codes<kBits>(block);
        load_fields<kBits>(block, vectors[0]);
        load_fields<kBits>(block + kHalfBytes, vectors[1]);
#pragma GCC unroll 8
        for (int quad = 0; quad < kBlockQuads; ++quad) {
#pragma GCC unroll 4
          for (int lane = 0; lane < kQuadCols; ++lane) {
            __m256 codes[kHalves];
#pragma GCC unroll 2
            for (int half = 0; half < kHalves; ++half)
              codes[half] = field_codes<kBits>(vectors[half][quad / kQuads],
                                               field_position<kBits>(quad, lane));
            const float* x_col = x + (quad * kQuadCols + lane) * kRows;
#pragma GCC unroll 4
            for (int row = 0; row < kRows; ++row) {
              const __m256 value = _mm256_broadcast_ss(x_col + row);
#pragma GCC unroll 2
              for (int half = 0; half < kHalves; ++half) {
                __m256& sum = sums[row][half][lane % kChains];
                sum = _mm256_fmadd_ps(codes[half], value, sum);
              }
            }
          }
        }
        block += block_bytes(kBits);
        x += kBlockCols * kRows;
      }
#pragma GCC unroll 2
      for (int half = 0; half < kHalves; ++half) {
#pragma GCC unroll 4
        for (int row = 0; row < kRows; ++row) {
          __m256* chains = sums[row][half];
#pragma GCC unroll 4
          for (int chain = 1; chain < kChains; ++chain)
            chains[0] = _mm256_add_ps(chains[0], chains[chain]);
          out[row][half] = _mm256_fmadd_ps(chains[0], grids[half].scale, out[row][half]);
        }
      }
    }
#pragma GCC unroll 2
    for (int half = 0; half < kHalves; ++half) {
#pragma GCC unroll 4
      for (int row = 0; row < kRows; ++row)
        out[row][half] = _mm256_fmadd_ps(_mm256_broadcast_ss(a.x_sums + group * kRows + row),
                                         grids[half].minimum, out[row][half]);
    }
  }
#pragma GCC unroll 4
  for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 2
    for (int half = 0; half < kHalves; ++half)
      _mm256_store_ps(a.sums + row * kTileRows + half * kHalfRows, out[row][half]);
}

struct FewRows {
  static constexpr int kRows = 4;

  template <int kBits>
  static void multiply(int64_t rows, const FewRowsOperands& operands) {
    static constexpr void (*kKernels[kRows])(const FewRowsOperands&) = {
        few_rows<kBits, 1>, few_rows<kBits, 2>, few_rows<kBits, 3>, few_rows<kBits, 4>};
    kKernels[rows - 1](operands);
  }
};

// --- many rows ---

// sums[rows][16] (+)= x[k][rows] . panel[k][16].
template <int kRows>
void panel_kernel(const PanelOperands& a) {
  constexpr int kVectors = kHalves;
  constexpr int kCols = kVectors * kHalfRows;
  __m256 sums[kRows][kVectors] = {};
  const float* x = a.x;
  const float* w = a.panel;
  for (int64_t k = 0; k < a.depth; ++k, x += kRows, w += kCols) {
    const __m256 weights[kVectors] = {_mm256_load_ps(w), _mm256_load_ps(w + kHalfRows)};
#pragma GCC unroll 6
    for (int row = 0; row < kRows; ++row) {
      const __m256 value = _mm256_broadcast_ss(x + row);
#pragma GCC unroll 2
      for (int i = 0; i < kVectors; ++i)
        sums[row][i] = _mm256_fmadd_ps(value, weights[i], sums[row][i]);
    }
  }
#pragma GCC unroll 6
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 2
    for (int i = 0; i < kVectors; ++i) {
      float* to = a.sums + row * kCols + i * kHalfRows;
      _mm256_store_ps(to, a.begin ? sums[row][i] : _mm256_add_ps(sums[row][i], _mm256_load_ps(to)));
    }
  }
}

struct Panel {
  static constexpr int kRows = 6;
  static constexpr int kTiles = 1;

  static void multiply(int64_t rows, const PanelOperands& operands) {
    static constexpr void (*kKernels[kRows])(const PanelOperands&) = {
        panel_kernel<1>, panel_kernel<2>, panel_kernel<3>,
        panel_kernel<4>, panel_kernel<5>, panel_kernel<6>};
    kKernels[rows - 1](operands);
  }

  template <int kBits>
  static void dequantize_block(const uint8_t* block, const TileAffine* affine, int64_t group,
                               float* out) {
    const Grid grids[kHalves] = {load_grid(affine[0], group), load_grid(affine[1], group)};
#pragma GCC unroll 8
    for (int quad = 0; quad < kBlockQuads; ++quad) {
      const __m256i quads[kHalves] = {decode_quad<kBits>(block, quad),
                                      decode_quad<kBits>(block + kHalfBytes, quad)};
#pragma GCC unroll 4
      for (int lane = 0; lane < kQuadCols; ++lane, out += kTileRows) {
#pragma GCC unroll 2
        for (int half = 0; half < kHalves; ++half) {
          __m256i codes = _mm256_srli_epi32(quads[half], 8 * lane);
          if (lane < kQuadCols - 1) codes = _mm256_and_si256(codes, _mm256_set1_epi32(0xff));
          _mm256_store_ps(
              out + half * kHalfRows,
              _mm256_fmadd_ps(_mm256_cvtepi32_ps(codes), grids[half].scale, grids[half].minimum));
        }
      }
    }
  }
};

template <int kBits>
void multiply(const PackedGemmArgs& a) {
  if (takes_few_rows(a, kPanelFromRows))
    multiply_few_rows<FewRows, kBits>(a);
  else
    multiply_many_rows<Panel, kBits>(a);
}

constexpr void (*kByBits[])(const PackedGemmArgs&) = {
    multiply<2>, multiply<3>, multiply<4>, multiply<5>, multiply<6>, multiply<7>, multiply<8>};

}  // namespace
}  // namespace mmq::cpu::avx2

MMQ_AVX2_END

namespace mmq::cpu::avx2 {

void packed_gemm_exact(const PackedGemmArgs& a) {
  if (a.m > 0) kByBits[a.bits - kMinBits](a);
}

}  // namespace mmq::cpu::avx2

#endif
