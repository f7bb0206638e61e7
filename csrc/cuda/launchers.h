// SPDX-License-Identifier: Apache-2.0
// The C interface of the CUDA library: pointers, sizes and a stream; no torch, no C++ exceptions.
// All pointers but those in brackets are device pointers. Sizes were checked by the caller; a
// launcher returns 0, a positive cudaError_t, or a negative Status, and never prints.
#pragma once

#include <cstddef>
#include <cstdint>

#include "quant_types.h"

#define MMQ_CUDA_EXPORT extern "C" __attribute__((visibility("default")))

namespace mmq::cuda {

using Stream = void*;  // cudaStream_t, so that callers need no CUDA header

enum Status : int {
  kOk = 0,
  kUnsupported = -1,  // arguments that no kernel was built for; the binding names them
  kWorkspaceTooSmall = -2,
};

enum class ActivationType : int { kFloat16 = 1, kBfloat16 = 2 };

struct PackedGemmArgs {
  const void* x;          // [m, k] of `activation`
  const uint32_t* tiles;  // fragment order, see tiles.h
  const void* affine;     // [groups, padded n] or [groups, padded n, 2], see AffineKind
  const void* bias;       // [n] of `activation`, or null
  const int32_t* perm;    // [k] or null: packed position j reads in-feature perm[j]
  const float* in_scale;  // [k] or null: divides x before the permutation
  void* y;                // [m, n] of `activation`
  void* workspace;        // packed_gemm_workspace() bytes, the first 64 KiB zero at first; left so
  int64_t m, n, k, group_size;
  int bits;
  ActivationType activation;
  AffineKind affine_kind;
  ScaleType scale_type;  // of a 16-bit affine
};

// As in cpu/kernels.h, on device pointers.
struct GptqBlockArgs {
  const float* w;           // [n, cols]
  const float* u;           // [cols, cols], upper triangular
  const float* scales;      // [n, groups]
  const float* zeros;       // [n, groups]
  const int32_t* group_of;  // [cols]
  uint8_t* codes;           // [n, cols]
  float* errors;            // [n, cols]
  int64_t n, cols, groups;
  int bits;
  bool float_zero;
  int min_code;
};

struct AwqErrorsArgs {
  const float* w;           // [n, k]
  const float* candidates;  // [count, k]
  const float* factor;      // [rows, k]
  double* errors;           // [count]
  void* workspace;          // awq_errors_workspace() bytes
  int64_t n, k, rows, count, group_size;
  int bits;
  GridKind kind;
  ScaleType scale_type;
};

}  // namespace mmq::cuda

MMQ_CUDA_EXPORT int64_t mmq_cuda_tiles_bytes(int64_t n, int64_t k, int bits);
// Depends on the sizes and the device alone, never on a pointer; kUnsupported as packed_gemm does:
// groups that are neither a multiple of 16 nor per channel, and sizes past the 32-bit offsets of
// the kernels (about 2^31 elements of x, 2^35 bits of weights). Two calls that may run at the same
// time need two workspaces.
MMQ_CUDA_EXPORT int64_t mmq_cuda_packed_gemm_workspace(const mmq::cuda::PackedGemmArgs* args);
MMQ_CUDA_EXPORT int mmq_cuda_packed_gemm(const mmq::cuda::PackedGemmArgs* args,
                                         mmq::cuda::Stream stream);
MMQ_CUDA_EXPORT int mmq_cuda_repack(const uint32_t* words, int64_t n, int64_t k, int bits,
                                    uint32_t* tiles, mmq::cuda::Stream stream);
MMQ_CUDA_EXPORT int mmq_cuda_unrepack(const uint32_t* tiles, int64_t n, int64_t k, int bits,
                                      uint32_t* words, mmq::cuda::Stream stream);
MMQ_CUDA_EXPORT int mmq_cuda_pack(const uint8_t* codes, int64_t rows, int64_t cols, int bits,
                                  uint32_t* words, mmq::cuda::Stream stream);
MMQ_CUDA_EXPORT int mmq_cuda_unpack(const uint32_t* words, int64_t rows, int64_t cols, int bits,
                                    uint8_t* codes, mmq::cuda::Stream stream);
MMQ_CUDA_EXPORT int mmq_cuda_gptq_block(const mmq::cuda::GptqBlockArgs* args,
                                        mmq::cuda::Stream stream);
MMQ_CUDA_EXPORT int64_t mmq_cuda_awq_errors_workspace(const mmq::cuda::AwqErrorsArgs* args);
MMQ_CUDA_EXPORT int mmq_cuda_awq_errors(const mmq::cuda::AwqErrorsArgs* args,
                                        mmq::cuda::Stream stream);

// Device count, or minus the cudaError_t (no driver, driver too old). Names and texts of errors.
MMQ_CUDA_EXPORT int mmq_cuda_device_count();
MMQ_CUDA_EXPORT const char* mmq_cuda_error_name(int status);
MMQ_CUDA_EXPORT const char* mmq_cuda_error_string(int status);
// Compute capability (80 for 8.0) of the current device, or minus the cudaError_t; and 1 if the
// library holds machine code or PTX for it (a kernel is looked up), else minus the cudaError_t.
MMQ_CUDA_EXPORT int mmq_cuda_capability();
MMQ_CUDA_EXPORT int mmq_cuda_can_run();
MMQ_CUDA_EXPORT const char* mmq_cuda_architectures();  // "80 86 ... +ptx100", as built
