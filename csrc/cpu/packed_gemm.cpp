// SPDX-License-Identifier: Apache-2.0
// How bfloat16 activations reach a kernel: as they are, or widened to fp32, which is exact; the
// result is then rounded once more.
#include <cmath>

#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "grid.h"

namespace mmq::cpu {
namespace {

constexpr int64_t kGrain = 1 << 16;  // A run of so many numbers takes about as long as a fork.

void widen_all(const uint16_t* from, int64_t count, float* to) {
  parallel_for(count, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) to[i] = widen(from[i], ScaleType::kBfloat16);
  });
}

// Every NaN becomes the quiet one.
void narrow_all(const float* from, int64_t count, uint16_t* to) {
  parallel_for(count, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const uint32_t bits = std::isnan(from[i]) ? kNanBits : bits_of(round_to_bf16(from[i]));
      to[i] = static_cast<uint16_t>(bits >> 16);
    }
  });
}

}  // namespace

void packed_gemm(const PackedGemmArgs& args) {
  const Kernels& table = kernels();
  // Not by x, which may be null where k is 0.
  if (!args.y_bfloat16) return table.packed_gemm(args);
  if (args.mode == GemmMode::kExact && table.packed_gemm_bfloat16(args)) return;
  const int64_t x_floats = args.m * args.k, y_floats = args.m * args.n;
  Scratch memory(Scratch::padded(x_floats) + y_floats);
  float* x = memory.take(x_floats);
  PackedGemmArgs wide = args;
  wide.x = x;
  wide.y = memory.take(y_floats);
  wide.x_bfloat16 = nullptr;
  wide.y_bfloat16 = nullptr;
  widen_all(args.x_bfloat16, x_floats, x);
  table.packed_gemm(wide);
  narrow_all(wide.y, y_floats, args.y_bfloat16);
}

}  // namespace mmq::cpu
