// SPDX-License-Identifier: Apache-2.0
// packed_gemm with fp32 activations on AVX-512; see few_rows_avx2.h and dense_panel_avx2.h for the
// two ways. Few rows: 16 outputs, decoded in registers, by up to 8 rows. Many rows: 12 rows by 32
// outputs = 24 accumulators.
#if defined(__x86_64__)

#include "cpu/dense_panel_avx2.h"
#include "cpu/few_rows_avx2.h"
#include "cpu/kernels.h"
#include "cpu/layout.h"
#include "cpu/packed_gemm_avx512.h"
#include "cpu/target_avx512.h"

MMQ_AVX512_BEGIN

namespace mmq::cpu::avx512 {
namespace {

// Measured: from so many rows on a panel is no slower (Zen 4, 2 threads, 4096x4096), and on
// processors that convert where they multiply it leaves the multiplier more cycles.
constexpr int64_t kPanelFromRows = 128;

// --- few rows ---

// The vectors that hold the fields of one block.
template <int kBits>
inline void load_fields(const uint8_t* block, __m512i* vectors) {
  if constexpr (avx2::kFieldQuads<kBits> == 1) {
    decode_block<kBits>(block, vectors);
  } else {
#pragma GCC unroll 8
    for (int i = 0; i < avx2::kFieldVectors<kBits>; ++i)
      vectors[i] = _mm512_loadu_si512(block + i * kQuadBytes);
  }
}

template <int kBits>
inline __m512 field_codes(__m512i vector, int position) {
  if (avx2::is_top_field<kBits>(position))
    return _mm512_cvtepi32_ps(_mm512_srli_epi32(vector, position));
  return _mm512_cvtepi32_ps(
      _mm512_and_si512(vector, _mm512_set1_epi32(max_code(kBits) << position)));
}

// sums[rows][16] = sum_groups scale * sum(code * x) + minimum * sum(x).
template <int kBits, int kRows>
void few_rows(const avx2::FewRowsOperands& a) {
  // Chains of additions in flight hide the latency of the multiply-add.
  constexpr int kChains = kRows == 1 ? 4 : kRows <= 4 ? 2 : 1;
  constexpr int kVectors = avx2::kFieldVectors<kBits>, kQuads = avx2::kFieldQuads<kBits>;
  const uint8_t* block = a.tile;
  const float* x = a.x;
  int64_t left = a.blocks;
  __m512 out[kRows] = {};
  for (int64_t group = 0; group < a.groups; ++group) {
    const Grid grid = load_tile_grid(a.affine[0], group);
    for (int64_t todo = smaller(a.group_blocks, left); todo > 0;) {
      const int64_t count = smaller(todo, avx2::kChainBlocks);
      todo -= count;
      left -= count;
      __m512 sums[kRows][kChains] = {};
      for (int64_t i = 0; i < count; ++i) {
        __m512i vectors[kVectors];
        avx2::prefetch_codes<kBits>(block);
        load_fields<kBits>(block, vectors);
#pragma GCC unroll 8
        for (int quad = 0; quad < kBlockQuads; ++quad) {
#pragma GCC unroll 4
          for (int lane = 0; lane < kQuadCols; ++lane) {
            const __m512 codes =
                field_codes<kBits>(vectors[quad / kQuads], avx2::field_position<kBits>(quad, lane));
            const float* x_col = x + (quad * kQuadCols + lane) * kRows;
#pragma GCC unroll 8
            for (int row = 0; row < kRows; ++row) {
              __m512& sum = sums[row][lane % kChains];
              sum = _mm512_fmadd_ps(codes, _mm512_set1_ps(x_col[row]), sum);
            }
          }
        }
        block += block_bytes(kBits);
        x += kBlockCols * kRows;
      }
#pragma GCC unroll 8
      for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
        for (int chain = 1; chain < kChains; ++chain)
          sums[row][0] = _mm512_add_ps(sums[row][0], sums[row][chain]);
        out[row] = _mm512_fmadd_ps(sums[row][0], grid.scale, out[row]);
      }
    }
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row)
      out[row] =
          _mm512_fmadd_ps(_mm512_set1_ps(a.x_sums[group * kRows + row]), grid.minimum, out[row]);
  }
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) _mm512_store_ps(a.sums + row * kTileRows, out[row]);
}

struct FewRows {
  static constexpr int kRows = 8;

  template <int kBits>
  static void multiply(int64_t rows, const avx2::FewRowsOperands& operands) {
    static constexpr void (*kKernels[kRows])(const avx2::FewRowsOperands&) = {
        few_rows<kBits, 1>, few_rows<kBits, 2>, few_rows<kBits, 3>, few_rows<kBits, 4>,
        few_rows<kBits, 5>, few_rows<kBits, 6>, few_rows<kBits, 7>, few_rows<kBits, 8>};
    kKernels[rows - 1](operands);
  }
};

// --- many rows ---

// sums[rows][32] (+)= x[k][rows] . panel[k][32].
template <int kRows>
void panel_kernel(const avx2::PanelOperands& a) {
  constexpr int kVectors = 2;
  constexpr int kCols = kVectors * kTileRows;
  __m512 sums[kRows][kVectors] = {};
  const float* x = a.x;
  const float* w = a.panel;
  for (int64_t k = 0; k < a.depth; ++k, x += kRows, w += kCols) {
    const __m512 weights[kVectors] = {_mm512_load_ps(w), _mm512_load_ps(w + kTileRows)};
#pragma GCC unroll 12
    for (int row = 0; row < kRows; ++row) {
      const __m512 value = _mm512_set1_ps(x[row]);
#pragma GCC unroll 2
      for (int i = 0; i < kVectors; ++i)
        sums[row][i] = _mm512_fmadd_ps(value, weights[i], sums[row][i]);
    }
  }
#pragma GCC unroll 12
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 2
    for (int i = 0; i < kVectors; ++i) {
      float* to = a.sums + row * kCols + i * kTileRows;
      _mm512_store_ps(to, a.begin ? sums[row][i] : _mm512_add_ps(sums[row][i], _mm512_load_ps(to)));
    }
  }
}

struct Panel {
  static constexpr int kRows = 12;
  static constexpr int kTiles = 2;

  static void multiply(int64_t rows, const avx2::PanelOperands& operands) {
    static constexpr void (*kKernels[kRows])(const avx2::PanelOperands&) = {
        panel_kernel<1>, panel_kernel<2>,  panel_kernel<3>,  panel_kernel<4>,
        panel_kernel<5>, panel_kernel<6>,  panel_kernel<7>,  panel_kernel<8>,
        panel_kernel<9>, panel_kernel<10>, panel_kernel<11>, panel_kernel<12>};
    kKernels[rows - 1](operands);
  }

  template <int kBits>
  static void dequantize_block(const uint8_t* block, const avx2::TileAffine* affine, int64_t group,
                               float* out) {
    const Grid grid = load_tile_grid(affine[0], group);
    __m512i quads[kBlockQuads];
    decode_block<kBits>(block, quads);
#pragma GCC unroll 8
    for (int quad = 0; quad < kBlockQuads; ++quad) {
#pragma GCC unroll 4
      for (int lane = 0; lane < kQuadCols; ++lane, out += kTiles * kTileRows) {
        __m512i codes = _mm512_srli_epi32(quads[quad], 8 * lane);
        if (lane < kQuadCols - 1) codes = _mm512_and_si512(codes, _mm512_set1_epi32(0xff));
        _mm512_store_ps(out, _mm512_fmadd_ps(_mm512_cvtepi32_ps(codes), grid.scale, grid.minimum));
      }
    }
  }
};

template <int kBits>
void multiply(const PackedGemmArgs& a) {
  if (avx2::takes_few_rows(a, kPanelFromRows))
    avx2::multiply_few_rows<FewRows, kBits>(a);
  else
    avx2::multiply_many_rows<Panel, kBits>(a);
}

constexpr void (*kByBits[])(const PackedGemmArgs&) = {
    multiply<2>, multiply<3>, multiply<4>, multiply<5>, multiply<6>, multiply<7>, multiply<8>};

}  // namespace
}  // namespace mmq::cpu::avx512

MMQ_AVX512_END

namespace mmq::cpu::avx512 {

void packed_gemm_exact(const PackedGemmArgs& a) {
  if (a.m > 0) kByBits[a.bits - kMinBits](a);
}

}  // namespace mmq::cpu::avx512

#endif
