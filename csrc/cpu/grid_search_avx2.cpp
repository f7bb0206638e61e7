// SPDX-License-Identifier: Apache-2.0
// grid_search for AVX2.
//
// Min-max: the range by vector, the grid by grid.h, so the same bits as the scalar version.
//
// Search: eight shrunk ranges run through the vector lanes and every weight of the group is
// broadcast to them; a group of any length needs no tail. Codes are those of the scalar version.
// With exponent 2 so are the errors, hence the same choice. Other exponents take |miss|^e from a
// float32 power that is relatively accurate to kPowerError, so the chosen range has an error of at
// most (1 + 2 * kPowerError) times the least one: another choice than the scalar version's is a
// tie.
#include <vector>

#include "cpu/grid_avx2.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/power_avx2.h"
#include "grid.h"
#include "packing.h"

#if defined(__x86_64__)

MMQ_AVX2_BEGIN
namespace mmq::cpu {
namespace {

// The shrunk grids of one group, and the error of each.
struct Candidates {
  int count;
  int padded;      // to whole vectors; the surplus lanes repeat the widest range and are not read
  float* scales;   // [padded]
  float* zeros;    // [padded]
  double* errors;  // [padded]
};

// Adds importance * |miss|^exponent to the errors of candidates [lane, lane + 8).
template <bool kFloatZero, bool kSquare>
void add_errors(const GridSearchArgs& a, const float* w, const float* importance, int64_t count,
                const Candidates& c, int lane) {
  const CodeRule rule = code_rule(a.bits, a.kind);
  const __m256 lowest = _mm256_set1_ps(rule.lowest);
  const __m256 highest = _mm256_set1_ps(rule.highest);
  const __m256 scale = _mm256_loadu_ps(c.scales + lane);
  const __m256 zero = _mm256_loadu_ps(c.zeros + lane);
  const __m256 sign = _mm256_set1_ps(-0.f);
  const __m256 exponent = _mm256_set1_ps(a.exponent);
  // Misses are measured in steps of the widest grid, which keeps their powers in range.
  const __m256 per_step = _mm256_set1_ps(1.f / c.scales[0]);
  __m256d low = _mm256_setzero_pd();
  __m256d high = _mm256_setzero_pd();
  for (int64_t i = 0; i < count; ++i) {
    const __m256 x = _mm256_broadcast_ss(w + i);
    const __m256 code = code_of<kFloatZero>(x, scale, zero, lowest, highest);
    const __m256 miss =
        _mm256_andnot_ps(sign, _mm256_sub_ps(x, value_of<kFloatZero>(code, scale, zero)));
    __m256d term_low, term_high;
    if (kSquare) {
      term_low = _mm256_cvtps_pd(_mm256_castps256_ps128(miss));
      term_high = _mm256_cvtps_pd(_mm256_extractf128_ps(miss, 1));
      term_low = _mm256_mul_pd(term_low, term_low);
      term_high = _mm256_mul_pd(term_high, term_high);
    } else {
      const __m256 term = power(_mm256_mul_ps(miss, per_step), exponent);
      term_low = _mm256_cvtps_pd(_mm256_castps256_ps128(term));
      term_high = _mm256_cvtps_pd(_mm256_extractf128_ps(term, 1));
    }
    if (importance) {
      const __m256d weight = _mm256_set1_pd(static_cast<double>(importance[i]));
      term_low = _mm256_mul_pd(weight, term_low);
      term_high = _mm256_mul_pd(weight, term_high);
    }
    low = _mm256_add_pd(low, term_low);
    high = _mm256_add_pd(high, term_high);
  }
  _mm256_storeu_pd(c.errors + lane, low);
  _mm256_storeu_pd(c.errors + lane + 4, high);
}

GroupGrid search_group(const GridSearchArgs& a, const float* w, const float* importance,
                       int64_t count, const Candidates& c) {
  const Range range = range_of_avx2(w, count);
  if (c.count == 1) return make_grid(range.low, range.high, a.bits, a.kind, a.scale_type);
  for (int i = 0; i < c.padded; ++i) {
    const float p = shrink_factor(i < c.count ? i : 0, a.steps);
    const GroupGrid grid = make_grid(p * range.low, p * range.high, a.bits, a.kind, a.scale_type);
    c.scales[i] = grid.scale;
    c.zeros[i] = grid.zero;
  }
  for (int lane = 0; lane < c.padded; lane += 8) {
    if (a.kind == GridKind::kFloat) {
      if (a.exponent == 2.f) {
        add_errors<true, true>(a, w, importance, count, c, lane);
      } else {
        add_errors<true, false>(a, w, importance, count, c, lane);
      }
    } else if (a.exponent == 2.f) {
      add_errors<false, true>(a, w, importance, count, c, lane);
    } else {
      add_errors<false, false>(a, w, importance, count, c, lane);
    }
  }
  int best = 0;
  for (int i = 1; i < c.count; ++i)
    if (c.errors[i] < c.errors[best]) best = i;
  return {c.scales[best], c.zeros[best]};
}

// Rows [begin, end), all their groups.
void search_rows(const GridSearchArgs& a, int64_t begin, int64_t end, const Candidates& c) {
  const int64_t groups = group_count(a.k, a.group_size);
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t first = g * a.group_size;
      const int64_t count = a.group_size < a.k - first ? a.group_size : a.k - first;
      const GroupGrid grid = search_group(a, a.w + row * a.k + first,
                                          a.importance ? a.importance + first : nullptr, count, c);
      a.scales[row * groups + g] = grid.scale;
      a.zeros[row * groups + g] = grid.zero;
    }
  }
}

}  // namespace
}  // namespace mmq::cpu
MMQ_AVX2_END

namespace mmq::cpu::avx2 {

void grid_search(const GridSearchArgs& a) {
  const int count = shrink_count(a.steps, a.shrink);
  const int padded = (count + 7) / 8 * 8;
  parallel_for(a.n, 8, [&](int64_t begin, int64_t end) {
    std::vector<float> grids(2 * static_cast<size_t>(padded));
    std::vector<double> errors(static_cast<size_t>(padded));
    search_rows(a, begin, end, {count, padded, grids.data(), grids.data() + padded, errors.data()});
  });
}

}  // namespace mmq::cpu::avx2

#endif
