// SPDX-License-Identifier: Apache-2.0
// packed_gemm for more than 8 rows: a pipelined tensor-core kernel.
//
// Partition. The output is cut into columns of kTileM x 256 results, the sum of each into tiles of
// 128 in-features. All tiles are numbered down k, then over the rows, then along n, and every
// thread block takes an equal stripe of consecutive numbers, whatever columns it crosses:
//
//              n tile 0    1    2            blocks 0..3 of 4 tiles each: all finish together;
//   k tile 0      0    0    1    2           column 1 is shared by blocks 1 and 2
//          1      0    1    2    3
//          2      0    1    2    3
//          3      0    1    2    3
//
// The price: a column that several blocks share needs a sum over them. Each writes its partial
// result to the workspace and counts itself in; the last to arrive adds all of them in the order of
// the blocks, so that the result does not depend on who came last, and resets the counter. Nobody
// waits for anybody: any number of blocks may be resident.
//
// Inside a block, four warps lie beside one another along n and two share each strip along k. A
// warp owns 64 features x kTileM rows: every activation operand it reads serves 64 features, every
// decoded weight kTileM rows. Weights pass through shared memory only as a queue of asynchronous
// copies: each lane copies the 16-byte vectors that it alone will read.
#pragma once

#include <cstdint>

#include "gemm_block.cuh"
#include "gemm_reduce.cuh"

namespace mmq::cuda {

template <int kBits, class Activation, int kTileM>
__global__ void __launch_bounds__(kGemmThreads, 1) packed_gemm_mma(const GemmParams params) {
  constexpr int kN8 = kTileM / 8;
  constexpr int kStages = gemm_stages(kBits, kTileM);
  constexpr int kStageBytes = gemm_stage_bytes(kBits, kTileM);
  constexpr int kXBytes = kTileM * kGemmTileK * 2;  // of a stage; weights follow
  constexpr int kXRowBytes = kGemmTileK * 2;
  constexpr int kChunksPerRow = kXRowBytes / 16;
  constexpr int kXCopies = kTileM * kChunksPerRow / kGemmThreads;       // of 16 bytes, per thread
  constexpr int kRowsPerCopy = kGemmThreads / kChunksPerRow;            // 16
  constexpr int kBlockBytes = block_words(kBits) * 4;
  static_assert(kXCopies * kRowsPerCopy == kTileM, "every thread copies whole rows of chunks");
  static_assert(kRowsPerCopy % 8 == 0, "the swizzle of a thread's chunks is the same in all rows");

  extern __shared__ __align__(128) unsigned char shared[];
  const uint32_t shared_base = shared_address(shared);
  const int lane = threadIdx.x % kLanes;
  const int warp = threadIdx.x / kLanes;
  const int strip_warp = warp % kGemmStripWarps;
  const int slice_warp = warp / kGemmStripWarps;

  // Chunk c of 16 bytes in row r of the activations lies at c ^ (r % 8): the eight rows that
  // ldmatrix reads at once then fall into different banks, and so do the copies' writes.
  auto swizzle = [](int chunk, int row) {
#ifdef MMQ_MUTATE_NO_SWIZZLE
    (void)row;
    return chunk;
#else
    return chunk ^ (row % 8);
#endif
  };

  // What this thread copies of the activations: chunk copy_chunk of rows copy_row, copy_row + 16...
  const int copy_chunk = threadIdx.x % kChunksPerRow;
  const int copy_row = threadIdx.x / kChunksPerRow;
  const uint32_t x_write =
      shared_base + copy_row * kXRowBytes + swizzle(copy_chunk, copy_row) * 16;
  const uint32_t w_place = shared_base + kXBytes + warp * kBlockBytes + lane * 16;

  // What this lane addresses for ldmatrix: matrices are (rows 0-7, chunk 0), (rows 0-7, chunk 1),
  // (rows 8-15, chunk 0), (rows 8-15, chunk 1) of a k step.
  const int matrix = lane / 8;
  const uint32_t x_read = shared_base + (matrix / 2 * 8 + lane % 8) * kXRowBytes;
  uint32_t x_read_step[kSteps];
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    x_read_step[step] =
        x_read + swizzle((slice_warp * kSteps + step) * 2 + matrix % 2, lane % 8) * 16;
  }

  const uint64_t policy = evict_first_policy();
  const int total_tiles = params.columns * params.k_tiles;
  int tile = blockIdx.x * params.tiles_per_block;
  const int tile_end = min(tile + params.tiles_per_block, total_tiles);

  while (tile < tile_end) {
    // --- one column, or this block's part of it -----------------------------------------------
    const int column = tile / params.k_tiles;
    const int k_begin = tile - column * params.k_tiles;
    const int k_end = min(k_begin + tile_end - tile, params.k_tiles);
    const int first_row = column % params.m_tiles * kTileM;
    const int strip = column / params.m_tiles * kGemmStripWarps + strip_warp;
    const int first_feature = strip * kBlockN + lane / 4 * kLaneFeatures;

    const char* x_source = static_cast<const char*>(params.x) +
                           ((first_row + copy_row) * params.x_stride + k_begin * kGemmTileK +
                            copy_chunk * 8) * 2;
    int x_cols_left = params.x_cols - k_begin * kGemmTileK - copy_chunk * 8;
    int k_block = k_begin * kGemmSliceWarps + slice_warp;  // of the next tile to copy
    const bool strip_exists = strip < params.strips;
    const uint4* w_source = params.tiles +
                            (static_cast<int64_t>(strip) * params.k_blocks + k_block) *
                                (kBlockBytes / 16) + lane;
    int copies_left = k_end - k_begin;

    auto copy_tile = [&](int stage) {
      if (copies_left > 0) {
        const uint32_t offset = stage * kStageBytes;
#pragma unroll
        for (int i = 0; i < kXCopies; ++i) {
          const int row = first_row + copy_row + i * kRowsPerCopy;
          int valid = x_cols_left > 0 && row < params.m ? 16 : 0;
#ifdef MMQ_MUTATE_NO_ROW_GUARD
          valid = 16;
#endif
          cp_async_zfill(x_write + offset + i * kRowsPerCopy * kXRowBytes,
                         x_source + i * kRowsPerCopy * 2 * params.x_stride, valid);
        }
        if (strip_exists && k_block < params.k_blocks) {
#pragma unroll
          for (int v = 0; v < kBits; ++v) {
            cp_async_once(w_place + offset + v * kLanes * 16, w_source + v * kLanes, policy);
          }
        }
        x_source += kGemmTileK * 2;
        x_cols_left -= kGemmTileK;
        w_source += kGemmSliceWarps * (kBlockBytes / 16);
        k_block += kGemmSliceWarps;
        --copies_left;
      }
      cp_async_commit();  // also an empty group: the number of groups tells which have landed
    };

    float totals[kTiles][kN8][4];
#pragma unroll
    for (int i = 0; i < kTiles * kN8 * 4; ++i) totals[i / 4 / kN8][i / 4 % kN8][i % 4] = initial_sum();

    auto multiply_tile = [&](int stage, int block) {
      const uint32_t offset = stage * kStageBytes;
      const unsigned char* w = shared + kXBytes + warp * kBlockBytes + lane * 16 + offset;
      multiply_block<kBits, Activation, kN8>(
          params, block, first_feature, first_row,
          [&](int vector) {
            return *reinterpret_cast<const uint4*>(w + vector * kLanes * 16);
          },
          [&](int step, uint32_t(&x)[kN8][2]) {
#pragma unroll
            for (int pair = 0; pair < kN8 / 2; ++pair) {
              ldmatrix_x4(x_read_step[step] + offset + pair * 16 * kXRowBytes, x[2 * pair],
                          x[2 * pair + 1]);
            }
          },
          totals);
    };

    for (int stage = 0; stage < kStages - 1; ++stage) copy_tile(stage);
    int stage = 0, free_stage = kStages - 1;
    int block = k_begin * kGemmSliceWarps + slice_warp;
    for (int k = k_begin; k < k_end; ++k) {
      cp_async_wait<kStages - 2>();
#ifndef MMQ_MUTATE_NO_BARRIER
      __syncthreads();  // all copies of the stage have landed, and its successor's place is free
#endif
      copy_tile(free_stage);
      if (strip_exists && block < params.k_blocks) multiply_tile(stage, block);
      block += kGemmSliceWarps;
      free_stage = stage;
      stage = stage + 1 == kStages ? 0 : stage + 1;
    }
    cp_async_wait<0>();
    __syncthreads();

    finish_column<Activation, kTileM>(params, column, k_begin, k_end, first_row, first_feature,
                                      totals, shared);
    tile += k_end - k_begin;
  }
}

}  // namespace mmq::cuda
