// SPDX-License-Identifier: Apache-2.0
// The exact mode of packed_gemm for many rows, but for the instruction set: a panel of weights is
// decoded into the cache and multiplied by a register-blocked kernel.
//
//   panel  [column][outputs of a strip]       decoded once for all rows of a task
//   x      [panel][row block][column][row]    packed once per call, so that a panel reads a stream
//   sums   [strip][row][outputs of a strip]   of one task; y is written once, at the end: its rows
//                                             lie in few sets of the cache
//
// Here panels are fp32 numbers with their scale; packed_gemm_exact_avx512bf16.cpp has pairs of
// bfloat16 integers, whose "column" is two of k.
//
// A header of the AVX2 and AVX-512 files only.
#pragma once

#if defined(__x86_64__)

#include <cstring>

#include "cpu/kernels.h"
#include "cpu/layout.h"
#include "cpu/packed_gemm_avx2.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/target_avx2.h"

MMQ_AVX2_BEGIN

namespace mmq::cpu::avx2 {
namespace {

// A panel takes half of an L1 cache of 32 KB: so many numbers of 32 bits.
constexpr int64_t kPanelFloats = 4096;
// Outputs of a task of few rows, whose sums so stay in L1 (measured: Zen 4, 4096x4096).
constexpr int64_t kFewChunkTiles = 2;
constexpr int64_t kFewChunkRows = 128;

// The activations of a call, block after block of rows.
struct PanelRows {
  const float* x;     // [panel][row block][Panel::kBlockFloats]
  const float* sums;  // [row][group] of x, for kernels that multiply minima apart, or null
};

// One call of a panel kernel: sums (+)= x . panel over `depth` of k from column `k` on.
struct PanelOperands {
  const float* x;
  const float* panel;
  int64_t k, depth, group_size, groups;
  const float* x_sums;  // [row][groups] or null
  float* sums;
  bool begin;  // sums are written, not added to
};

// Columns [begin, end) of half a block in which a group ends: 8 rows at panel + (k - begin) *
// stride.
template <int kBits>
void dequantize_mixed_block(const uint8_t* block, const TileAffine& affine, int64_t group_size,
                            int64_t begin, int64_t end, float* panel, int64_t stride) {
  __m256i quads[kBlockQuads];
  decode_block<kBits>(block, quads);
  alignas(32) uint8_t bytes[kBlockQuads * kHalfBytes];
#pragma GCC unroll 8
  for (int quad = 0; quad < kBlockQuads; ++quad)
    _mm256_store_si256(reinterpret_cast<__m256i*>(bytes + quad * kHalfBytes), quads[quad]);
  for (int64_t k = begin; k < end; ++k, panel += stride) {
    const Grid grid = load_grid(affine, k / group_size);
    const __m128i shift = _mm_cvtsi32_si128(static_cast<int>(8 * (k % kQuadCols)));
    const __m256i quad = load_vector(bytes + (k - begin) / kQuadCols * kHalfBytes);
    const __m256i codes = _mm256_and_si256(_mm256_srl_epi32(quad, shift), _mm256_set1_epi32(0xff));
    _mm256_store_ps(panel, _mm256_fmadd_ps(_mm256_cvtepi32_ps(codes), grid.scale, grid.minimum));
  }
}

// Columns [begin, end) of a strip to panel[k - begin][outputs]; begin is a multiple of a block.
// Outputs of tiles that do not exist are zero. Kernel is the Kernel of a FloatPanel.
template <class Kernel, int kBits>
void dequantize(const PackedGemmArgs& a, int64_t tile, int64_t begin, int64_t end, float* panel) {
  constexpr int64_t kStride = Kernel::kTiles * kTileRows;
  const int64_t tiles = tile_count(a.n);
  if (tile + Kernel::kTiles > tiles)
    std::memset(panel, 0, static_cast<size_t>((end - begin) * kStride) * sizeof(float));
  const int64_t last_tile = smaller(tile + Kernel::kTiles, tiles);
  for (; tile < last_tile; ++tile, panel += kTileRows) {
    const uint8_t* block =
        a.tiles + tile * tile_bytes(a.k, kBits) + begin / kBlockCols * block_bytes(kBits);
    const TileAffine affine[] = {half_affine(a, tile * kHalves),
                                 half_affine(a, tile * kHalves + 1)};
    int64_t group = begin / a.group_size, group_end = (group + 1) * a.group_size;
    for (int64_t k = begin; k < end; k += kBlockCols, block += block_bytes(kBits)) {
      float* out = panel + (k - begin) * kStride;
      if (k >= group_end) {
        group = k / a.group_size;
        group_end = (group + 1) * a.group_size;
      }
      if (smaller(group_end, end) - k >= kBlockCols) {
        Kernel::template dequantize_block<kBits>(block, affine, group, out);
        continue;
      }
      for (int half = 0; half < kHalves; ++half)
        dequantize_mixed_block<kBits>(block + half * kHalfBytes, affine[half], a.group_size, k,
                                      smaller(k + kBlockCols, end), out + half * kHalfRows,
                                      kStride);
    }
  }
}

// Copies x to [panel][row block][k][row], a cache line of a row at a time: lines of rows whose
// length is a power of two would drive each other out.
template <int64_t kRows, int64_t kDepth>
void pack_rows(const PackedGemmArgs& a, const RowBlocks& rows, float* packed) {
  constexpr int64_t kLineCols = 16;
  const auto pack_line = [](const float* from, int64_t cols, float* to, int64_t stride) {
    for (int64_t j = 0; j < cols; ++j) to[j * stride] = from[j];
  };
  parallel_for(rows.count, 1 + kMinTaskMacs * rows.count / (a.m * a.k + 1),
               [&](int64_t begin, int64_t end) {
                 for (int64_t block = begin; block < end; ++block) {
                   const int64_t first = rows.begin(block), count = rows.rows(block);
                   for (int64_t panel = 0; panel < a.k; panel += kDepth) {
                     const int64_t depth = smaller(kDepth, a.k - panel);
                     const float* from = a.x + first * a.k + panel;
                     float* to = packed + (panel / kDepth * rows.count + block) * kRows * kDepth;
                     for (int64_t k = 0; k < depth; k += kLineCols)
                       for (int64_t row = 0; row < count; ++row)
                         pack_line(from + row * a.k + k, smaller(kLineCols, depth - k),
                                   to + k * count + row, count);
                   }
                 }
               });
}

// Measured: into L2, since the panel fills L1.
inline void prefetch(const void* from, int64_t bytes) {
  const char* at = static_cast<const char*>(from);
  for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(at + i, _MM_HINT_T1);
}

// Asks for the operands of the next dequantize, while a panel is multiplied.
template <int kBits>
inline void prefetch_columns(const PackedGemmArgs& a, int64_t tile, int64_t last_tile,
                             int64_t begin, int64_t end) {
  if (begin >= end) return;
  const int64_t group = begin / a.group_size, last_group = ceil_div(end, a.group_size);
  const int64_t block = begin / kBlockCols, last_block = ceil_div(end, kBlockCols);
  for (; tile < smaller(last_tile, tile_count(a.n)); ++tile) {
    prefetch(a.tiles + tile * tile_bytes(a.k, kBits) + block * block_bytes(kBits),
             (last_block - block) * block_bytes(kBits));
    prefetch(tile_affine(a, tile).data + group * affine_bytes(a.affine_kind),
             (last_group - group) * affine_bytes(a.affine_kind));
  }
}

// Row blocks [begin, end) times strips [first, last). Panel has kRows (of a block), kTiles (of a
// strip), kDepth (columns), kChunkRows and kChunkTiles (of a task), kBlockFloats (x of a row block
// and panel), kScaleFloats (behind a panel), multiply(rows, operands), decode<kBits>(arguments,
// tile, columns [begin, end), panel) and store(arguments, row, tile, a strip's sums).
template <class Panel, int kBits>
void multiply_chunk(const PackedGemmArgs& a, const RowBlocks& rows, const PanelRows& x,
                    int64_t begin, int64_t end, int64_t first, int64_t last) {
  constexpr int64_t kCols = Panel::kTiles * kTileRows, kDepth = Panel::kDepth;
  static_assert(kDepth <= kChainCols && kDepth % kBlockCols == 0, "the error bound, whole blocks");
  const int64_t first_row = rows.begin(begin), row_count = rows.begin(end) - first_row;
  const int64_t groups = group_count(a.k, a.group_size);
  Scratch scratch(kPanelFloats + Panel::kScaleFloats + (last - first) * row_count * kCols);
  float* panel = scratch.take(kPanelFloats + Panel::kScaleFloats);
  float* sums = scratch.take((last - first) * row_count * kCols);
  for (int64_t k = 0; k < a.k; k += kDepth) {
    const int64_t depth = smaller(kDepth, a.k - k);
    const float* x_panel = x.x + k / kDepth * rows.count * Panel::kBlockFloats;
    for (int64_t strip = first; strip < last; ++strip) {
      const int64_t tile = strip * Panel::kTiles;
      Panel::template decode<kBits>(a, tile, k, k + depth, panel);
      prefetch_columns<kBits>(a, tile, tile + Panel::kTiles, k + kDepth,
                              smaller(k + 2 * kDepth, a.k));
      float* strip_sums = sums + (strip - first) * row_count * kCols;
      for (int64_t block = begin; block < end; ++block) {
        const int64_t row = rows.begin(block), count = rows.rows(block);
        Panel::multiply(count, {x_panel + block * Panel::kBlockFloats, panel, k, depth,
                                a.group_size, groups, x.sums ? x.sums + row * groups : nullptr,
                                strip_sums + (row - first_row) * kCols, k == 0});
      }
    }
  }
  for (int64_t row = 0; row < row_count; ++row)
    for (int64_t strip = first; strip < last; ++strip)
      Panel::store(a, first_row + row, strip * Panel::kTiles,
                   sums + ((strip - first) * row_count + row) * kCols);
}

template <class Panel, int kBits>
void multiply_packed_rows(const PackedGemmArgs& a, const RowBlocks& rows, const PanelRows& x) {
  const int64_t strips = ceil_div(tile_count(a.n), Panel::kTiles);
  const int64_t row_chunks = ceil_div(a.m, Panel::kChunkRows);
  // Several tasks per thread even out their ends.
  const int64_t share = ceil_div(strips * row_chunks, int64_t{4} * max_threads());
  const int64_t most_tiles = a.m > kFewChunkRows ? Panel::kChunkTiles : kFewChunkTiles;
  const int64_t chunk_strips = larger(1, smaller(share, most_tiles / Panel::kTiles));
  const int64_t strip_chunks = ceil_div(strips, chunk_strips);
  const int64_t task_macs = a.m / row_chunks * chunk_strips * Panel::kTiles * kTileRows * a.k;
  parallel_for(row_chunks * strip_chunks, ceil_div(kMinTaskMacs, task_macs + 1),
               [&](int64_t task, int64_t task_end) {
                 for (; task < task_end; ++task) {
                   const int64_t row_chunk = task / strip_chunks;
                   const int64_t strip = task % strip_chunks * chunk_strips;
                   multiply_chunk<Panel, kBits>(a, rows, x, row_chunk * rows.count / row_chunks,
                                                (row_chunk + 1) * rows.count / row_chunks, strip,
                                                smaller(strip + chunk_strips, strips));
                 }
               });
}

// A panel of fp32 numbers. Kernel has kRows, kTiles, multiply(rows, operands) and
// dequantize_block<kBits>(block, affine of each half, group, to).
template <class Kernel>
struct FloatPanel {
  static constexpr int kRows = Kernel::kRows, kTiles = Kernel::kTiles;
  static constexpr int64_t kDepth = kPanelFloats / (kTiles * kTileRows);
  static constexpr int64_t kBlockFloats = kRows * kDepth, kScaleFloats = 0;
  // Measured: of 289 rows each takes 5 % (AVX-512) to 14 % (AVX2) less time than of 512.
  static constexpr int64_t kChunkRows = 320;
  // Measured: so many outputs share the activations of many rows in L2 (Zen 4, 4096x4096).
  static constexpr int64_t kChunkTiles = 4;

  static void multiply(int64_t rows, const PanelOperands& operands) {
    Kernel::multiply(rows, operands);
  }

  template <int kBits>
  static void decode(const PackedGemmArgs& a, int64_t tile, int64_t begin, int64_t end,
                     float* panel) {
    dequantize<Kernel, kBits>(a, tile, begin, end, panel);
  }

  static void store(const PackedGemmArgs& a, int64_t row, int64_t tile, const float* sums) {
    const int64_t halves = smaller((tile + kTiles) * kHalves, half_count(a.n));
    for (int64_t half = tile * kHalves; half < halves; ++half, sums += kHalfRows)
      store_outputs(a, row, half, _mm256_load_ps(sums));
  }
};

template <class Kernel, int kBits>
void multiply_many_rows(const PackedGemmArgs& a) {
  const RowBlocks rows(a.m, Kernel::kRows);
  using Panel = FloatPanel<Kernel>;
  const int64_t x_floats = ceil_div(a.k, Panel::kDepth) * rows.count * Panel::kBlockFloats;
  Scratch packed(x_floats);
  float* x = packed.take(x_floats);
  pack_rows<Panel::kRows, Panel::kDepth>(a, rows, x);
  multiply_packed_rows<Panel, kBits>(a, rows, {x, nullptr});
}

}  // namespace
}  // namespace mmq::cpu::avx2

MMQ_AVX2_END

#endif
