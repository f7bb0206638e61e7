// SPDX-License-Identifier: Apache-2.0
// awq_errors in plain loops: the fallback.
#include <algorithm>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "grid.h"
#include "packing.h"

namespace mmq::cpu::scalar {
namespace {

// d = w - Q(w * s) / s for one row.
void row_error(const AwqErrorsArgs& a, const float* w, const float* s, float* scaled, float* d) {
  const CodeRule rule = code_rule(a.bits, a.kind);
  for (int64_t j = 0; j < a.k; ++j) scaled[j] = w[j] * s[j];
  for (int64_t first = 0; first < a.k; first += a.group_size) {
    const int64_t last = std::min(first + a.group_size, a.k);
    const Range range = range_of(scaled + first, last - first);
    const GroupGrid grid = make_grid(range.low, range.high, a.bits, a.kind, a.scale_type);
    for (int64_t j = first; j < last; ++j) {
      const float code = code_of(scaled[j], grid, rule);
      d[j] = w[j] - value_of(code, grid, rule) / s[j];
    }
  }
}

}  // namespace

void awq_errors(const AwqErrorsArgs& a) {
  constexpr int64_t kRowsPerTask = 4;
  const int64_t tasks = ceil_div(a.n, kRowsPerTask);
  // One partial sum per candidate and task, added in fixed order: deterministic.
  std::vector<double> partial(a.count * tasks);
  parallel_for(a.count * tasks, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scaled(a.k), d(a.k);
    for (int64_t cell = begin; cell < end; ++cell) {
      const float* s = a.candidates + (cell / tasks) * a.k;
      const int64_t first = (cell % tasks) * kRowsPerTask;
      double sum = 0;
      for (int64_t r = first; r < std::min(first + kRowsPerTask, a.n); ++r) {
        row_error(a, a.w + r * a.k, s, scaled.data(), d.data());
        for (int64_t t = 0; t < a.rows; ++t) {
          const float* f = a.factor + t * a.k;
          float dot = 0;
          for (int64_t j = 0; j < a.k; ++j) dot += d[j] * f[j];
          sum += static_cast<double>(dot) * dot;
        }
      }
      partial[cell] = sum;
    }
  });
  for (int64_t c = 0; c < a.count; ++c) {
    double sum = 0;
    for (int64_t t = 0; t < tasks; ++t) sum += partial[c * tasks + t];
    a.errors[c] = sum;
  }
}

}  // namespace mmq::cpu::scalar
