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
#include <utility>

#include "gemm_block.cuh"
#include "gemm_reduce.cuh"

namespace mmq::cuda {

// Loops with constant offsets inside the instructions.
template <int kXRowBytes, int kN8, int... kPairs>
__device__ inline void load_rows(uint32_t address, uint32_t (&x)[kN8][2],
                                 std::integer_sequence<int, kPairs...>) {
  (ldmatrix_x4<kPairs * 16 * kXRowBytes>(address, x[2 * kPairs], x[2 * kPairs + 1]), ...);
}

template <int kTargetStep, int... kRows>
__device__ inline void copy_rows(uint32_t target, const uint4* source, uint32_t first,
                                 uint32_t step, std::integer_sequence<int, kRows...>) {
  (cp_async<kRows * kTargetStep>(target, source + (first + kRows * step)), ...);
}

template <int... kVectors>
__device__ inline void copy_vectors(uint32_t target, const uint4* source, uint64_t policy,
                                    std::integer_sequence<int, kVectors...>) {
  (cp_async_once<kVectors * kLanes * 16>(target, source, policy), ...);
}

// Whether ptxas has registers left to keep an address and a bound in, which spares instructions:
// not for 64 rows of widths of several planes, nor of any width on sm_90, where it would spill.
template <int kBits, int kTileM>
__device__ constexpr bool has_spare_registers() {
#if __CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1000
  return kTileM < 64;
#else
  return kTileM < 64 || plane_count(kBits) == 1;
#endif
}

template <int kBits, class Activation, int kTileM>
__global__ void __launch_bounds__(kGemmThreads, 1) packed_gemm_mma(const GemmParams params) {
  constexpr int kN8 = kTileM / 8;
  constexpr int kStages = gemm_stages(kBits, kTileM);
  constexpr int kStageBytes = gemm_stage_bytes(kBits, kTileM);
  constexpr int kXBytes = kTileM * kGemmTileK * 2;  // of a stage; weights follow
  constexpr int kXRowBytes = kGemmTileK * 2;
  constexpr int kChunksPerRow = kXRowBytes / 16;
  constexpr int kXCopies = kTileM * kChunksPerRow / kGemmThreads;  // of 16 bytes, per thread
  constexpr int kRowsPerCopy = kGemmThreads / kChunksPerRow;       // 16
  constexpr int kBlockBytes = block_words(kBits) * 4;
  constexpr bool kSpareRegisters = has_spare_registers<kBits, kTileM>();
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
      kept_value(shared_base + copy_row * kXRowBytes + swizzle(copy_chunk, copy_row) * 16);

  // What this lane addresses for ldmatrix: matrices are (rows 0-7, chunk 0), (rows 0-7, chunk 1),
  // (rows 8-15, chunk 0), (rows 8-15, chunk 1) of a k step.
  // Step j is two chunks, 32 bytes, further on before the swizzle, so 32 * j is XOR-ed after it.
  const int matrix = lane / 8;
  const uint32_t x_read = kept_value(shared_base + (matrix / 2 * 8 + lane % 8) * kXRowBytes +
                                     swizzle(slice_warp * kSteps * 2 + matrix % 2, lane % 8) * 16);
  uint32_t w_read = kXBytes + warp * kBlockBytes + lane * 16;
  if constexpr (kSpareRegisters) w_read = kept_value(w_read);

  int tile = static_cast<int>(blockIdx.x) * params.tiles_per_block;
  const int tile_end = stripe_end(params);
  while (tile < tile_end) {
    // --- one column, or this block's part of it -----------------------------------------------
    const ColumnPart part = column_part<kTileM>(params, tile);
    const int strip = part.strip + strip_warp;
    const int first_feature = strip * kBlockN + lane / 4 * kLaneFeatures;

    // Sources in 16-byte units, which move on with every copy. Up to w_end this warp has weights.
    const auto x_row_chunks = static_cast<uint32_t>(params.x_stride / 8);
    uint32_t x_chunk =
        (part.first_row + copy_row) * x_row_chunks + part.k_begin * kChunksPerRow + copy_chunk;
    uint32_t w_vector = (strip * params.k_blocks + part.k_begin * kGemmSliceWarps + slice_warp) *
                            (kBlockBytes / 16) +
                        lane;
    const bool rows_exist = part.first_row + kTileM <= params.m;
    const int whole_end = rows_exist ? min(part.k_end, params.x_cols / kGemmTileK) : part.k_begin;
    // Whether every chunk of tile k exists.
    auto is_whole = [&](int k) {
      if constexpr (kSpareRegisters) return k < whole_end;
      return rows_exist && (k + 1) * kGemmTileK <= params.x_cols && k < part.k_end;
    };
    const int copy_rows_left = params.m - part.first_row - copy_row;
    const int w_end = strip < params.strips
                          ? min(part.k_end, (params.k_blocks - slice_warp + 1) / kGemmSliceWarps)
                          : 0;

    auto copy_tile = [&](int k, uint32_t offset) {
      const uint4* x = static_cast<const uint4*>(params.x);
      if (is_whole(k)) {
        copy_rows<kRowsPerCopy * kXRowBytes>(x_write + offset, x, x_chunk,
                                             kRowsPerCopy * x_row_chunks,
                                             std::make_integer_sequence<int, kXCopies>());
      } else if (k < part.k_end) {
        const bool chunk_exists = k * kGemmTileK + copy_chunk * 8 < params.x_cols;
#pragma unroll
        for (int i = 0; i < kXCopies; ++i) {
          int valid = chunk_exists && i * kRowsPerCopy < copy_rows_left ? 16 : 0;
#ifdef MMQ_MUTATE_NO_ROW_GUARD
          valid = 16;
#endif
          cp_async_zfill(x_write + offset + i * kRowsPerCopy * kXRowBytes,
                         x + (x_chunk + i * kRowsPerCopy * x_row_chunks), valid);
        }
      }
      if (k < w_end) {
        copy_vectors(shared_base + w_read + offset, params.tiles + w_vector, evict_first_policy(),
                     std::make_integer_sequence<int, kBits>());
      }
      x_chunk += kChunksPerRow;
      w_vector += kGemmSliceWarps * (kBlockBytes / 16);
      cp_async_commit();  // also an empty group: the number of groups tells which have landed
    };

    float totals[kTiles][kN8][4];
#pragma unroll
    for (int i = 0; i < kTiles * kN8 * 4; ++i)
      totals[i / 4 / kN8][i / 4 % kN8][i % 4] = initial_sum();

    auto multiply_tile = [&](uint32_t offset, int k_block) {
      const unsigned char* w = shared + w_read + offset;
      multiply_block<kBits, Activation, kN8>(
          params, k_block, first_feature, part.first_row,
          [&](int vector) { return *reinterpret_cast<const uint4*>(w + vector * kLanes * 16); },
          [&](int step, uint32_t (&x)[kN8][2]) {
            load_rows<kXRowBytes>((x_read + offset) ^ (step * 32), x,
                                  std::make_integer_sequence<int, kN8 / 2>());
          },
          totals);
    };

    // The stage that is multiplied lies at `offset`; the one before it is free for the next copy.
    for (int stage = 0; stage < kStages - 1; ++stage) {
      copy_tile(part.k_begin + stage, stage * kStageBytes);
    }
    uint32_t offset = 0;
    for (int k = part.k_begin; k < part.k_end; ++k) {
      cp_async_wait<kStages - 2>();
#ifndef MMQ_MUTATE_NO_BARRIER
      __syncthreads();  // all copies of the stage have landed, and its predecessor was read
#endif
      constexpr uint32_t kLast = (kStages - 1) * kStageBytes;
      copy_tile(k + kStages - 1, offset == 0 ? kLast : offset - kStageBytes);
      if (k < w_end) multiply_tile(offset, k * kGemmSliceWarps + slice_warp);
      offset = offset == kLast ? 0 : offset + kStageBytes;
    }
    cp_async_wait<0>();
    __syncthreads();

    // Computed anew: kept over the loop, these would cost registers that it lacks.
    const ColumnPart done = column_part<kTileM>(params, kept_value(tile));
    finish_column<Activation, kTileM>(
        params, done, (done.strip + strip_warp) * kBlockN + lane / 4 * kLaneFeatures, totals,
        shared);
    tile += done.k_end - done.k_begin;
  }
}

}  // namespace mmq::cuda
