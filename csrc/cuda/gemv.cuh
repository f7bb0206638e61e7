// SPDX-License-Identifier: Apache-2.0
// packed_gemm for at most 8 rows: weights stream from memory straight into registers, once.
//
// A thread block owns a strip of 64 features and a slice of k; its 8 warps take the slice's blocks
// in turn, 16-byte loads of one warp reading 512 * kBits consecutive bytes. The activations of the
// slice lie in shared memory. Eight rows are one mma operand, so the tensor cores do the products:
// per 16 bytes of 4-bit weights 36 instructions decode and 4 multiply, where fp32 fma would need 32
// conversions and 32 fma *per row* and be bound by instructions, not by memory. Sums are fp32.
//
// Slices of a strip write their sums to the workspace; the last to arrive adds them in order.
#pragma once

#include <cstdint>

#include "gemm_block.cuh"
#include "gemm_reduce.cuh"

namespace mmq::cuda {

constexpr int kGemvSums = kTiles * 4;             // per lane
constexpr int kGemvOutputs = kGemvSums * kLanes;  // 8 rows of 64 features
// Transposed results: a row of 64 features takes 65 words, and features from 32 on move up by one,
// so that lanes of one store (8 apart, rows 2 apart) hit different banks.
constexpr int kGemvRowWords = kBlockN + 1;

MMQ_HOST_DEVICE constexpr int gemv_shared_bytes(int m, int slice_blocks) {
  const int x = m * slice_blocks * kBlockK * 2 + kLanes * 4;  // and a line of zeros
  const int sums = kGemvWarps * kGemvOutputs * 4;
  return x > sums ? x : sums;
}

// The results of one strip from lane order (thread: two sums of one lane) to rows, and the store.
template <class Activation>
__device__ inline void store_strip(const GemmParams& params, int strip, const float (&sums)[2],
                                   float* transposed) {
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int sum = warp + i * kGemvWarps;  // tile * 4 + c
    const int feature = lane / 4 * kLaneFeatures + sum / 4 * 2 + sum % 4 / 2;
    const int row = lane % 4 * 2 + sum % 2;
    transposed[row * kGemvRowWords + feature + feature / 32] = sums[i];
  }
  __syncthreads();
  const int in_strip = threadIdx.x % kBlockN;
  const int feature = strip * kBlockN + in_strip;
  if (feature >= params.n) return;
  const uint16_t* bias = static_cast<const uint16_t*>(params.bias);
  const float added = bias == nullptr ? 0.0f : Activation::unpack(bias[feature]).x;
  uint16_t* y = static_cast<uint16_t*>(params.y);
  for (int row = threadIdx.x / kBlockN; row < params.m; row += kGemvThreads / kBlockN) {
    const float sum = transposed[row * kGemvRowWords + in_strip + in_strip / 32];
    y[static_cast<int64_t>(row) * params.n + feature] =
        static_cast<uint16_t>(Activation::pack(sum + added, 0.0f));
  }
}

// Two blocks to a multiprocessor, as the launcher plans: at most 128 registers.
template <int kBits, class Activation>
__global__ void __launch_bounds__(kGemvThreads, 2) packed_gemv(const GemmParams params) {
  extern __shared__ __align__(128) unsigned char shared[];
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int strip = blockIdx.x;
  const int first_feature = strip * kBlockN + lane / 4 * kLaneFeatures;
  const int slice_begin = blockIdx.y * params.slice_blocks;
  const int slice_end = min(slice_begin + params.slice_blocks, params.k_blocks);

  // The first weights are on their way before anything else happens.
  uint4 next[kBits];
  const uint4* source =
      params.tiles +
      (static_cast<int64_t>(strip) * params.k_blocks + slice_begin + warp) * (kBits * kLanes) +
      lane;
  auto load_weights = [&](int block) {
    if (block >= slice_end) return;
#pragma unroll
    for (int v = 0; v < kBits; ++v) next[v] = load_once(source + v * kLanes);
    source += kGemvWarps * kBits * kLanes;
  };
  load_weights(slice_begin + warp);

  // Activations: 16-byte chunks, chunk c of row r at c ^ r as in the tensor-core kernel. Rows that
  // do not exist read a line of zeros at the same place of the line, and so without conflicts.
  const int row_chunks = params.slice_blocks * (kBlockK / 8);
  const uint32_t x_base = shared_address(shared);
  const uint32_t zeros = x_base + params.m * row_chunks * 16;
  auto swizzle = [](int chunk, int row) {
#ifdef MMQ_MUTATE_NO_SWIZZLE
    (void)row;
    return chunk;
#else
    return chunk ^ row;
#endif
  };
  const int first_col = slice_begin * kBlockK;
  for (int row = 0; row < params.m; ++row) {
    const uint16_t* x = static_cast<const uint16_t*>(params.x) + row * params.x_stride + first_col;
    for (int chunk = threadIdx.x; chunk < row_chunks; chunk += kGemvThreads) {
      const int valid = first_col + chunk * 8 < params.x_cols ? 16 : 0;
      cp_async_zfill(x_base + (row * row_chunks + swizzle(chunk, row)) * 16, x + chunk * 8, valid);
    }
  }
  if (threadIdx.x < kLanes) {
    reinterpret_cast<uint32_t*>(shared)[params.m * row_chunks * 4 + threadIdx.x] = 0;
  }
  cp_async_commit();
  cp_async_wait<0>();
#ifndef MMQ_MUTATE_NO_BARRIER
  __syncthreads();
#endif

  // Lanes 0..7 address the rows of a step's first 8 columns, 8..15 those of the other 8.
  const int x_row = lane % 8;
  const bool row_exists = x_row < params.m;
  const uint32_t x_read = row_exists ? x_base + x_row * row_chunks * 16 : zeros;
  const int half = lane / 8 % 2;

  float totals[kTiles][1][4];
#pragma unroll
  for (int i = 0; i < kGemvSums; ++i) totals[i / 4][0][i % 4] = initial_sum();
  for (int block = slice_begin + warp; block < slice_end; block += kGemvWarps) {
    uint4 w[kBits];
#pragma unroll
    for (int v = 0; v < kBits; ++v) w[v] = next[v];
    load_weights(block + kGemvWarps);
    const int first_chunk = row_exists ? (block - slice_begin) * (kBlockK / 8) : 0;
    multiply_block<kBits, Activation, 1>(
        params, block, first_feature, 0, [&](int vector) { return w[vector]; },
        [&](int step, uint32_t (&x)[1][2]) {
          ldmatrix_x2(x_read + swizzle(first_chunk + step * 2 + half, x_row) * 16, x[0]);
        },
        totals);
  }

  // The sum over warps, in their order; thread: sums `warp` and `warp + 8` of its lane.
  float* sums = reinterpret_cast<float*>(shared);
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kGemvSums; ++i) {
    sums[(warp * kGemvSums + i) * kLanes + lane] = totals[i / 4][0][i % 4];
  }
  __syncthreads();
  float result[2] = {0.0f, 0.0f};
#pragma unroll
  for (int from = 0; from < kGemvWarps; ++from) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      result[i] += sums[(from * kGemvSums + warp + i * kGemvWarps) * kLanes + lane];
    }
  }

  if (params.slices > 1) {
    float* parts =
        params.partials + static_cast<int64_t>(strip) * params.slices * kGemvOutputs + threadIdx.x;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      parts[blockIdx.y * kGemvOutputs + i * kGemvThreads] = result[i];
    }
    if (!arrive_last(params.counters + strip, params.slices, shared)) return;
    result[0] = result[1] = 0.0f;
    for (int slice = 0; slice < params.slices; ++slice) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        result[i] += __ldcg(parts + slice * kGemvOutputs + i * kGemvThreads);
      }
    }
  } else {
    __syncthreads();  // the transposed results overwrite the sums
  }
  store_strip<Activation>(params, strip, result, sums);
}

}  // namespace mmq::cuda
