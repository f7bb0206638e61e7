// SPDX-License-Identifier: Apache-2.0
// packed_gemm with activations quantized per row and group on AVX-512 VNNI: dpbusd multiplies four
// unsigned codes by four signed activations and adds them to 32 bits, at every width, 8 included.
// Sums are the integers of packed_gemm_int8_avx2.cpp, scaled in the same order: results are equal.
//
// Few rows: a tile is decoded in registers and multiplied by up to 8. Many rows, and groups that
// are no multiple of a block: a chunk of tiles is unpacked to bytes in the L2 cache, [tile][quad]
// [64 bytes], and multiplied 6 rows by 32 outputs, whose integer and fp32 sums all stay in
// registers: stores of 64 bytes take two cycles.
#if defined(__x86_64__)

#include <cstring>
#include <vector>

#include "cpu/activations_avx2.h"
#include "cpu/kernels.h"
#include "cpu/layout.h"
#include "cpu/packed_gemm_avx512.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/target_avx512.h"

MMQ_AVX512_BEGIN

namespace mmq::cpu::avx512 {
namespace {

using avx2::Activations;
using avx2::Segment;

constexpr int kFewRows = 8;
// Measured: the processor's own prefetching does not keep up with 3 rows and more, for which into
// the L2 cache and a page ahead is best; fewer rows are read up to a third slower with it.
constexpr int64_t kPrefetchBytes = 4096;
constexpr int kManyRows = 6;
constexpr int kPanelTiles = 2;
// Measured: up to so many rows decoding again for every 8 of them is cheaper than a panel, because
// it overlaps with the reading of memory.
constexpr int64_t kPanelFromRows = 96;
constexpr int64_t kPanelBytes = 256 * 1024;
// Activations are bytes at every width.
constexpr int kByteBits = 4;
constexpr int kXQuadBytes = avx2::kXQuadBytes<kByteBits>;

inline int32_t load_dword(const void* from) {
  int32_t value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

// The type of dpbusd's sums; GCC stores arrays of __m512i, 64-bit integers, at every step.
using Sums = int32_t __attribute__((vector_size(64)));

inline Sums add_dots(Sums sums, __m512i codes, const uint8_t* x) {
  const __m512i value = _mm512_set1_epi32(load_dword(x));
  return reinterpret_cast<Sums>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sums), codes, value));
}

// What a kernel reads for one block of rows and one or two tiles.
struct Operands {
  const uint8_t* codes;  // few rows: as in layout.h; many rows: bytes, [tile][quad][64]
  int64_t codes_stride;  // many rows: bytes to the next tile
  TileAffine affine[kPanelTiles];
  const uint8_t* x;
  const float* x_scales;
  const float* x_sums;
  const Segment* segments;
  int64_t segment_count;
  int64_t blocks, group_blocks;  // few rows
};

// The end of a segment for some rows and a tile: end_segment of activations_avx2.h.
template <int kRows, int kStride>
inline __attribute__((always_inline)) void end_segment(const TileAffine& a, int64_t group,
                                                       const float* x_scales, const float* x_sums,
                                                       const Sums* products, __m512* out) {
  const auto each = [&](const auto& step) {
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row)
      out[row * kStride] =
          step(_mm512_cvtepi32_ps(reinterpret_cast<__m512i>(products[row * kStride])),
               _mm512_set1_ps(x_scales[row]), _mm512_set1_ps(x_sums[row]), out[row * kStride]);
  };
  const uint8_t* from = a.data + group * affine_bytes(a.kind);
  if (a.kind == AffineKind::kScale16) {
    const __m512 scale = load_scales(from, a.type);
    each([&](__m512 codes, __m512 x_scale, __m512 x_sum, __m512 before) {
      return _mm512_fmadd_ps(scale, _mm512_fmadd_ps(codes, x_scale, x_sum), before);
    });
  } else if (a.kind == AffineKind::kScaleZero16) {
    const __m512 scale = load_scales(from, a.type);
    const __m512 zero = load_scales(from + kTileRows * 2, a.type);
    each([&](__m512 codes, __m512 x_scale, __m512 x_sum, __m512 before) {
      const __m512 scaled = _mm512_mul_ps(codes, x_scale);
      return _mm512_fmadd_ps(scale, _mm512_fnmadd_ps(zero, x_sum, scaled), before);
    });
  } else {
    const Grid grid = load_tile_grid(a, group);
    each([&](__m512 codes, __m512 x_scale, __m512 x_sum, __m512 before) {
      const __m512 scaled = _mm512_mul_ps(codes, x_scale);
      return _mm512_fmadd_ps(x_sum, grid.minimum, _mm512_fmadd_ps(scaled, grid.scale, before));
    });
  }
}

// One row is bound by memory, and how well it is read depends on how far ahead the processor gets
// in the instructions: few of them a block matter, not their cycles. So codes of one plane are
// masked where they lie; those of one place in a byte have a chain of sums of their own, which is
// shifted down at the end of a segment.
template <int kBits, int kRows>
constexpr bool kMaskedInPlace = kRows == 1 && (kBits == 2 || kBits == 4);
// More than one chain hides dpbusd's latency.
template <int kBits, int kRows>
constexpr int kChains = kMaskedInPlace<kBits, kRows> ? 8 / kBits
                        : kRows < 4                  ? 2
                                                     : 1;

template <int kBits>
inline void mask_block(const uint8_t* block, __m512i* quads) {
  constexpr int kPlaces = 8 / kBits;
#pragma GCC unroll 4
  for (int vector = 0; vector < kBits; ++vector) {
    __m512i codes = _mm512_loadu_si512(block + vector * kQuadBytes);
    // Measured: GCC would load it for every mask again; 4096 -> 4096 in cache takes 69 or 74 us.
    __asm__("" : "+v"(codes));
#pragma GCC unroll 4
    for (int place = 0; place < kPlaces; ++place)
      quads[vector * kPlaces + place] = _mm512_and_si512(
          codes, _mm512_set1_epi8(static_cast<char>(max_code(kBits) << (kBits * place))));
  }
}

// One tile, decoded in registers. Segments are whole blocks; where they begin is computed, because
// reading it would take more of the L1 cache than x does.
template <int kBits, int kRows>
void few_rows(const Operands& a, __m512* y) {
  constexpr int kCount = kChains<kBits, kRows>;
  __m512 out[kRows] = {};
  const uint8_t* block = a.codes;
  const uint8_t* x = a.x;
  const float* x_scales = a.x_scales;
  const float* x_sums = a.x_sums;
  int64_t left = a.blocks;
  for (int64_t group = 0; left > 0; ++group) {
    for (int64_t todo = smaller(a.group_blocks, left); todo > 0;) {
      const int64_t count = smaller(todo, avx2::kSegmentCols / kBlockCols);
      todo -= count;
      left -= count;
      Sums sums[kRows][kCount] = {};
      for (const uint8_t* end = block + count * block_bytes(kBits); block != end;
           block += block_bytes(kBits), x += kBlockQuads * kRows * kXQuadBytes) {
        if constexpr (kRows > 2)
          for (int64_t i = 0; i < block_bytes(kBits); i += kQuadBytes)
            _mm_prefetch(block + kPrefetchBytes + i, _MM_HINT_T1);
        if constexpr (kRows == 1 && kBits > 4 && kBits < 8) avx2::touch_block<kBits>(block);
        __m512i quads[kBlockQuads];
        if constexpr (kMaskedInPlace<kBits, kRows>)
          mask_block<kBits>(block, quads);
        else
          decode_block<kBits>(block, quads);
#pragma GCC unroll 8
        for (int quad = 0; quad < kBlockQuads; ++quad) {
#pragma GCC unroll 8
          for (int row = 0; row < kRows; ++row) {
            const uint8_t* value = x + (quad * kRows + row) * kXQuadBytes;
            sums[row][quad % kCount] = add_dots(sums[row][quad % kCount], quads[quad], value);
          }
        }
      }
      Sums products[kRows];
#pragma GCC unroll 8
      for (int row = 0; row < kRows; ++row) {
        products[row] = sums[row][0];
#pragma GCC unroll 4
        for (int chain = 1; chain < kCount; ++chain)
          products[row] +=
              kMaskedInPlace<kBits, kRows> ? sums[row][chain] >> (kBits * chain) : sums[row][chain];
      }
      end_segment<kRows, 1>(a.affine[0], group, x_scales, x_sums, products, out);
      x_scales += kRows;
      x_sums += kRows;
    }
  }
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) y[row] = out[row];
}

// Unpacked bytes: widths differ in nothing.
template <int kRows, int kTiles>
void many_rows(const Operands& a, __m512 (*y)[kTiles]) {
  __m512 out[kRows][kTiles] = {};
  for (int64_t segment = 0; segment < a.segment_count; ++segment) {
    const Segment& s = a.segments[segment];
    const uint8_t* w = a.codes + s.code_quad * kQuadBytes;
    const uint8_t* x = a.x + s.x_quad * kRows * kXQuadBytes;
    Sums sums[kRows][kTiles] = {};
    for (int64_t quad = 0; quad < s.quads; ++quad, w += kQuadBytes, x += kRows * kXQuadBytes) {
      __m512i codes[kTiles];
#pragma GCC unroll 4
      for (int tile = 0; tile < kTiles; ++tile)
        codes[tile] = _mm512_load_si512(w + tile * a.codes_stride);
#pragma GCC unroll 6
      for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
        for (int tile = 0; tile < kTiles; ++tile)
          sums[row][tile] = add_dots(sums[row][tile], codes[tile], x + row * kXQuadBytes);
      }
    }
#pragma GCC unroll 4
    for (int tile = 0; tile < kTiles; ++tile)
      end_segment<kRows, kTiles>(a.affine[tile], s.group, a.x_scales + segment * kRows,
                                 a.x_sums + segment * kRows, sums[0] + tile, out[0] + tile);
  }
#pragma GCC unroll 6
  for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 4
    for (int tile = 0; tile < kTiles; ++tile) y[row][tile] = out[row][tile];
}

template <int kBits, int kRows>
void run_few(const PackedGemmArgs& a, const Operands& operands, int64_t row, int64_t tile) {
  __m512 out[kRows];
  few_rows<kBits, kRows>(operands, out);
  for (int i = 0; i < kRows; ++i) store_outputs(a, row + i, tile, out[i]);
}

template <int kRows, int kTiles>
void run_many(const PackedGemmArgs& a, const Operands& operands, int64_t row, int64_t tile) {
  __m512 out[kRows][kTiles];
  many_rows<kRows, kTiles>(operands, out);
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kTiles; ++j) store_outputs(a, row + i, tile + j, out[i][j]);
}

using Kernel = void (*)(const PackedGemmArgs&, const Operands&, int64_t, int64_t);
template <int kBits>
constexpr Kernel kFewRowsKernels[kFewRows] = {
    run_few<kBits, 1>, run_few<kBits, 2>, run_few<kBits, 3>, run_few<kBits, 4>,
    run_few<kBits, 5>, run_few<kBits, 6>, run_few<kBits, 7>, run_few<kBits, 8>};
template <int kTiles>
constexpr Kernel kPanelKernels[kManyRows] = {run_many<1, kTiles>, run_many<2, kTiles>,
                                             run_many<3, kTiles>, run_many<4, kTiles>,
                                             run_many<5, kTiles>, run_many<6, kTiles>};
constexpr const Kernel* kByTiles[kPanelTiles] = {kPanelKernels<1>, kPanelKernels<2>};

Operands operands_of(const PackedGemmArgs& a, const Activations& x, int64_t block, int64_t tile,
                     int64_t tiles, const uint8_t* codes, int64_t codes_stride) {
  const int64_t first = x.rows.begin(block);
  Operands operands{codes,
                    codes_stride,
                    {},
                    x.codes + first * x.quads * kXQuadBytes,
                    x.scales + first * x.segment_count,
                    x.sums + first * x.segment_count,
                    x.segments,
                    x.segment_count,
                    block_count(a.k),
                    ceil_div(a.group_size, kBlockCols)};
  for (int64_t i = 0; i < tiles; ++i) operands.affine[i] = avx2::tile_affine(a, tile + i);
  return operands;
}

// Tiles [begin, end).
template <int kBits>
void multiply_tiles(const PackedGemmArgs& a, const Activations& x, int64_t begin, int64_t end) {
  for (int64_t tile = begin; tile < end; ++tile) {
    const uint8_t* codes = a.tiles + tile * tile_bytes(a.k, kBits);
    for (int64_t block = 0; block < x.rows.count; ++block)
      kFewRowsKernels<kBits>[x.rows.rows(block) - 1](a, operands_of(a, x, block, tile, 1, codes, 0),
                                                     x.rows.begin(block), tile);
  }
}

// The same by way of a panel of bytes that holds them all.
template <int kBits>
void multiply_panel(const PackedGemmArgs& a, const Activations& x, int64_t begin, int64_t end,
                    uint8_t* panel) {
  const int64_t blocks = block_count(a.k), stride = blocks * kBlockCodes;
  for (int64_t i = 0; i < (end - begin) * blocks; ++i) {
    __m512i quads[kBlockQuads];
    decode_block<kBits>(a.tiles + (begin * blocks + i) * block_bytes(kBits), quads);
#pragma GCC unroll 8
    for (int quad = 0; quad < kBlockQuads; ++quad)
      _mm512_store_si512(panel + i * kBlockCodes + quad * kQuadBytes, quads[quad]);
  }
  for (int64_t block = 0; block < x.rows.count; ++block) {
    for (int64_t tile = begin; tile < end; tile += kPanelTiles) {
      const int64_t tiles = smaller(kPanelTiles, end - tile);
      kByTiles[tiles - 1][x.rows.rows(block) - 1](
          a, operands_of(a, x, block, tile, tiles, panel + (tile - begin) * stride, stride),
          x.rows.begin(block), tile);
    }
  }
}

template <int kBits>
void multiply(const PackedGemmArgs& a, const Segment* segments, int64_t segment_count) {
  const bool few = a.m < kPanelFromRows && avx2::whole_blocks(a);
  const avx2::QuantizedActivations<kByteBits> quantized(a, few ? kFewRows : kManyRows, segments,
                                                        segment_count);
  const Activations& x = quantized.get();

  const int64_t tiles = tile_count(a.n);
  const int64_t min_tiles = ceil_div(kMinTaskMacs, larger(a.m * kTileRows * a.k, 1));
  if (few) {
    parallel_for(tiles, avx2::few_rows_grain(a),
                 [&](int64_t begin, int64_t end) { multiply_tiles<kBits>(a, x, begin, end); });
    return;
  }
  const int64_t tile_codes = larger(block_count(a.k) * kBlockCodes, 1);
  const int64_t chunk = larger(kPanelBytes / tile_codes / kPanelTiles, 1) * kPanelTiles;
  // Several tasks per thread even out their ends.
  const int64_t share = ceil_div(tiles, int64_t{4} * max_threads());
  const int64_t grain =
      larger(smaller(chunk, ceil_div(share, kPanelTiles) * kPanelTiles), min_tiles);
  parallel_for(tiles, grain, [&](int64_t begin, int64_t end) {
    const int64_t panel_floats = smaller(chunk, end - begin) * tile_codes / sizeof(float);
    Scratch scratch(panel_floats);
    uint8_t* panel = reinterpret_cast<uint8_t*>(scratch.take(panel_floats));
    for (int64_t tile = begin; tile < end; tile += chunk)
      multiply_panel<kBits>(a, x, tile, smaller(tile + chunk, end), panel);
  });
}

using Multiply = void (*)(const PackedGemmArgs&, const Segment*, int64_t);
constexpr Multiply kByBits[] = {multiply<2>, multiply<3>, multiply<4>, multiply<5>,
                                multiply<6>, multiply<7>, multiply<8>};

}  // namespace
}  // namespace mmq::cpu::avx512

MMQ_AVX512_END

namespace mmq::cpu::avx512 {

void packed_gemm_int8(const PackedGemmArgs& a) {
  const std::vector<avx2::Segment> segments = avx2::make_segments(a);
  kByBits[a.bits - kMinBits](a, segments.data(), static_cast<int64_t>(segments.size()));
}

}  // namespace mmq::cpu::avx512

#endif
