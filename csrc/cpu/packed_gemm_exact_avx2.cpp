// SPDX-License-Identifier: Apache-2.0
// packed_gemm with fp32 activations on AVX2.
//
// Few rows (the weights are read once, from memory): each tile is decoded in registers and summed
// as scale * sum(code * x) + minimum * sum(x) per group. Rounding is relative to
// |x| . (code * |scale| + |minimum|), not to |x| . |w|.
//
// Many rows (arithmetic counts): a panel of weights is dequantized into the L2 cache, [k][8 rows]
// per tile, and multiplied by a register-blocked kernel, 6 rows of x by 2 tiles = 12 accumulators.
#if defined(__x86_64__)

#include "cpu/dense_panel_avx2.h"
#include "cpu/kernels.h"
#include "cpu/layout.h"
#include "cpu/packed_gemm_avx2.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/target_avx2.h"

MMQ_AVX2_BEGIN

namespace mmq::cpu::avx2 {
namespace {

// --- few rows ---

constexpr int kFewRows = 4;  // rows of x per pass over a tile
constexpr int kChainBlocks = kChainCols / kBlockCols;

struct FewRowsOperands {
  const uint8_t* tile;
  TileAffine affine;
  const float* x;       // [k padded to blocks][rows], scaled by kLaneScale
  const float* x_sums;  // [group][rows]
  int64_t blocks, groups, group_blocks;
};

// A quad's dword is masked, not shifted, to get the code of lane 1 or 2, which then comes out
// 2^8 or 2^16 too large; x carries the inverse. Exact unless |x| < 2^-110.
alignas(16) constexpr float kLaneScale[kQuadCols] = {1.f, 1.f / 256.f, 1.f / 65536.f, 1.f};

template <int kLane>
inline __m256 lane_codes(__m256i quad) {
  if constexpr (kLane == 3) return _mm256_cvtepi32_ps(_mm256_srli_epi32(quad, 24));
  return _mm256_cvtepi32_ps(_mm256_and_si256(quad, _mm256_set1_epi32(0xff << (8 * kLane))));
}

template <int kRows, int kChains, int kLane>
inline void multiply_lane(__m256i quad, int chain, const float* x, __m256 (*sums)[kChains]) {
  const __m256 codes = lane_codes<kLane>(quad);
#pragma GCC unroll 4
  for (int row = 0; row < kRows; ++row)
    sums[row][chain % kChains] = _mm256_fmadd_ps(
        codes, _mm256_broadcast_ss(x + kLane * kRows + row), sums[row][chain % kChains]);
}

template <int kBits, int kRows>
void few_rows(const FewRowsOperands& a, __m256* out) {
  // 8 chains of additions in flight hide the latency of the multiply-add.
  constexpr int kChains = kRows == 1 ? 8 : kRows == 2 ? 4 : 2;
  const uint8_t* block = a.tile;
  const float* x = a.x;
#pragma GCC unroll 4
  for (int row = 0; row < kRows; ++row) out[row] = _mm256_setzero_ps();
  int64_t left = a.blocks;
  for (int64_t group = 0; group < a.groups; ++group) {
    const Grid grid = load_grid(a.affine, group);
    for (int64_t todo = smaller(a.group_blocks, left); todo > 0;) {
      const int64_t count = smaller(todo, kChainBlocks);
      todo -= count;
      left -= count;
      __m256 sums[kRows][kChains] = {};
      for (int64_t i = 0; i < count; ++i) {
        __m256i quads[kBlockQuads];
        decode_block<kBits>(block, quads);
#pragma GCC unroll 8
        for (int quad = 0; quad < kBlockQuads; ++quad) {
          const float* x_quad = x + quad * kQuadCols * kRows;
          multiply_lane<kRows, kChains, 0>(quads[quad], quad * 4, x_quad, sums);
          multiply_lane<kRows, kChains, 1>(quads[quad], quad * 4 + 1, x_quad, sums);
          multiply_lane<kRows, kChains, 2>(quads[quad], quad * 4 + 2, x_quad, sums);
          multiply_lane<kRows, kChains, 3>(quads[quad], quad * 4 + 3, x_quad, sums);
        }
        block += block_bytes(kBits);
        x += kBlockCols * kRows;
      }
#pragma GCC unroll 4
      for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 8
        for (int chain = 1; chain < kChains; ++chain)
          sums[row][0] = _mm256_add_ps(sums[row][0], sums[row][chain]);
        out[row] = _mm256_fmadd_ps(sums[row][0], grid.scale, out[row]);
      }
    }
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row)
      out[row] = _mm256_fmadd_ps(_mm256_broadcast_ss(a.x_sums + group * kRows + row), grid.minimum,
                                 out[row]);
  }
}

inline float horizontal_sum(__m256 v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

// Sum of count values, in 8 chains per kChainCols values.
float sum_of(const float* x, int64_t count) {
  float total = 0;
  for (int64_t begin = 0; begin < count; begin += kChainCols) {
    const int64_t end = smaller(begin + kChainCols, count);
    __m256 sums = _mm256_setzero_ps();
    int64_t i = begin;
    for (; i + 8 <= end; i += 8) sums = _mm256_add_ps(sums, _mm256_loadu_ps(x + i));
    float rest = 0;
    for (; i < end; ++i) rest += x[i];
    total += horizontal_sum(sums) + rest;
  }
  return total;
}

void prepare_few_rows(const PackedGemmArgs& a, const RowBlocks& rows, int64_t groups, float* x,
                      float* x_sums) {
  const int64_t cols = block_count(a.k) * kBlockCols;
  for (int64_t block = 0; block < rows.count; ++block) {
    const int64_t first = rows.begin(block), count = rows.rows(block);
    for (int64_t row = 0; row < count; ++row) {
      const float* from = a.x + (first + row) * a.k;
      float* to = x + first * cols + row;
      int64_t j = 0;
      if (count == 1) {
        const __m256 lane_scales = _mm256_broadcast_ps(reinterpret_cast<const __m128*>(kLaneScale));
        for (; j + 8 <= a.k; j += 8)
          _mm256_storeu_ps(to + j, _mm256_mul_ps(_mm256_loadu_ps(from + j), lane_scales));
      }
      for (; j < a.k; ++j) to[j * count] = from[j] * kLaneScale[j % kQuadCols];
      for (; j < cols; ++j) to[j * count] = 0;
      for (int64_t group = 0; group < groups; ++group) {
        const int64_t begin = group * a.group_size;
        x_sums[first * groups + group * count + row] =
            sum_of(from + begin, smaller(a.group_size, a.k - begin));
      }
    }
  }
}

template <int kBits>
void multiply_few_rows(const PackedGemmArgs& a) {
  using Kernel = void (*)(const FewRowsOperands&, __m256*);
  constexpr Kernel kKernels[kFewRows] = {few_rows<kBits, 1>, few_rows<kBits, 2>, few_rows<kBits, 3>,
                                         few_rows<kBits, 4>};
  const int64_t groups = group_count(a.k, a.group_size), blocks = block_count(a.k);
  const int64_t cols = blocks * kBlockCols;
  const RowBlocks rows(a.m, kFewRows);
  Scratch memory(Scratch::padded(a.m * cols) + Scratch::padded(a.m * groups));
  float* x = memory.take(a.m * cols);
  float* x_sums = memory.take(a.m * groups);
  prepare_few_rows(a, rows, groups, x, x_sums);
  const int64_t tile_macs = larger(a.m * kTileRows * cols, 1);
  parallel_for(tile_count(a.n), ceil_div(kMinTaskMacs, tile_macs), [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      for (int64_t block = 0; block < rows.count; ++block) {
        const int64_t first = rows.begin(block), count = rows.rows(block);
        __m256 sums[kFewRows];
        kKernels[count - 1](
            {a.tiles + tile * tile_bytes(a.k, kBits), tile_affine(a, tile), x + first * cols,
             x_sums + first * groups, blocks, groups, ceil_div(a.group_size, kBlockCols)},
            sums);
        for (int64_t row = 0; row < count; ++row) store_outputs(a, first + row, tile, sums[row]);
      }
    }
  });
}

// --- many rows ---

constexpr int kManyRows = 6;
constexpr int kPanelTiles = 2;
// A pair of tiles over kChainCols columns takes 16 KB (half of L1), a chunk of tiles 128 KB and a
// chunk of rows 120 KB, together half of a 512 KB L2 cache.
constexpr int64_t kChunkTiles = 16;
constexpr int64_t kChunkRowBlocks = 20;

// y[rows, tiles * 8] (+)= x[k][rows] . panel[tile][k][8]. `add` is false for the first columns.
struct PanelOperands {
  const float* x;
  const float* panel;
  int64_t depth, panel_stride;  // panel_stride: floats from one tile to the next
};

template <int kRows, int kTiles>
void panel_kernel(const PanelOperands& a, __m256 (*out)[kPanelTiles]) {
  __m256 sums[kRows][kTiles] = {};
  const float* x = a.x;
  const float* w = a.panel;
  for (int64_t k = 0; k < a.depth; ++k, x += kRows, w += kTileRows) {
    __m256 weights[kTiles];
#pragma GCC unroll 2
    for (int tile = 0; tile < kTiles; ++tile)
      weights[tile] = _mm256_load_ps(w + tile * a.panel_stride);
#pragma GCC unroll 6
    for (int row = 0; row < kRows; ++row) {
      const __m256 value = _mm256_broadcast_ss(x + row);
#pragma GCC unroll 2
      for (int tile = 0; tile < kTiles; ++tile)
        sums[row][tile] = _mm256_fmadd_ps(value, weights[tile], sums[row][tile]);
    }
  }
#pragma GCC unroll 6
  for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 2
    for (int tile = 0; tile < kTiles; ++tile) out[row][tile] = sums[row][tile];
}

using PanelKernel = void (*)(const PanelOperands&, __m256 (*)[kPanelTiles]);
constexpr PanelKernel kPanelKernels[kPanelTiles][kManyRows] = {
    {panel_kernel<1, 1>, panel_kernel<2, 1>, panel_kernel<3, 1>, panel_kernel<4, 1>,
     panel_kernel<5, 1>, panel_kernel<6, 1>},
    {panel_kernel<1, 2>, panel_kernel<2, 2>, panel_kernel<3, 2>, panel_kernel<4, 2>,
     panel_kernel<5, 2>, panel_kernel<6, 2>}};

// All rows of x times tiles [begin, end), at most kChunkTiles.
template <int kBits>
void multiply_chunk(const PackedGemmArgs& a, const RowBlocks& rows, const float* x, int64_t begin,
                    int64_t end, float* panel) {
  constexpr int64_t kStride = kChainCols * kTileRows;
  for (int64_t k = 0; k < a.k; k += kChainCols) {
    const int64_t depth = smaller(kChainCols, a.k - k);
    for (int64_t tile = begin; tile < end; ++tile)
      dequantize<kBits, kTileRows>(a, tile, k, k + depth, panel + (tile - begin) * kStride);
    for (int64_t chunk = 0; chunk < rows.count; chunk += kChunkRowBlocks) {
      const int64_t chunk_end = smaller(chunk + kChunkRowBlocks, rows.count);
      for (int64_t tile = begin; tile < end; tile += kPanelTiles) {
        const int64_t tiles = smaller(kPanelTiles, end - tile);
        for (int64_t block = chunk; block < chunk_end; ++block) {
          const int64_t first = rows.begin(block), count = rows.rows(block);
          __m256 sums[kManyRows][kPanelTiles];
          kPanelKernels[tiles - 1][count - 1](
              {x + first * a.k + k * count, panel + (tile - begin) * kStride, depth, kStride},
              sums);
          for (int64_t row = 0; row < count; ++row)
            for (int64_t i = 0; i < tiles; ++i)
              accumulate(a, first + row, tile + i, sums[row][i], k == 0);
        }
      }
    }
  }
}

template <int kBits>
void multiply_many_rows(const PackedGemmArgs& a) {
  const RowBlocks rows(a.m, kManyRows);
  Scratch packed(a.m * a.k);
  float* x = packed.take(a.m * a.k);
  pack_rows(a, rows, x);
  const int64_t tiles = tile_count(a.n), tile_macs = larger(a.m * kTileRows * a.k, 1);
  // Several tasks per thread even out their ends.
  const int64_t share = ceil_div(tiles, int64_t{4} * max_threads());
  const int64_t grain =
      larger(smaller(kChunkTiles, (share + 1) / 2 * 2), ceil_div(kMinTaskMacs, tile_macs));
  parallel_for(tiles, grain, [&](int64_t begin, int64_t end) {
    constexpr int64_t kPanelFloats = kChunkTiles * kChainCols * kTileRows;
    Scratch scratch(kPanelFloats);
    float* panel = scratch.take(kPanelFloats);
    for (int64_t tile = begin; tile < end; tile += kChunkTiles)
      multiply_chunk<kBits>(a, rows, x, tile, smaller(tile + kChunkTiles, end), panel);
  });
}

template <int kBits>
void multiply(const PackedGemmArgs& a) {
  if (takes_few_rows(a))
    multiply_few_rows<kBits>(a);
  else
    multiply_many_rows<kBits>(a);
}

constexpr void (*kByBits[])(const PackedGemmArgs&) = {
    multiply<2>, multiply<3>, multiply<4>, multiply<5>, multiply<6>, multiply<7>, multiply<8>};

}  // namespace
}  // namespace mmq::cpu::avx2

MMQ_AVX2_END

namespace mmq::cpu::avx2 {

void packed_gemm_exact(const PackedGemmArgs& a) { kByBits[a.bits - kMinBits](a); }

}  // namespace mmq::cpu::avx2

#endif
