// SPDX-License-Identifier: Apache-2.0
// awq_errors for AVX2: the quantization is fused into the packing of a matrix product, and the
// product is never stored beyond the cache.
//
//   for each block of kTokens rows of the factor (packed once, shared by all candidates):
//     for each task = (candidate, kBlockRows rows of w), in parallel:
//       grids of the task's groups                                one pass over w
//       for each kDepth columns where the block of the factor is not zero:
//         D = w - Q(w s) / s, packed      bit for bit as awq_errors_scalar.cpp
//         y += D . factor^T               6 x 16 microkernel, y stays in L2/L3
//       partial[task] = sum of y^2 in double
//
// A D value is used kTokens times, so quantization costs about 2 % and the rate is the
// microkernel's. Runs of zeros at either end of the factor's panels are skipped: a triangular
// factor costs half. The sums do not depend on the number of threads.
#include <algorithm>
#include <vector>

#include "cpu/grid_avx2.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "grid.h"
#include "packing.h"

#if defined(__x86_64__)

MMQ_AVX2_BEGIN
namespace mmq::cpu {
namespace {

constexpr int kTileM = 6;       // rows of D per microkernel call
constexpr int kTileN = 16;      // rows of the factor (tokens) per call: 6 * 2 accumulators of 16
constexpr int kDepth = 256;     // columns per call: a factor panel of 16 KB lives in L1
constexpr int kBlockRows = 96;  // D block of 96 KB lives in L2
constexpr int64_t kTokens = 2048;
static_assert(kBlockRows % kTileM == 0 && kDepth % 8 == 0 && kTokens % kTileN == 0);

// Columns [first, last) of a panel outside of which the factor is zero.
struct Span {
  int64_t first, last;
};

// 16 rows of the factor to panel[k][16]; missing rows become zeros.
Span pack_panel(const float* factor, int64_t k, int64_t rows, float* panel) {
  Span span{k, 0};
  for (int64_t half = 0; half < kTileN; half += 8) {
    for (int64_t j = 0; j < k; j += 8) {
      const int width = static_cast<int>(k - j < 8 ? k - j : 8);
      __m256 m[8];
      for (int r = 0; r < 8; ++r) {
        const float* source = factor + (half + r) * k + j;
        if (half + r >= rows) {
          m[r] = _mm256_setzero_ps();
        } else if (width == 8) {
          m[r] = _mm256_loadu_ps(source);
        } else {
          alignas(32) float part[8] = {};
          for (int c = 0; c < width; ++c) part[c] = source[c];
          m[r] = _mm256_load_ps(part);
        }
      }
      transpose8(m);
      for (int c = 0; c < width; ++c) {
        _mm256_store_ps(panel + (j + c) * kTileN + half, m[c]);
        const __m256 nonzero = _mm256_cmp_ps(m[c], _mm256_setzero_ps(), _CMP_NEQ_UQ);
        if (_mm256_movemask_ps(nonzero)) {
          if (j + c < span.first) span.first = j + c;
          if (j + c >= span.last) span.last = j + c + 1;
        }
      }
    }
  }
  return span;
}

// The grids of the groups of one row of w * s that have columns below `last`, from column `begin`
// on, where a group begins.
void row_grids(const AwqErrorsArgs& a, const float* w, const float* s, int64_t begin, int64_t last,
               float* scaled, float* scales, float* zeros) {
  const int64_t end = ceil_div(last, a.group_size) * a.group_size;
  const int64_t stop = end < a.k ? end : a.k;
  int64_t j = begin;
  for (; j + 8 <= stop; j += 8)
    _mm256_storeu_ps(scaled + j, _mm256_mul_ps(_mm256_loadu_ps(w + j), _mm256_loadu_ps(s + j)));
  for (; j < stop; ++j) scaled[j] = w[j] * s[j];
  for (int64_t first = begin, g = begin / a.group_size; first < stop; first += a.group_size, ++g) {
    const int64_t count = a.group_size < a.k - first ? a.group_size : a.k - first;
    const Range range = range_of_avx2(scaled + first, count);
    const GroupGrid grid = make_grid(range.low, range.high, a.bits, a.kind, a.scale_type);
    scales[g] = grid.scale;
    zeros[g] = grid.zero;
  }
}

// d[0, width) = w - Q(w * s) / s for columns [first, first + width) of a row, width <= kDepth.
// Lanes past the width are written, up to a multiple of 8, and mean nothing.
template <bool kFloatZero>
void row_errors(const AwqErrorsArgs& a, const float* w, const float* s, const float* scales,
                const float* zeros, int64_t first, int64_t width, float* d) {
  alignas(32) float scale[kDepth];
  alignas(32) float zero[kDepth];
  for (int64_t j = 0; j < width;) {
    const int64_t g = (first + j) / a.group_size;
    const int64_t end = (g + 1) * a.group_size - first;
    for (const int64_t last = end < width ? end : width; j < last; ++j) {
      scale[j] = scales[g];
      zero[j] = zeros[g];
    }
  }
  const CodeRule rule = code_rule(a.bits, a.kind);
  const __m256 lowest = _mm256_set1_ps(rule.lowest);
  const __m256 highest = _mm256_set1_ps(rule.highest);
  const auto eight = [&](const float* w_from, const float* s_from, int64_t j) {
    const __m256 x = _mm256_loadu_ps(w_from);
    const __m256 by = _mm256_loadu_ps(s_from);
    const __m256 step = _mm256_load_ps(scale + j);
    const __m256 offset = _mm256_load_ps(zero + j);
    const __m256 code = code_of<kFloatZero>(_mm256_mul_ps(x, by), step, offset, lowest, highest);
    const __m256 value = _mm256_div_ps(value_of<kFloatZero>(code, step, offset), by);
    _mm256_store_ps(d + j, _mm256_sub_ps(x, value));
  };
  const int64_t whole = width / 8 * 8;
  for (int64_t j = 0; j < whole; j += 8) eight(w + first + j, s + first + j, j);
  if (whole == width) return;
  float w_tail[8] = {}, s_tail[8] = {1, 1, 1, 1, 1, 1, 1, 1};
  for (int64_t j = whole; j < width; ++j) {
    w_tail[j - whole] = w[first + j];
    s_tail[j - whole] = s[first + j];
  }
  for (int64_t j = width; j < whole + 8; ++j) scale[j] = zero[j] = 1.f;
  eight(w_tail, s_tail, whole);
}

// Six rows of D, [kTileM + 2][kDepth] with the last two unused, to panel[width][kTileM]. Each store
// is two floats too wide; the next one overwrites them, the last needs two floats of padding.
void pack_rows(const float* d, int64_t width, float* panel) {
  for (int64_t j = 0; j < width; j += 8) {
    __m256 m[8];
    for (int r = 0; r < kTileM; ++r) m[r] = _mm256_load_ps(d + r * kDepth + j);
    m[6] = m[7] = _mm256_setzero_ps();
    transpose8(m);
    const int64_t columns = width - j < 8 ? width - j : 8;
    for (int c = 0; c < columns; ++c) _mm256_storeu_ps(panel + (j + c) * kTileM, m[c]);
  }
}

// y[6][16] += rows[depth][6]^T . panel[depth][16].
void multiply_tile(const float* rows, const float* panel, int64_t depth, float* y) {
  __m256 sum[kTileM][2];
  for (int r = 0; r < kTileM; ++r)
    for (int h = 0; h < 2; ++h) sum[r][h] = _mm256_load_ps(y + r * kTileN + 8 * h);
#pragma GCC unroll 4
  for (int64_t j = 0; j < depth; ++j) {
    const __m256 b0 = _mm256_load_ps(panel + j * kTileN);
    const __m256 b1 = _mm256_load_ps(panel + j * kTileN + 8);
#pragma GCC unroll 6
    for (int r = 0; r < kTileM; ++r) {
      const __m256 x = _mm256_broadcast_ss(rows + j * kTileM + r);
      sum[r][0] = _mm256_fmadd_ps(x, b0, sum[r][0]);
      sum[r][1] = _mm256_fmadd_ps(x, b1, sum[r][1]);
    }
  }
  for (int r = 0; r < kTileM; ++r)
    for (int h = 0; h < 2; ++h) _mm256_store_ps(y + r * kTileN + 8 * h, sum[r][h]);
}

// The sum of the squares of `count` floats (a multiple of 8), in double.
double sum_of_squares(const float* y, int64_t count) {
  __m256d low = _mm256_setzero_pd();
  __m256d high = _mm256_setzero_pd();
  for (int64_t i = 0; i < count; i += 8) {
    const __m256 x = _mm256_load_ps(y + i);
    const __m256d x_low = _mm256_cvtps_pd(_mm256_castps256_ps128(x));
    const __m256d x_high = _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1));
    low = _mm256_fmadd_pd(x_low, x_low, low);
    high = _mm256_fmadd_pd(x_high, x_high, high);
  }
  alignas(32) double lanes[4];
  _mm256_store_pd(lanes, _mm256_add_pd(low, high));
  return (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
}

// What one task works in.
struct Workspace {
  float* scales;  // [kBlockRows][groups]
  float* zeros;   // [kBlockRows][groups]
  float* scaled;  // [k]
  float* d;       // [kTileM][kDepth]
  float* rows;    // [kBlockRows / kTileM][kDepth][kTileM], 8 floats of padding
  float* y;       // [panels][kBlockRows / kTileM][kTileM][kTileN]
};

// The packed block of the factor.
struct Factor {
  const float* panels;  // [count][k][kTileN]
  const Span* spans;    // [count]
  int64_t count;
  Span columns;  // all spans together
};

// || (w - Q(w * s) / s) . factor^T ||_F^2 for `rows` <= kBlockRows rows of w.
template <bool kFloatZero>
double block_error(const AwqErrorsArgs& a, const float* w, int64_t rows, const float* s,
                   const Factor& factor, const Workspace& work) {
  const int64_t groups = group_count(a.k, a.group_size);
  const int64_t tiles = ceil_div(rows, kTileM);
  const int64_t y_size = factor.count * tiles * kTileM * kTileN;
  const int64_t begin = factor.columns.first / kDepth * kDepth;
  for (int64_t r = 0; r < rows; ++r)
    row_grids(a, w + r * a.k, s, begin / a.group_size * a.group_size, factor.columns.last,
              work.scaled, work.scales + r * groups, work.zeros + r * groups);
  for (int64_t i = 0; i < y_size; i += 8) _mm256_store_ps(work.y + i, _mm256_setzero_ps());
  for (int64_t first = begin; first < factor.columns.last; first += kDepth) {
    const int64_t width = kDepth < a.k - first ? kDepth : a.k - first;
    for (int64_t t = 0; t < tiles; ++t) {
      for (int64_t r = t * kTileM; r < (t + 1) * kTileM; ++r) {
        float* d = work.d + (r - t * kTileM) * kDepth;
        if (r < rows) {
          row_errors<kFloatZero>(a, w + r * a.k, s, work.scales + r * groups,
                                 work.zeros + r * groups, first, width, d);
        } else {
          for (int64_t j = 0; j < width; ++j) d[j] = 0.f;
        }
      }
      pack_rows(work.d, width, work.rows + t * kDepth * kTileM);
    }
    for (int64_t p = 0; p < factor.count; ++p) {
      const Span span = factor.spans[p];
      const int64_t from = span.first > first ? span.first : first;
      const int64_t to = span.last < first + width ? span.last : first + width;
      if (from >= to) continue;
      const float* panel = factor.panels + (p * a.k + from) * kTileN;
      for (int64_t t = 0; t < tiles; ++t)
        multiply_tile(work.rows + (t * kDepth + from - first) * kTileM, panel, to - from,
                      work.y + (p * tiles + t) * kTileM * kTileN);
    }
  }
  return sum_of_squares(work.y, y_size);
}

}  // namespace
}  // namespace mmq::cpu
MMQ_AVX2_END

namespace mmq::cpu::avx2 {

void awq_errors(const AwqErrorsArgs& a) {
  const int64_t groups = group_count(a.k, a.group_size);
  const int64_t blocks = ceil_div(a.n, kBlockRows);
  const int64_t most_panels = ceil_div(std::min(a.rows, kTokens), kTileN);
  std::fill(a.errors, a.errors + a.count, 0.0);
  std::vector<Span> spans(most_panels);
  std::vector<double> partial(a.count * blocks);
  Scratch packed(most_panels * a.k * kTileN);
  float* panels = packed.take(most_panels * a.k * kTileN);
  for (int64_t token = 0; token < a.rows; token += kTokens) {
    const int64_t tokens = std::min(kTokens, a.rows - token);
    Factor factor{panels, spans.data(), ceil_div(tokens, kTileN), {a.k, 0}};
    parallel_for(factor.count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p)
        spans[p] = pack_panel(a.factor + (token + p * kTileN) * a.k, a.k, tokens - p * kTileN,
                              panels + p * a.k * kTileN);
    });
    for (int64_t p = 0; p < factor.count; ++p) {
      factor.columns.first = std::min(factor.columns.first, spans[p].first);
      factor.columns.last = std::max(factor.columns.last, spans[p].last);
    }
    parallel_for(a.count * blocks, 1, [&](int64_t begin, int64_t end) {
      const int64_t grids = kBlockRows * groups;
      const int64_t d_size = kTileM * kDepth;
      const int64_t rows_size = kBlockRows * kDepth + 8;
      const int64_t y_size = factor.count * kTileN * kBlockRows;
      Scratch scratch(2 * Scratch::padded(grids) + Scratch::padded(a.k) + Scratch::padded(d_size) +
                      Scratch::padded(rows_size) + Scratch::padded(y_size));
      const Workspace work{scratch.take(grids),  scratch.take(grids),     scratch.take(a.k),
                           scratch.take(d_size), scratch.take(rows_size), scratch.take(y_size)};
      for (int64_t task = begin; task < end; ++task) {
        const int64_t row = task % blocks * kBlockRows;
        const int64_t rows = std::min<int64_t>(kBlockRows, a.n - row);
        const float* s = a.candidates + task / blocks * a.k;
        partial[task] = a.kind == GridKind::kFloat
                            ? block_error<true>(a, a.w + row * a.k, rows, s, factor, work)
                            : block_error<false>(a, a.w + row * a.k, rows, s, factor, work);
      }
    });
    // Always in this order, whatever thread computed them.
    for (int64_t task = 0; task < a.count * blocks; ++task)
      a.errors[task / blocks] += partial[task];
  }
}

}  // namespace mmq::cpu::avx2

#endif
