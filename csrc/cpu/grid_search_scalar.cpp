// SPDX-License-Identifier: Apache-2.0
// grid_search in plain loops: the fallback, and the arithmetic every version must reproduce.
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "grid.h"
#include "packing.h"

namespace mmq::cpu::scalar {
namespace {

// sum importance * |w - w_hat| ^ exponent over one group, accumulated in double.
double grid_error(const float* w, const float* importance, int64_t count, GroupGrid grid,
                  CodeRule rule, float exponent) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float miss = std::fabs(w[i] - value_of(code_of(w[i], grid, rule), grid, rule));
    const double term = exponent == 2.f ? static_cast<double>(miss) * miss
                                        : std::pow(static_cast<double>(miss), exponent);
    sum += importance ? importance[i] * term : term;
  }
  return sum;
}

}  // namespace

void grid_search(const GridSearchArgs& a) {
  const int64_t groups = group_count(a.k, a.group_size);
  const CodeRule rule = code_rule(a.bits, a.kind);
  const int candidates = shrink_count(a.steps, a.shrink);
  parallel_for(a.n, 8, [&](int64_t begin, int64_t end) {
    for (int64_t cell = begin * groups; cell < end * groups; ++cell) {
      const int64_t first = (cell % groups) * a.group_size;
      const int64_t count = std::min(a.group_size, a.k - first);
      const float* w = a.w + (cell / groups) * a.k + first;
      const float* importance = a.importance ? a.importance + first : nullptr;
      const Range range = range_of(w, count);
      GroupGrid best{};
      double least = std::numeric_limits<double>::infinity();
      for (int i = 0; i < candidates; ++i) {
        const float p = shrink_factor(i, a.steps);
        const GroupGrid grid =
            make_grid(p * range.low, p * range.high, a.bits, a.kind, a.scale_type);
        const double error =
            candidates == 1 ? 0 : grid_error(w, importance, count, grid, rule, a.exponent);
        if (i == 0 || error < least) {
          best = grid;
          least = error;
        }
      }
      a.scales[cell] = best.scale;
      a.zeros[cell] = best.zero;
    }
  });
}

}  // namespace mmq::cpu::scalar
