// SPDX-License-Identifier: Apache-2.0
// packed_gemm in plain loops: the fallback.
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "packing.h"

namespace mmq::cpu::scalar {

void packed_gemm(const PackedGemmArgs& a) {
  const int64_t stride_words = row_words(a.k, a.bits);
  const int64_t groups = group_count(a.k, a.group_size);
  parallel_for(a.n, 8, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const uint32_t* codes = reinterpret_cast<const uint32_t*>(a.tiles) + row * stride_words;
      for (int64_t i = 0; i < a.m; ++i) {
        float sum = 0;
        for (int64_t j = 0; j < a.k; ++j) {
          const float* grid = a.affine + 2 * (row * groups + j / a.group_size);
          sum += a.x[i * a.k + j] * (get_code(codes, j, a.bits) * grid[0] + grid[1]);
        }
        a.y[i * a.n + row] = sum + (a.bias ? a.bias[row] : 0.f);
      }
    }
  });
}

}  // namespace mmq::cpu::scalar
