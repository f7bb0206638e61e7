// SPDX-License-Identifier: Apache-2.0
// The pass before packed_gemm, run only where it is needed: activations permuted, divided, or
// copied to aligned rows; and their sums over every run of columns, for zero points and minima.
#pragma once

#include <cstdint>

#include "activation.cuh"
#include "gemm.h"

namespace mmq::cuda {

struct PrepareParams {
  const void* x;          // [m, k]
  const int32_t* perm;    // [k] or null
  const float* in_scale;  // [k] or null
  void* staged;           // [m, staged_cols], zeros past k, or null
  float* row_sums;        // [staged_cols / run_cols, row_sum_stride] or null
  int m, k, staged_cols;
  int row_sum_stride;
  int sum_rows;  // m and the rows of padding that kernels read sums of: those are zero
  int run_cols;  // 16, 32 or 64
};

constexpr int kPrepareThreads = 256;
constexpr int kPrepareCols = 8;  // per thread: a 16-byte store

// One thread: 8 columns of one row. x' = round(x[perm] / in_scale[perm]): the quotient is an IEEE
// fp32 division of exact inputs, then rounded to 16 bits; without in_scale nothing is rounded.
template <class Activation>
__global__ void __launch_bounds__(kPrepareThreads) prepare_activations(const PrepareParams params) {
  const int row = blockIdx.y;
  const int first_col = (blockIdx.x * kPrepareThreads + threadIdx.x) * kPrepareCols;
  const uint16_t* x = static_cast<const uint16_t*>(params.x) + static_cast<int64_t>(row) * params.k;
  uint32_t packed[kPrepareCols / 2];
  float sum = 0.0f;
#pragma unroll
  for (int p = 0; p < kPrepareCols / 2; ++p) {
    float values[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int col = first_col + 2 * p + e;
      values[e] = 0.0f;
      if (col < params.k) {
        const int from = params.perm == nullptr ? col : __ldg(params.perm + col);
        values[e] = Activation::unpack(x[from]).x;
        if (params.in_scale != nullptr) values[e] = __fdiv_rn(values[e], params.in_scale[from]);
      }
    }
    packed[p] = Activation::pack(values[0], values[1]);
    const float2 rounded = Activation::unpack(packed[p]);
    sum += rounded.x + rounded.y;
  }
  if (params.staged != nullptr && first_col < params.staged_cols) {
    uint16_t* target = static_cast<uint16_t*>(params.staged) +
                       static_cast<int64_t>(row) * params.staged_cols + first_col;
    *reinterpret_cast<uint4*>(target) = {packed[0], packed[1], packed[2], packed[3]};
  }
  if (params.row_sums != nullptr) {
    const int threads = params.run_cols / kPrepareCols;
    for (int step = 1; step < threads; step *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (threadIdx.x % threads == 0 && first_col < params.staged_cols) {
      float* sums = params.row_sums +
                    static_cast<int64_t>(first_col / params.run_cols) * params.row_sum_stride;
      sums[row] = sum;
      if (row == params.m - 1) {
        for (int padding = params.m; padding < params.sum_rows; ++padding) sums[padding] = 0.0f;
      }
    }
  }
}

}  // namespace mmq::cuda
