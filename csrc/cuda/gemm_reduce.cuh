// SPDX-License-Identifier: Apache-2.0
// The end of a column of the tensor-core kernel: the sum over the warps that share a strip, over
// the blocks that share a column, and the store.
#pragma once

#include <cstdint>

#include "gemm_block.cuh"

namespace mmq::cuda {

// After the exchange of warps a thread owns half of its rows: kN8 / 2 operands of 8 rows.
template <int kN8>
using Kept = float[kTiles][kN8 / 2][4];

// The two warps of a strip swap halves through shared memory and add: slice warp 0 keeps the lower
// rows, slice warp 1 the upper ones. Vectors of neighbouring threads are neighbours: no conflicts.
template <int kN8>
__device__ inline void exchange_slices(const Totals<kN8>& totals, unsigned char* shared,
                                       Kept<kN8>& kept) {
  constexpr int kKeptN8 = kN8 / 2;
  const bool upper = threadIdx.x >= kGemmThreads / 2;
  float4* sent = reinterpret_cast<float4*>(shared);
  const int partner = threadIdx.x ^ (kGemmThreads / 2);
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < kKeptN8; ++i) {
      const float (&low)[4] = totals[tile][i];
      const float (&high)[4] = totals[tile][i + kKeptN8];
      sent[(tile * kKeptN8 + i) * kGemmThreads + partner] =
          upper ? float4{low[0], low[1], low[2], low[3]}
                : float4{high[0], high[1], high[2], high[3]};
#pragma unroll
      for (int c = 0; c < 4; ++c) kept[tile][i][c] = upper ? high[c] : low[c];
    }
  }
  __syncthreads();
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < kKeptN8; ++i) {
      const float4 v = sent[(tile * kKeptN8 + i) * kGemmThreads + threadIdx.x];
      kept[tile][i][0] += v.x;
      kept[tile][i][1] += v.y;
      kept[tile][i][2] += v.z;
      kept[tile][i][3] += v.w;
    }
  }
}

// Whether this block is the last of `parts` to count itself in at `counter`. What all threads of
// all these blocks wrote before is then visible to all threads of this one. Ends in a barrier.
__device__ inline bool arrive_last(int* counter, int parts, unsigned char* shared) {
  int* is_last = reinterpret_cast<int*>(shared);
  __threadfence();
  __syncthreads();  // also: everyone is done with the shared memory that holds the flag now
  if (threadIdx.x == 0) {
    const bool last = increment_acq_rel(counter) == parts - 1;
#ifndef MMQ_MUTATE_LOCK_NOT_RESET
    if (last) *counter = 0;  // for the next launch; nobody else of this one will look
#endif
    *is_last = last;
  }
  __syncthreads();
  const bool last = *is_last != 0;
  __syncthreads();  // the flag's place may be overwritten
  return last;
}

// Which tiles of which column come next.
struct ColumnPart {
  int column, k_begin, k_end;
  int first_row, strip;  // of the column
};

// The number behind the last tile of this thread block's stripe.
__device__ inline int stripe_end(const GemmParams& params) {
  return min((static_cast<int>(blockIdx.x) + 1) * params.tiles_per_block,
             params.columns * params.k_tiles);
}

template <int kTileM>
__device__ inline ColumnPart column_part(const GemmParams& params, int tile) {
  const int column = tile / params.k_tiles;
  const int k_begin = tile - column * params.k_tiles;
  const int k_end = min(k_begin + stripe_end(params) - tile, params.k_tiles);
  return {column, k_begin, k_end, column % params.m_tiles * kTileM,
          column / params.m_tiles * kGemmStripWarps};
}

template <class Activation, int kTileM>
__device__ inline void finish_column(const GemmParams& params, const ColumnPart& part,
                                     int first_feature, const Totals<kTileM / 8>& totals,
                                     unsigned char* shared) {
  constexpr int kKeptN8 = kTileM / 16;
  constexpr int kSlotVectors = kTiles * kKeptN8 * kGemmThreads;
  Kept<kTileM / 8> kept;
  exchange_slices<kTileM / 8>(totals, shared, kept);

  if (part.k_end - part.k_begin < params.k_tiles) {
    // A block has at most two parts of shared columns: one that does not start a column (slot 0,
    // only ever its first) and one that does (slot 1, its last).
    const int first_tile = part.column * params.k_tiles;
    const int first_block = first_tile / params.tiles_per_block;
    const int last_block = (first_tile + params.k_tiles - 1) / params.tiles_per_block;
    float4* slots = reinterpret_cast<float4*>(params.partials);
    auto slot = [&](int block) {
      const bool starts = block == first_block;
      return slots + (static_cast<int64_t>(block) * 2 + starts) * kSlotVectors + threadIdx.x;
    };
    float4* own = slot(blockIdx.x);
#pragma unroll
    for (int v = 0; v < kTiles * kKeptN8; ++v) {
      const float (&sum)[4] = kept[v / kKeptN8][v % kKeptN8];
      own[v * kGemmThreads] = {sum[0], sum[1], sum[2], sum[3]};
    }
    // A block is the first of at most one shared column, so its number names the counter.
    if (!arrive_last(params.counters + first_block, last_block - first_block + 1, shared)) return;
#pragma unroll
    for (int v = 0; v < kTiles * kKeptN8; ++v) {
      float (&sum)[4] = kept[v / kKeptN8][v % kKeptN8];
#pragma unroll
      for (int c = 0; c < 4; ++c) sum[c] = 0.0f;
    }
    for (int block = first_block; block <= last_block; ++block) {
      const float4* sums = slot(block);
#pragma unroll
      for (int v = 0; v < kTiles * kKeptN8; ++v) {
        const float4 p = __ldcg(sums + v * kGemmThreads);
        float (&sum)[4] = kept[v / kKeptN8][v % kKeptN8];
        sum[0] += p.x;
        sum[1] += p.y;
        sum[2] += p.z;
        sum[3] += p.w;
      }
    }
  } else {
    __syncthreads();  // the pipeline of the next column overwrites what the exchange still reads
  }

  const bool upper = threadIdx.x >= kGemmThreads / 2;
#pragma unroll
  for (int i = 0; i < kKeptN8; ++i) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int row = part.first_row + (i + upper * kKeptN8) * 8 + threadIdx.x % 4 * 2 + e;
      if (row >= params.m || first_feature >= params.n) continue;
      float sums[kLaneFeatures];
#pragma unroll
      for (int f = 0; f < kLaneFeatures; ++f) sums[f] = kept[f / 2][i][f % 2 * 2 + e];
      store_features<Activation>(params, row, first_feature, sums);
    }
  }
}

}  // namespace mmq::cuda
