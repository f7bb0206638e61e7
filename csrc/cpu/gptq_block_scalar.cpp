// SPDX-License-Identifier: Apache-2.0
// gptq_block in plain loops: the fallback, and the order of operations every version must keep.
#include <algorithm>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "grid.h"
#include "packing.h"

namespace mmq::cpu::scalar {

void gptq_block(const GptqBlockArgs& a) {
  const CodeRule rule{static_cast<float>(a.min_code), static_cast<float>(max_code(a.bits)),
                      a.float_zero};
  constexpr int64_t kRowsPerTask = 8;
  parallel_for(a.n, kRowsPerTask, [&](int64_t begin, int64_t end) {
    std::vector<float> row(a.cols);
    for (int64_t r = begin; r < end; ++r) {
      std::copy(a.w + r * a.cols, a.w + (r + 1) * a.cols, row.begin());
      for (int64_t i = 0; i < a.cols; ++i) {
        const int64_t g = r * a.groups + a.group_of[i];
        const GroupGrid grid{a.scales[g], a.zeros[g]};
        const float code = code_of(row[i], grid, rule);
        const float* u_row = a.u + i * a.cols;
        const float error = (row[i] - value_of(code, grid, rule)) / u_row[i];
        a.codes[r * a.cols + i] = static_cast<uint8_t>(code);
        a.errors[r * a.cols + i] = error;
        for (int64_t j = i + 1; j < a.cols; ++j) row[j] -= error * u_row[j];
      }
    }
  });
}

}  // namespace mmq::cpu::scalar
