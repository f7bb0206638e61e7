// SPDX-License-Identifier: Apache-2.0
// hessian_update in plain loops, all in double: the fallback.
#include <algorithm>

#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace mmq::cpu::scalar {

void hessian_update(const HessianUpdateArgs& a) {
  constexpr int64_t kRows = 16;  // Rows of sum that share one pass over x.
  parallel_for(a.k, kRows, [&](int64_t first, int64_t last) {
    for (int64_t begin = first; begin < last; begin += kRows) {
      const int64_t end = std::min(begin + kRows, last);
      for (int64_t token = 0; token < a.tokens; ++token) {
        const float* x = a.x + token * a.k;
        for (int64_t i = begin; i < end; ++i)
          for (int64_t j = i; j < a.k; ++j)
            a.sum[i * a.k + j] += static_cast<double>(x[i]) * static_cast<double>(x[j]);
      }
    }
  });
}

}  // namespace mmq::cpu::scalar
