// SPDX-License-Identifier: Apache-2.0
// What both GEMM paths do with one block of 64 features x 64 columns: decode, multiply on the
// tensor cores, scale into fp32 totals; and the scales and minima themselves.
#pragma once

#include <cstdint>
#include <utility>

#include "dequant.cuh"
#include "gemm.h"

namespace mmq::cuda {

// A lane's share of 64 features x 8 * kN8 rows: totals[tile][n8][c] is feature 8g + 2 tile + c / 2
// and row 8 n8 + 2t + c % 2.
template <int kN8>
using Totals = float[kTiles][kN8][4];

constexpr int kLaneFeatures = 2 * kTiles;

// The group of k step kStep of a block: the quotient by the steps of a group, by multiplication.
// Exact while step * steps_per_group < 2^31, which the launcher sees to.
template <int kStep>
__device__ inline int group_of_step(const GemmParams& params, int k_block) {
  const auto step = static_cast<uint32_t>(k_block * kSteps + kStep);
  const int group = static_cast<int>(__umulhi(2 * step, params.group_magic));
  if constexpr (kStep == 0) return group;  // a block begins before k
  return min(group, params.last_group);    // steps past k
}

// f16 scales alone, the usual kind: a lane's 8 features by one 16-byte load, unpacked by tile.
class PlainScales {
 public:
  static constexpr bool kHasMinima = false;

  __device__ PlainScales(const GemmParams& params, int group, int first_feature)
      : packed_(__ldg(static_cast<const uint4*>(params.affine) +
                      static_cast<uint32_t>(group * params.strips * (kBlockN / kLaneFeatures) +
                                            first_feature / kLaneFeatures))) {}

  // Of features 2 * tile and 2 * tile + 1.
  __device__ float2 of_tile(int tile) const {
    const uint32_t pairs[kTiles] = {packed_.x, packed_.y, packed_.z, packed_.w};
    return unpack_f16x2(pairs[tile]);
  }

 private:
  uint4 packed_;
};

__device__ inline float2 unpack_scales(const GemmParams& params, uint32_t pair) {
  return params.scale_is_bfloat ? unpack_bf16x2(pair) : unpack_f16x2(pair);
}

// Scales of any kind, read tile by tile: registers are scarce and the lines stay in L1. The
// branches are uniform: a launch has one kind.
class AnyScales {
 public:
  static constexpr bool kHasMinima = true;

  __device__ AnyScales(const GemmParams& params, int group, int first_feature)
      : params_(params),
        at_((static_cast<int64_t>(group) * params.strips * kBlockN + first_feature) / 2) {}

  __device__ float2 of_tile(int tile) const {
    if (params_.affine_kind == AffineKind::kScaleMin32) {
      const float4 v = __ldg(static_cast<const float4*>(params_.affine) + at_ + tile);
      return {v.x, v.z};
    }
    if (params_.affine_kind == AffineKind::kScaleZero16) {
      const uint2 v = __ldg(static_cast<const uint2*>(params_.affine) + at_ + tile);
      return unpack_scales(params_, __byte_perm(v.x, v.y, 0x5410));  // the two low halves
    }
    return unpack_scales(params_, __ldg(static_cast<const uint32_t*>(params_.affine) + at_ + tile));
  }

 private:
  const GemmParams& params_;
  int64_t at_;  // in pairs of features
};

// m' of w = s * (q - mid) + m' for the same features: (mid - z) * s, or min + mid * s.
__device__ inline void load_minima(const GemmParams& params, int group, int first_feature,
                                   float mid, float (&minima)[kLaneFeatures]) {
  const int64_t at = static_cast<int64_t>(group) * params.strips * kBlockN + first_feature;
  if (params.affine_kind == AffineKind::kScaleZero16) {
    const uint4* source = reinterpret_cast<const uint4*>(params.affine) + at / 4;
#pragma unroll
    for (int p = 0; p < 2; ++p) {
      const uint4 v = __ldg(source + p);
      const uint32_t pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 scale_zero = unpack_scales(params, pairs[i]);
        minima[4 * p + i] = (mid - scale_zero.y) * scale_zero.x;
      }
    }
  } else {
    const float4* source = reinterpret_cast<const float4*>(params.affine) + at / 2;
#pragma unroll
    for (int p = 0; p < 4; ++p) {
      const float4 v = __ldg(source + p);
      minima[2 * p] = fmaf(mid, v.x, v.y);
      minima[2 * p + 1] = fmaf(mid, v.z, v.w);
    }
  }
}

// The words of one tile, from the vectors of the block that hold them. A vector of a narrow plane
// serves several tiles: it is loaded at the first of them and kept.
template <int kBits, class LoadVector>
__device__ inline void tile_words(const LoadVector& load_vector, int tile, uint32_t (&narrow)[8],
                                  uint32_t (&words)[kBits]) {
#pragma unroll
  for (int index = 0; index < plane_count(kBits); ++index) {
    const Plane plane = plane_of(kBits, index);
#pragma unroll
    for (int word = 0; word < plane.width; ++word) {
      const int linear = tile * plane.width + word;
      const int element = linear % kVectorWords;
      uint32_t* kept = narrow + (plane.width == 1 ? 4 : 0);
      if (plane.width >= kVectorWords) {
        if (element != 0) continue;
        const uint4 v = load_vector(plane.low + linear / kVectorWords);
        words[plane.low + word] = v.x;
        words[plane.low + word + 1] = v.y;
        words[plane.low + word + 2] = v.z;
        words[plane.low + word + 3] = v.w;
      } else {
        if (element == 0) {
          const uint4 v = load_vector(plane.low + linear / kVectorWords);
          kept[0] = v.x;
          kept[1] = v.y;
          kept[2] = v.z;
          kept[3] = v.w;
        }
        words[plane.low + word] = kept[element];
      }
    }
  }
}

// totals += m' * (sum of the run's activations); first_row is the first row of the tile.
template <int kBits, int kN8>
__device__ inline void add_minima(const GemmParams& params, int group, int run, int first_feature,
                                  int first_row, Totals<kN8>& totals) {
  float minima[kLaneFeatures];
  load_minima(params, group, first_feature, static_cast<float>(mid_code<kBits>()), minima);
  const int t = threadIdx.x % 4;
  const float* sums =
      params.row_sums + static_cast<int64_t>(run) * params.row_sum_stride + first_row + 2 * t;
#pragma unroll
  for (int n8 = 0; n8 < kN8; ++n8) {
    const float2 sum = __ldg(reinterpret_cast<const float2*>(sums + 8 * n8));
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      float (&total)[4] = totals[tile][n8];
      total[0] = fmaf(minima[2 * tile], sum.x, total[0]);
      total[1] = fmaf(minima[2 * tile], sum.y, total[1]);
      total[2] = fmaf(minima[2 * tile + 1], sum.x, total[2]);
      total[3] = fmaf(minima[2 * tile + 1], sum.y, total[3]);
    }
  }
}

// The operands of a tile for the kRun k steps from kFirstStep on.
template <int kBits, class Activation, int kFirstStep, int kRun, int... kIndices>
__device__ inline void decode_steps(const uint32_t (&words)[kBits], uint32_t (&w)[kRun][kRegisters],
                                    std::integer_sequence<int, kIndices...>) {
  ((w[kIndices / kRegisters][kIndices % kRegisters] =
        decode<kBits, Activation, kIndices % kRegisters, kFirstStep + kIndices / kRegisters>(
            words)),
   ...);
}

// The operands of four steps and the totals of 64 rows fill the registers. From sm_100 on ptxas
// needs some more and would spill: there a run of four steps is computed as two, at 64 rows.
#if __CUDA_ARCH__ >= 1000
constexpr bool kLongRunsOf64Rows = false;
#else
constexpr bool kLongRunsOf64Rows = true;
#endif

// How many n8 operands are summed at a time: with two warps to a scheduler, two chains each keep
// the tensor cores busy, and more do not fit into the registers beside the totals of 64 rows;
// beside the operands of four steps and of three planes (7 bits), only one does.
MMQ_HOST_DEVICE constexpr int chains_together(int bits, int n8) {
  return n8 == 1 || (n8 == 8 && plane_count(bits) == 3 && kLongRunsOf64Rows) ? 1 : 2;
}

// Adds the products of kRun k steps, which share a scale, from kFirstStep of the block on: integer
// sums on the tensor cores, multiplied by the scale in fp32.
template <int kBits, class Activation, class Scales, int kN8, int kRun, int kFirstStep,
          class LoadVector, class LoadX>
__device__ inline void multiply_run(const GemmParams& params, int k_block, int first_feature,
                                    int first_row, const LoadVector& load_vector,
                                    const LoadX& load_x, Totals<kN8>& totals) {
  constexpr int kTogether = chains_together(kBits, kN8);
  const int group = group_of_step<kFirstStep>(params, k_block);
  const Scales scales(params, group, first_feature);
  uint32_t x[kRun][kN8][2];
#pragma unroll
  for (int j = 0; j < kRun; ++j) load_x(kFirstStep + j, x[j]);
  uint32_t narrow[8];
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    uint32_t words[kBits];
    tile_words<kBits>(load_vector, tile, narrow, words);
    uint32_t w[kRun][kRegisters];
    decode_steps<kBits, Activation, kFirstStep>(
        words, w, std::make_integer_sequence<int, kRun * kRegisters>());
    const float2 scale = scales.of_tile(tile);
#pragma unroll
    for (int first = 0; first < kN8; first += kTogether) {
      float sums[kTogether][4];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        Activation::mma_first(sums[i], w[0], x[0][first + i]);
      }
#pragma unroll
      for (int j = 1; j < kRun; ++j) {
#pragma unroll
        for (int i = 0; i < kTogether; ++i) Activation::mma(sums[i], w[j], x[j][first + i]);
      }
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          float& total = totals[tile][first + i][c];
          total = fmaf(sums[i][c], c < 2 ? scale.x : scale.y, total);
        }
      }
    }
  }
  // The launch's run, and so the sum of activations, may be twice as long; then it is the block.
  if constexpr (Scales::kHasMinima) {
    if (params.row_sums != nullptr && (params.run_steps == kRun || kFirstStep + kRun == kSteps)) {
      const int run =
          params.run_steps == kRun ? k_block * (kSteps / kRun) + kFirstStep / kRun : k_block;
      add_minima<kBits, kN8>(params, group, run, first_feature, first_row, totals);
    }
  }
}

template <int kBits, class Activation, class Scales, int kN8, int kRun, class LoadVector,
          class LoadX, int... kRuns>
__device__ inline void multiply_runs(const GemmParams& params, int k_block, int first_feature,
                                     int first_row, const LoadVector& load_vector,
                                     const LoadX& load_x, Totals<kN8>& totals,
                                     std::integer_sequence<int, kRuns...>) {
  (multiply_run<kBits, Activation, Scales, kN8, kRun, kRuns * kRun>(
       params, k_block, first_feature, first_row, load_vector, load_x, totals),
   ...);
}

// Adds the products of one block and 8 * kN8 rows to the totals. load_vector(v) gives the lane's
// vector v of the block, load_x(step, x) the activation operands of a step. Uniform branches choose
// one of four bodies: by the run length of the launch, and for the longest the usual scales apart.
template <int kBits, class Activation, int kN8, class LoadVector, class LoadX>
__device__ inline void multiply_block(const GemmParams& params, int k_block, int first_feature,
                                      int first_row, const LoadVector& load_vector,
                                      const LoadX& load_x, Totals<kN8>& totals) {
  if constexpr (kN8 < 8 || kLongRunsOf64Rows) {
    const auto one_run = std::make_integer_sequence<int, 1>();
    if (params.plain_runs) {
      multiply_runs<kBits, Activation, PlainScales, kN8, kSteps>(
          params, k_block, first_feature, first_row, load_vector, load_x, totals, one_run);
      return;
    }
    if (params.run_steps == kSteps) {
      multiply_runs<kBits, Activation, AnyScales, kN8, kSteps>(
          params, k_block, first_feature, first_row, load_vector, load_x, totals, one_run);
      return;
    }
  }
  if (params.run_steps >= 2) {
    multiply_runs<kBits, Activation, AnyScales, kN8, 2>(
        params, k_block, first_feature, first_row, load_vector, load_x, totals,
        std::make_integer_sequence<int, kSteps / 2>());
  } else {
    multiply_runs<kBits, Activation, AnyScales, kN8, 1>(params, k_block, first_feature, first_row,
                                                        load_vector, load_x, totals,
                                                        std::make_integer_sequence<int, kSteps>());
  }
}

// Bias added and rounded once: the 8 neighbouring results of a lane in one row. `sums` are in
// feature order; features past n are not stored.
template <class Activation>
__device__ inline void store_features(const GemmParams& params, int row, int first_feature,
                                      const float (&sums)[kLaneFeatures]) {
  uint16_t* y = static_cast<uint16_t*>(params.y) + static_cast<int64_t>(row) * params.n;
  const uint16_t* bias = static_cast<const uint16_t*>(params.bias);
  if (params.wide_stores && first_feature + kLaneFeatures <= params.n) {
    uint4 added = {0, 0, 0, 0};
    if (bias != nullptr) added = __ldg(reinterpret_cast<const uint4*>(bias + first_feature));
    const uint32_t pairs[4] = {added.x, added.y, added.z, added.w};
    uint32_t packed[4];
#pragma unroll
    for (int p = 0; p < 4; ++p) {
      const float2 b = Activation::unpack(pairs[p]);
      packed[p] = Activation::pack(sums[2 * p] + b.x, sums[2 * p + 1] + b.y);
    }
    *reinterpret_cast<uint4*>(y + first_feature) = {packed[0], packed[1], packed[2], packed[3]};
    return;
  }
#pragma unroll
  for (int i = 0; i < kLaneFeatures; ++i) {
    if (first_feature + i < params.n) {
      const float b = bias == nullptr ? 0.0f : Activation::unpack(bias[first_feature + i]).x;
      y[first_feature + i] = static_cast<uint16_t>(Activation::pack(sums[i] + b, 0.0f));
    }
  }
}

}  // namespace mmq::cuda
