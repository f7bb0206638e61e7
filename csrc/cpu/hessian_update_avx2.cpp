// SPDX-License-Identifier: Apache-2.0
// hessian_update on AVX2; see hessian_update_avx2.h. 4 rows by 24 columns = 12 accumulators.
#if defined(__x86_64__)

#include "cpu/hessian_update_avx2.h"

MMQ_AVX2_BEGIN

namespace mmq::cpu::avx2 {
namespace {

struct Tile {
  static constexpr int64_t kRows = 4;
  static constexpr int64_t kCols = 24;
  static constexpr int kVectorCols = 8;

  template <int kVectors>
  static void products(const TileOperands& a) {
    __m256 sums[kRows][kVectors];
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 3
      for (int i = 0; i < kVectors; ++i) {
        const float* from = a.sums + row * kStripCols + i * kVectorCols;
        sums[row][i] = a.begin ? _mm256_setzero_ps() : _mm256_load_ps(from);
      }
    }
    const float* rows = a.rows;
    const float* cols = a.cols;
    for (int64_t token = 0; token < a.tokens; ++token, rows += kStripCols, cols += kStripCols) {
      __m256 values[kVectors];
#pragma GCC unroll 3
      for (int i = 0; i < kVectors; ++i) values[i] = _mm256_load_ps(cols + i * kVectorCols);
#pragma GCC unroll 4
      for (int row = 0; row < kRows; ++row) {
        const __m256 factor = _mm256_broadcast_ss(rows + row);
#pragma GCC unroll 3
        for (int i = 0; i < kVectors; ++i)
          sums[row][i] = _mm256_fmadd_ps(factor, values[i], sums[row][i]);
      }
    }
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 3
      for (int i = 0; i < kVectors; ++i)
        _mm256_store_ps(a.sums + row * kStripCols + i * kVectorCols, sums[row][i]);
    }
  }

  static void multiply(int64_t cols, const TileOperands& a) {
    cols > 2 * kVectorCols ? products<3>(a) : cols > kVectorCols ? products<2>(a) : products<1>(a);
  }
};

}  // namespace
}  // namespace mmq::cpu::avx2

MMQ_AVX2_END

namespace mmq::cpu::avx2 {

void hessian_update(const HessianUpdateArgs& a) { update<Tile>(a); }

}  // namespace mmq::cpu::avx2

#endif
