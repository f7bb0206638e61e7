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

// The quotient step / steps_per_group by multiplication; exact while steps^2 < 2^32.
__device__ inline int group_of_step(const GemmParams& params, int step) {
  const int group = static_cast<int>(static_cast<uint64_t>(step) * params.group_magic >> 32);
  return min(group, params.last_group);  // steps past k
}

__device__ inline float2 unpack_scales(const GemmParams& params, uint32_t pair) {
  return params.scale_is_bfloat ? unpack_bf16x2(pair) : unpack_f16x2(pair);
}

// The scales of a lane's 8 features in one group. Scales alone are read by one 16-byte load and
// kept packed until a tile needs its two; beside zeros or minima they are read tile by tile,
// because registers are scarce and the lines stay in L1. The branches are uniform: a launch has one
// kind.
class LaneScales {
 public:
  __device__ LaneScales(const GemmParams& params, int group, int first_feature)
      : params_(params),
        at_(static_cast<int64_t>(group) * params.strips * kBlockN + first_feature) {
    if (params.affine_kind == AffineKind::kScale16) {
      packed_ = __ldg(reinterpret_cast<const uint4*>(params.affine) + at_ / kLaneFeatures);
    }
  }

  // Of features 2 * tile and 2 * tile + 1.
  __device__ float2 of_tile(int tile) const {
    if (params_.affine_kind == AffineKind::kScale16) {
      const uint32_t pairs[kTiles] = {packed_.x, packed_.y, packed_.z, packed_.w};
      return unpack_scales(params_, pairs[tile]);
    }
    if (params_.affine_kind == AffineKind::kScaleZero16) {
      const uint2 v = __ldg(reinterpret_cast<const uint2*>(params_.affine) + at_ / 2 + tile);
      return {unpack_scales(params_, v.x).x, unpack_scales(params_, v.y).x};
    }
    const float4 v = __ldg(reinterpret_cast<const float4*>(params_.affine) + at_ / 2 + tile);
    return {v.x, v.z};
  }

 private:
  const GemmParams& params_;
  int64_t at_;
  uint4 packed_ = {0, 0, 0, 0};
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
__device__ inline void add_minima(const GemmParams& params, int step, int first_feature,
                                  int first_row, Totals<kN8>& totals) {
  float minima[kLaneFeatures];
  load_minima(params, group_of_step(params, step), first_feature,
              static_cast<float>(mid_code<kBits>()), minima);
  const int t = threadIdx.x % 4;
  const float* sums = params.row_sums +
                      static_cast<int64_t>(step / params.run_steps) * params.row_sum_stride +
                      first_row + 2 * t;
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

// How many n8 operands are summed at a time: more chains hide no more latency, and 8 of them beside
// the totals and operands of 64 rows do not fit into the registers.
MMQ_HOST_DEVICE constexpr int chains_together(int n8) { return n8 < 8 ? n8 : 1; }

// Adds the products of kRun k steps, which share a scale, from kFirstStep of the block on: integer
// sums on the tensor cores, multiplied by the scale in fp32.
template <int kBits, class Activation, int kN8, int kRun, int kFirstStep, class LoadVector,
          class LoadX>
__device__ inline void multiply_run(const GemmParams& params, int k_block, int first_feature,
                                    int first_row, const LoadVector& load_vector,
                                    const LoadX& load_x, Totals<kN8>& totals) {
  constexpr int kTogether = chains_together(kN8);
  const LaneScales scales(params, group_of_step(params, k_block * kSteps + kFirstStep),
                          first_feature);
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
      const float2 scale = scales.of_tile(tile);
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
  if (params.row_sums != nullptr) {
    add_minima<kBits, kN8>(params, k_block * kSteps + kFirstStep, first_feature, first_row, totals);
  }
}

template <int kBits, class Activation, int kN8, int kRun, class LoadVector, class LoadX,
          int... kRuns>
__device__ inline void multiply_runs(const GemmParams& params, int k_block, int first_feature,
                                     int first_row, const LoadVector& load_vector,
                                     const LoadX& load_x, Totals<kN8>& totals,
                                     std::integer_sequence<int, kRuns...>) {
  (multiply_run<kBits, Activation, kN8, kRun, kRuns * kRun>(params, k_block, first_feature,
                                                            first_row, load_vector, load_x, totals),
   ...);
}

// Adds the products of one block and 8 * kN8 rows to the totals. load_vector(v) gives the lane's
// vector v of the block, load_x(step, x) the activation operands of a step. The run length of the
// launch chooses one of three bodies by a uniform branch.
template <int kBits, class Activation, int kN8, class LoadVector, class LoadX>
__device__ inline void multiply_block(const GemmParams& params, int k_block, int first_feature,
                                      int first_row, const LoadVector& load_vector,
                                      const LoadX& load_x, Totals<kN8>& totals) {
  if (params.run_steps == 4) {
    multiply_runs<kBits, Activation, kN8, 4>(params, k_block, first_feature, first_row, load_vector,
                                             load_x, totals, std::make_integer_sequence<int, 1>());
  } else if (params.run_steps == 2) {
    multiply_runs<kBits, Activation, kN8, 2>(params, k_block, first_feature, first_row, load_vector,
                                             load_x, totals, std::make_integer_sequence<int, 2>());
  } else {
    multiply_runs<kBits, Activation, kN8, 1>(params, k_block, first_feature, first_row, load_vector,
                                             load_x, totals, std::make_integer_sequence<int, 4>());
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
