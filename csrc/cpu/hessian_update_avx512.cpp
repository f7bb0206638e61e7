// SPDX-License-Identifier: Apache-2.0
// hessian_update on AVX-512; see hessian_update_avx2.h. 8 rows by 48 columns = 24 accumulators.
#if defined(__x86_64__)

#include "cpu/hessian_update_avx2.h"
#include "cpu/target_avx512.h"

MMQ_AVX512_BEGIN

namespace mmq::cpu::avx512 {
namespace {

using avx2::kStripCols;

struct Tile {
  static constexpr int64_t kRows = 8;
  static constexpr int64_t kCols = 48;
  static constexpr int kVectorCols = 16;

  template <int kVectors>
  static void products(const avx2::TileOperands& a) {
    __m512 sums[kRows][kVectors];
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 3
      for (int i = 0; i < kVectors; ++i) {
        const float* from = a.sums + row * kStripCols + i * kVectorCols;
        sums[row][i] = a.begin ? _mm512_setzero_ps() : _mm512_load_ps(from);
      }
    }
    const float* rows = a.rows;
    const float* cols = a.cols;
    for (int64_t token = 0; token < a.tokens; ++token, rows += kStripCols, cols += kStripCols) {
      __m512 values[kVectors];
#pragma GCC unroll 3
      for (int i = 0; i < kVectors; ++i) values[i] = _mm512_load_ps(cols + i * kVectorCols);
#pragma GCC unroll 8
      for (int row = 0; row < kRows; ++row) {
        const __m512 factor = _mm512_set1_ps(rows[row]);
#pragma GCC unroll 3
        for (int i = 0; i < kVectors; ++i)
          sums[row][i] = _mm512_fmadd_ps(factor, values[i], sums[row][i]);
      }
    }
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 3
      for (int i = 0; i < kVectors; ++i)
        _mm512_store_ps(a.sums + row * kStripCols + i * kVectorCols, sums[row][i]);
    }
  }

  static void multiply(int64_t cols, const avx2::TileOperands& a) {
    cols > 2 * kVectorCols ? products<3>(a) : cols > kVectorCols ? products<2>(a) : products<1>(a);
  }
};

}  // namespace
}  // namespace mmq::cpu::avx512

MMQ_AVX512_END

namespace mmq::cpu::avx512 {

void hessian_update(const HessianUpdateArgs& a) { avx2::update<Tile>(a); }

}  // namespace mmq::cpu::avx512

#endif
