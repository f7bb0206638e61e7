// SPDX-License-Identifier: Apache-2.0
// packed_gemm in plain loops: the fallback, and the readable version of what the vector kernels
// compute. See PackedGemmArgs for the formula and layout.h for the operands.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/layout.h"
#include "cpu/parallel.h"
#include "grid.h"
#include "packing.h"

namespace mmq::cpu::scalar {
namespace {

// The activations of one call in int8 mode: x = quantized * scale per row and group.
struct QuantizedRows {
  std::vector<int8_t> codes;  // [m, k]
  std::vector<float> scales;  // [m, groups]
};

// Round half to even; the largest magnitude of a group becomes 127. A group of zeros has scale 0,
// one with a NaN or an infinity has scale NaN and codes 0, so that NaN comes out.
QuantizedRows quantize_rows(const PackedGemmArgs& a, int64_t groups) {
  QuantizedRows q{std::vector<int8_t>(a.m * a.k), std::vector<float>(a.m * groups)};
  for (int64_t row = 0; row < a.m; ++row) {
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t begin = group * a.group_size;
      const int64_t end = std::min(begin + a.group_size, a.k);
      const float* x = a.x + row * a.k;
      float largest = 0;
      bool finite = true;
      for (int64_t j = begin; j < end; ++j) {
        finite = finite && std::isfinite(x[j]);
        largest = std::max(largest, std::fabs(x[j]));
      }
      float& scale = q.scales[row * groups + group];
      if (!finite) {
        scale = std::numeric_limits<float>::quiet_NaN();
      } else if (largest > 0) {
        // The smallest normal number keeps x / scale below 128 for subnormal activations.
        scale = std::max(largest / 127.f, std::numeric_limits<float>::min());
        for (int64_t j = begin; j < end; ++j)
          q.codes[row * a.k + j] = static_cast<int8_t>(std::nearbyint(x[j] / scale));
      }
    }
  }
  return q;
}

constexpr int kAffineFloats = 2 * kTileRows;  // scales and minima of one tile and group

// The affine of a tile as fp32 scales and minima, [group][scale, minimum][16].
void widen_affine(const PackedGemmArgs& a, int64_t tile, float* affine) {
  const int64_t groups = group_count(a.k, a.group_size), bytes = affine_bytes(a.affine_kind);
  if (a.affine_kind == AffineKind::kScaleMin32) {
    const int64_t floats = groups * kAffineFloats;
    std::copy_n(static_cast<const float*>(a.affine) + tile * floats, floats, affine);
    return;
  }
  const uint8_t* from = static_cast<const uint8_t*>(a.affine) + tile * groups * bytes;
  for (int64_t group = 0; group < groups; ++group, from += bytes, affine += kAffineFloats) {
    uint16_t stored[2 * kTileRows];
    std::memcpy(stored, from, bytes);
    for (int row = 0; row < kTileRows; ++row) {
      const float zero = a.affine_kind == AffineKind::kScaleZero16
                             ? widen(stored[kTileRows + row], a.scale_type)
                             : static_cast<float>(1 << (a.bits - 1));
      affine[row] = widen(stored[row], a.scale_type);
      affine[kTileRows + row] = -zero * affine[row];
    }
  }
}

// sum_k x * (code * scale + minimum) of one activation row and the rows of a tile.
void exact_row(const PackedGemmArgs& a, const float* x, const uint8_t* codes, const float* affine,
               float* sums) {
  for (int64_t begin = 0; begin < a.k; begin += kChainCols) {
    const int64_t end = std::min(begin + kChainCols, a.k);
    float partial[kTileRows] = {};
    for (int64_t j = begin; j < end; ++j) {
      const float* grid = affine + j / a.group_size * kAffineFloats;
      const uint8_t* quad = codes + j / kQuadCols * kQuadBytes + j % kQuadCols;
      for (int row = 0; row < kTileRows; ++row)
        partial[row] += x[j] * (quad[row * kQuadCols] * grid[row] + grid[kTileRows + row]);
    }
    for (int row = 0; row < kTileRows; ++row) sums[row] += partial[row];
  }
}

// sum_groups x_scale * (scale * sum(code * x_code) + minimum * sum(x_code)).
void int8_row(const PackedGemmArgs& a, const int8_t* x, const float* x_scales, const uint8_t* codes,
              const float* affine, float* sums) {
  for (int64_t begin = 0, group = 0; begin < a.k; begin += a.group_size, ++group) {
    const int64_t end = std::min(begin + a.group_size, a.k);
    int64_t products[kTileRows] = {}, x_sum = 0;
    for (int64_t j = begin; j < end; ++j) {
      const uint8_t* quad = codes + j / kQuadCols * kQuadBytes + j % kQuadCols;
      for (int row = 0; row < kTileRows; ++row) products[row] += quad[row * kQuadCols] * x[j];
      x_sum += x[j];
    }
    const float* grid = affine + group * kAffineFloats;
    for (int row = 0; row < kTileRows; ++row)
      sums[row] += x_scales[group] * (static_cast<float>(products[row]) * grid[row] +
                                      static_cast<float>(x_sum) * grid[kTileRows + row]);
  }
}

}  // namespace

bool packed_gemm_bfloat16(const PackedGemmArgs&) { return false; }

void packed_gemm(const PackedGemmArgs& a) {
  const int64_t groups = group_count(a.k, a.group_size);
  const bool exact = a.mode == GemmMode::kExact;
  const QuantizedRows x = exact ? QuantizedRows{} : quantize_rows(a, groups);
  const int64_t tile_macs = std::max<int64_t>(a.m * kTileRows * a.k, 1);
  parallel_for(tile_count(a.n), ceil_div(kMinTaskMacs, tile_macs), [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> codes(block_count(a.k) * kBlockCodes);
    std::vector<float> affine(groups * kAffineFloats);
    for (int64_t tile = begin; tile < end; ++tile) {
      for (int64_t block = 0; block < block_count(a.k); ++block)
        unpack_block(a.tiles + tile * tile_bytes(a.k, a.bits) + block * block_bytes(a.bits), a.bits,
                     codes.data() + block * kBlockCodes);
      widen_affine(a, tile, affine.data());
      const int64_t rows = std::min<int64_t>(kTileRows, a.n - tile * kTileRows);
      for (int64_t i = 0; i < a.m; ++i) {
        float sums[kTileRows] = {};
        if (exact)
          exact_row(a, a.x + i * a.k, codes.data(), affine.data(), sums);
        else
          int8_row(a, x.codes.data() + i * a.k, x.scales.data() + i * groups, codes.data(),
                   affine.data(), sums);
        for (int64_t row = 0; row < rows; ++row) {
          const int64_t out = tile * kTileRows + row;
          a.y[i * a.n + out] = sums[row] + (a.bias ? a.bias[out] : 0.f);
        }
      }
    }
  });
}

}  // namespace mmq::cpu::scalar
