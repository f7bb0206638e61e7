// SPDX-License-Identifier: Apache-2.0
// hessian_update but for the instruction set: pairs of strips of columns, multiplied in registers.
//
//   x       [token][k]
//   strips  [strip][token][kStripCols]   packed once per kHessianTokens tokens, zeros beyond k
//   sum     pairs of strips on and above the diagonal, a tile of kRows x kCols at a time:
//
//             . . . c c c    rows    strip i: kRows broadcasts a token
//             . . . c c c    columns strip j: kCols / width vectors a token
//           r r x x
//           r r x x          One format serves as rows and as columns.
//
// A header of the AVX2 and AVX-512 files only.
#pragma once

#if defined(__x86_64__)

#include "cpu/kernels.h"
#include "cpu/layout.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/target_avx2.h"

MMQ_AVX2_BEGIN

namespace mmq::cpu::avx2 {
namespace {

constexpr int64_t kStripCols = 48;     // Three vectors of 16, or twice three of 8.
constexpr int64_t kPanelTokens = 128;  // Of a strip 24 KB: the columns of a tile stay in L1.
constexpr int64_t kPackTokens = 16;  // x is read in whole rows, strips are written 3 KB at a time.

// One call of a tile kernel: sums[kRows][kCols] (+)= rows^T cols over the tokens. All rows of
// memory have stride kStripCols.
struct TileOperands {
  const float* rows;
  const float* cols;
  int64_t tokens;
  float* sums;
  bool begin;  // sums are written, not added to
};

inline void pack_strips(const float* x, int64_t tokens, int64_t k, float* strips) {
  parallel_for(tokens, kPackTokens, [&](int64_t first, int64_t last) {
    for (int64_t begin = first; begin < last; begin += kPackTokens)
      for (int64_t col = 0; col < k; col += kStripCols)
        for (int64_t token = begin; token < smaller(begin + kPackTokens, last); ++token) {
          const float* from = x + token * k + col;
          float* to = strips + col * tokens + token * kStripCols;
          const int64_t cols = smaller(kStripCols, k - col);
          for (int64_t j = 0; j < cols; ++j) to[j] = from[j];
          for (int64_t j = cols; j < kStripCols; ++j) to[j] = 0.f;
        }
  });
}

// The entries of sum that a pair of strips makes, into L2 while the products are computed.
inline void prefetch_pair(const HessianUpdateArgs& a, int64_t row, int64_t col) {
  for (int64_t i = row; i < smaller(row + kStripCols, a.k); ++i)
    for (int64_t j = larger(col, i); j < smaller(col + kStripCols, a.k); j += 8)
      _mm_prefetch(reinterpret_cast<const char*>(a.sum + i * a.k + j), _MM_HINT_T1);
}

// Adds those on and above the diagonal.
inline void add_pair(const HessianUpdateArgs& a, const float* sums, int64_t row, int64_t col) {
  for (int64_t i = row; i < smaller(row + kStripCols, a.k); ++i, sums += kStripCols)
    for (int64_t j = larger(col, i); j < smaller(col + kStripCols, a.k); ++j)
      a.sum[i * a.k + j] += static_cast<double>(sums[j - col]);
}

// Strips that begin at columns `row` <= `col`. Tile has kRows, kCols, kVectorCols and
// multiply(columns that exist, operands).
template <class Tile>
void multiply_pair(const HessianUpdateArgs& a, const float* strips, int64_t tokens, int64_t row,
                   int64_t col) {
  static_assert(kStripCols % Tile::kRows == 0 && kStripCols % Tile::kCols == 0, "whole tiles");
  alignas(64) float sums[kStripCols * kStripCols];
  prefetch_pair(a, row, col);
  const int64_t rows = smaller(kStripCols, a.k - row), cols = smaller(kStripCols, a.k - col);
  for (int64_t token = 0; token < tokens; token += kPanelTokens) {
    const float* from = strips + token * kStripCols;
    for (int64_t c = 0; c < cols; c += Tile::kCols)
      for (int64_t r = 0; r < rows; r += Tile::kRows) {
        // On the diagonal, vectors that lie below it are left out.
        const int64_t first = row == col ? larger(c, r - r % Tile::kVectorCols) : c;
        const int64_t left = smaller(c + Tile::kCols, cols) - first;
        if (left > 0)
          Tile::multiply(left, {from + row * tokens + r, from + col * tokens + first,
                                smaller(kPanelTokens, tokens - token),
                                sums + r * kStripCols + first, token == 0});
      }
  }
  add_pair(a, sums, row, col);
}

template <class Tile>
void update(const HessianUpdateArgs& a) {
  const int64_t count = ceil_div(a.k, kStripCols);
  Scratch scratch(count * kStripCols * smaller(a.tokens, kHessianTokens));
  float* strips = scratch.take(0);
  for (int64_t token = 0; token < a.tokens; token += kHessianTokens) {
    const int64_t tokens = smaller(kHessianTokens, a.tokens - token);
    pack_strips(a.x + token * a.k, tokens, a.k, strips);
    const int64_t pair_macs = tokens * kStripCols * kStripCols;
    // Pairs column by column: (0, 0), (0, 1), (1, 1), (0, 2), ...
    parallel_for(count * (count + 1) / 2, ceil_div(kMinTaskMacs, pair_macs),
                 [&](int64_t pair, int64_t pair_end) {
                   int64_t col = 0, row = pair;
                   while (row > col) row -= ++col;
                   for (; pair < pair_end; ++pair) {
                     multiply_pair<Tile>(a, strips, tokens, row * kStripCols, col * kStripCols);
                     if (++row > col) {
                       row = 0;
                       ++col;
                     }
                   }
                 });
  }
}

}  // namespace
}  // namespace mmq::cpu::avx2

MMQ_AVX2_END

#endif
