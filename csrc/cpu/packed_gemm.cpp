// SPDX-License-Identifier: Apache-2.0
// How bfloat16 activations reach a kernel: as they are, or widened to fp32, which is exact.
#include "cpu/kernels.h"
#include "cpu/layout.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "grid.h"

namespace mmq::cpu {

void packed_gemm(const PackedGemmArgs& args) {
  const Kernels& table = kernels();
  if (!args.x_bfloat16) return table.packed_gemm(args);
  if (args.mode == GemmMode::kExact && table.packed_gemm_bfloat16(args)) return;
  constexpr int64_t kGrain = 1 << 16;  // A run of so many takes about as long as a fork.
  Scratch memory(args.m * args.k);
  float* x = memory.take(args.m * args.k);
  parallel_for(args.m * args.k, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      x[i] = float_of(static_cast<uint32_t>(args.x_bfloat16[i]) << 16);
  });
  PackedGemmArgs widened = args;
  widened.x = x;
  widened.x_bfloat16 = nullptr;
  table.packed_gemm(widened);
}

}  // namespace mmq::cpu
