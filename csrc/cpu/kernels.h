// SPDX-License-Identifier: Apache-2.0
// The CPU kernels: one struct of arguments per op, one table of function pointers per
// instruction set. Sizes and pointers were checked by the binding; kernels trust them.
#pragma once

#include <cstdint>

#include "quant_types.h"

namespace mmq::cpu {

enum class GemmMode : int {
  kExact = 0,  // activations as they are
  kInt8 = 1,   // activations quantized per row and group
};

// No fp32 sum of packed_gemm in exact mode is a chain of more additions than this before it is
// added to the sum of such sums; the error bound of the tests counts on it.
constexpr int64_t kChainCols = 256;

// A fork costs some microseconds: packed_gemm gives a thread at least so many multiply-adds.
constexpr int64_t kMinTaskMacs = 100000;

// y[m, n] = x[m, k] . w[n, k]^T + bias, w = code * scale + minimum. In int8 mode x is quantized per
// row and group: s_x = max|x| / 127, x_q = round_half_even(x / s_x); zeros stay zeros, and a row
// with a NaN or an infinity gives NaN.
struct PackedGemmArgs {
  const float* x;        // [m, k]
  const uint8_t* tiles;  // codes in the layout of layout.h
  const void* affine;    // scales and zeros or minima in the layout of layout.h
  const float* bias;     // [n] or null
  float* y;              // [m, n]
  int64_t m, n, k, group_size;
  int bits;
  GemmMode mode;
  AffineKind affine_kind;
  ScaleType scale_type;  // of a 16-bit affine
  // In place of x and y, or both null: the same in bfloat16, sums rounded to it at the end.
  const uint16_t* x_bfloat16;
  uint16_t* y_bfloat16;
};

// The GPTQ recursion inside one block of `cols` columns (arXiv 2210.17323, algorithm 1, inner
// loop). For i = 0..cols-1: q_i = grid(w_i), e_i = (w_i - deq(q_i)) / u_ii, w_j -= e_i * u_ij for j
// > i. Every product and difference is rounded on its own (no contraction), so that all
// implementations give the same codes.
struct GptqBlockArgs {
  const float* w;           // [n, cols], the compensated weights
  const float* u;           // [cols, cols], upper triangular factor; lower part is not read
  const float* scales;      // [n, groups]
  const float* zeros;       // [n, groups]: integer zero, or the minimum of a float-zero grid
  const int32_t* group_of;  // [cols], column of scales and zeros that a column uses
  uint8_t* codes;           // [n, cols]
  float* errors;            // [n, cols], the e_i
  int64_t n, cols, groups;
  int bits;
  bool float_zero;
  int min_code;  // lowest code: 0, or 1 for the restricted grid
};

// errors[c] = || (w - Q(w * s_c) / s_c) . factor^T ||_F^2 for every candidate s_c, where Q is the
// min-max grid of each group (arXiv 2306.00978, eq. 4). With factor = X [tokens, k] this is the
// output error; with factor = L^T, H = L L^T, it is tr(D H D^T).
struct AwqErrorsArgs {
  const float* w;           // [n, k]
  const float* candidates;  // [count, k], positive
  const float* factor;      // [rows, k]
  double* errors;           // [count]
  int64_t n, k, rows, count, group_size;
  int bits;
  GridKind kind;
  ScaleType scale_type;
};

// Scale and zero per row and group: min-max, or the shrunk range with the least
// sum importance * |w - w_hat|^exponent over 1, 1 - 1/steps, ... down to 1 - shrink.
struct GridSearchArgs {
  const float* w;           // [n, k]
  const float* importance;  // [k] or null (all ones)
  float* scales;            // [n, groups], rounded to scale_type
  float* zeros;             // [n, groups]: integer zero, 2^(b-1) if symmetric, or the minimum
  int64_t n, k, group_size;
  int bits;
  GridKind kind;
  ScaleType scale_type;
  int steps;  // 0: min-max only
  float shrink;
  float exponent;
};

// sum += x^T x on and above the diagonal; what lies below it is neither read nor written. Products
// are summed in fp32 over at most kHessianTokens tokens, those sums in float64.
struct HessianUpdateArgs {
  double* sum;     // [k, k]
  const float* x;  // [tokens, k]
  int64_t tokens, k;
};

// Measured at k = 4096 (Zen 4): with 256, 512, 1024 and 2048 tokens 199, 208, 187 and 155 GFLOP/s.
// More tokens move the sums less often, but their strips leave L2.
constexpr int64_t kHessianTokens = 512;

// One row per instruction set. Rows are complete: a set without its own version of an op names the
// scalar one.
struct Kernels {
  const char* name;
  bool (*supported)();
  void (*packed_gemm)(const PackedGemmArgs&);
  // Exact mode with x_bfloat16 and y_bfloat16. False, with nothing written, where packed_gemm shall
  // have these activations as fp32.
  bool (*packed_gemm_bfloat16)(const PackedGemmArgs&);
  void (*gptq_block)(const GptqBlockArgs&);
  void (*awq_errors)(const AwqErrorsArgs&);
  void (*grid_search)(const GridSearchArgs&);
  void (*hessian_update)(const HessianUpdateArgs&);
};

// The table in use: the first supported row in priority order, or the one that MMQ_CPU_ISA names
// (an unknown or unsupported name throws std::invalid_argument at the first call).
const Kernels& kernels();

// packed_gemm of the table in use. What is bfloat16 goes to its kernel for that or is converted.
void packed_gemm(const PackedGemmArgs& args);

// For tests and benchmarks: makes the row called `name` the table in use and returns the name of
// the one before. Throws std::invalid_argument for an unknown or unsupported name.
const char* select_isa(const char* name);

// Names of the rows this machine supports, best first; the end is a null pointer.
const char* const* supported_isas();

namespace scalar {
void packed_gemm(const PackedGemmArgs& args);
bool packed_gemm_bfloat16(const PackedGemmArgs& args);  // always false
void gptq_block(const GptqBlockArgs& args);
void awq_errors(const AwqErrorsArgs& args);
void grid_search(const GridSearchArgs& args);
void hessian_update(const HessianUpdateArgs& args);
}  // namespace scalar

#if defined(__x86_64__)
namespace avx2 {
bool supported();  // AVX2, FMA and F16C in the processor, and the OS saves the registers
void packed_gemm(const PackedGemmArgs& args);
void packed_gemm_exact(const PackedGemmArgs& args);
void packed_gemm_int8(const PackedGemmArgs& args);
void gptq_block(const GptqBlockArgs& args);
void awq_errors(const AwqErrorsArgs& args);
void grid_search(const GridSearchArgs& args);
void hessian_update(const HessianUpdateArgs& args);
}  // namespace avx2

// packed_gemm in both modes, hessian_update; the other ops are those of avx2.
namespace avx512 {
bool supported();  // AVX-512 F, BW, DQ, VL and VNNI beside AVX2, and the OS saves the registers
void packed_gemm(const PackedGemmArgs& args);
void packed_gemm_exact(const PackedGemmArgs& args);
void packed_gemm_int8(const PackedGemmArgs& args);
void hessian_update(const HessianUpdateArgs& args);
}  // namespace avx512

// packed_gemm in exact mode with bfloat16 activations; the other ops are those of avx512.
namespace avx512bf16 {
bool supported();  // AVX512-BF16 beside all that avx512 needs
bool packed_gemm_bfloat16(const PackedGemmArgs& args);
}  // namespace avx512bf16
#endif

}  // namespace mmq::cpu
