// SPDX-License-Identifier: Apache-2.0
// What the launcher of packed_gemm hands to its kernels, and the sizes both must agree on.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "launchers.h"
#include "tiles.h"

namespace mmq::cuda {

// --- the tensor-core path ---------------------------------------------------------------------

constexpr int kGemmThreads = 256;
constexpr int kGemmTileM = 64;
constexpr int kGemmSmallTileM = 16;
constexpr int kGemmStripWarps = 4;                     // warps beside one another along n
constexpr int kGemmSliceWarps = 2;                     // warps that share a strip, along k
constexpr int kGemmTileN = kGemmStripWarps * kBlockN;  // 256
constexpr int kGemmTileK = kGemmSliceWarps * kBlockK;  // 128
constexpr int kGemmMaxShared = 98304;                  // fits sm_86 and sm_89, too

MMQ_HOST_DEVICE constexpr int gemm_stage_bytes(int bits, int tile_m) {
  return tile_m * kGemmTileK * 2 + kGemmStripWarps * kGemmSliceWarps * block_words(bits) * 4;
}

MMQ_HOST_DEVICE constexpr int gemm_stages(int bits, int tile_m) {
  const int fit = kGemmMaxShared / gemm_stage_bytes(bits, tile_m);
  return fit < 4 ? fit : 4;
}

MMQ_HOST_DEVICE constexpr int gemm_shared_bytes(int bits, int tile_m) {
  const int pipeline = gemm_stages(bits, tile_m) * gemm_stage_bytes(bits, tile_m);
  const int exchange = tile_m * kGemmTileN * 4;  // one half of the partial sums each way
  return pipeline > exchange ? pipeline : exchange;
}

static_assert(gemm_stages(8, 64) >= 2 && gemm_stages(4, 64) == 3 && gemm_stages(4, 16) == 4);

// --- the small-M path -------------------------------------------------------------------------

constexpr int kGemvThreads = 256;
constexpr int kGemvWarps = kGemvThreads / kLanes;
constexpr int kGemvMaxRows = 8;
constexpr int kGemvMaxSliceBlocks = 32;  // 2048 columns: 32 KiB of activations at 8 rows

// --- both -------------------------------------------------------------------------------------

struct GemmParams {
  const void* x;          // [m, x_stride] of 16-bit numbers, 16-byte aligned rows
  const uint4* tiles;     // see tiles.h
  const void* affine;     // see AffineKind
  const void* bias;       // [n] or null
  void* y;                // [m, n]
  const float* row_sums;  // [runs, row_sum_stride], sums of x over a run of columns, or null
  int* counters;          // arrivals, zero between launches
  float* partials;
  int64_t x_stride;
  uint32_t group_magic;  // ceil(2^31 / steps per group), 0 for one group
  int m, n;
  int x_cols;  // columns of x that exist: a multiple of 8
  int strips, k_blocks, last_group;
  int row_sum_stride;
  int run_steps;  // 1, 2 or 4 k steps share one scale
  AffineKind affine_kind;
  bool scale_is_bfloat;
  bool plain_runs;   // the usual case: runs of 4 steps, f16 scales, neither zeros nor minima
  bool wide_stores;  // rows of y are 16-byte aligned
  // Partition: GEMM: tiles of k, rows of tiles and tiles per block; GEMV: k blocks of a slice.
  int k_tiles, m_tiles, columns, tiles_per_block;
  int slices, slice_blocks;
};

// Defined once per width (gemm_width.cu).
template <int kBits>
cudaError_t launch_gemm(const GemmParams& params, ActivationType activation, int tile_m, int blocks,
                        cudaStream_t stream);
template <int kBits>
cudaError_t launch_gemv(const GemmParams& params, ActivationType activation, cudaStream_t stream);

}  // namespace mmq::cuda
