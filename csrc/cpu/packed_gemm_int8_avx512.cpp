// SPDX-License-Identifier: Apache-2.0
// packed_gemm with activations quantized per row and group on AVX-512 VNNI: dpbusd multiplies four
// unsigned codes by four signed activations and adds them to 32 bits, at every width, 8 included.
// Sums are the integers of packed_gemm_int8_avx2.cpp, scaled in the same order: results are equal.
//
// One row: one_row_avx512.h. Few rows: two tiles are decoded in registers and multiplied by up
// to 8. Many rows, and groups that are no multiple of a block: a chunk of tiles is unpacked to
// bytes in the L2 cache, [tile pair][quad][64 bytes], and multiplied 6 rows by 32 outputs, whose
// integer and fp32 sums all stay in registers: stores of 64 bytes take two cycles.
#if defined(__x86_64__)

#include <cstring>
#include <vector>

#include "cpu/activations_avx2.h"
#include "cpu/kernels.h"
#include "cpu/layout.h"
#include "cpu/one_row_avx512.h"
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
// Measured: two streams of short tiles are too much for the processor's own prefetching. Into the
// L2 cache and a page ahead is best.
constexpr int64_t kPrefetchBytes = 4096;
constexpr int kLineBytes = 64;
constexpr int kManyRows = 6;
constexpr int kPanelVectors = 2;
// Measured: up to so many rows decoding again for every 8 of them is cheaper than a panel, because
// it overlaps with the reading of memory.
constexpr int64_t kPanelFromRows = 96;
constexpr int64_t kPanelBytes = 256 * 1024;
constexpr int kVectorBytes = kVectorTiles * kQuadBytes;
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

// What a kernel reads for one block of rows and one or more vectors of outputs.
struct Operands {
  const uint8_t* codes;  // few rows: a tile; many rows: bytes, [vector][quad][64]
  int64_t codes_stride;  // few rows: bytes to the other tile; many rows: to the next vector
  avx2::TileAffine affine[kPanelVectors][kVectorTiles];
  const uint8_t* x;
  const float* x_scales;
  const float* x_sums;
  const Segment* segments;
  int64_t segment_count;
};

// The end of a segment for some rows and two tiles: end_segment of activations_avx2.h.
template <int kRows, int kStride>
inline __attribute__((always_inline)) void end_segment(const avx2::TileAffine* tiles, int64_t group,
                                                       const float* x_scales, const float* x_sums,
                                                       const Sums* products, __m512* out) {
  const auto each = [&](const auto& step) {
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row)
      out[row * kStride] =
          step(_mm512_cvtepi32_ps(reinterpret_cast<__m512i>(products[row * kStride])),
               _mm512_set1_ps(x_scales[row]), _mm512_set1_ps(x_sums[row]), out[row * kStride]);
  };
  const AffineKind kind = tiles[0].kind;
  const auto numbers = [&](int64_t part) {
    const int64_t at = group * affine_bytes(kind) + part * kTileRows * 2;
    return join(avx2::load_scales(tiles[0].data + at, tiles[0].type),
                avx2::load_scales(tiles[1].data + at, tiles[1].type));
  };
  if (kind == AffineKind::kScale16) {
    const __m512 scale = numbers(0);
    each([&](__m512 codes, __m512 x_scale, __m512 x_sum, __m512 before) {
      return _mm512_fmadd_ps(scale, _mm512_fmadd_ps(codes, x_scale, x_sum), before);
    });
  } else if (kind == AffineKind::kScaleZero16) {
    const __m512 scale = numbers(0), zero = numbers(1);
    each([&](__m512 codes, __m512 x_scale, __m512 x_sum, __m512 before) {
      const __m512 scaled = _mm512_mul_ps(codes, x_scale);
      return _mm512_fmadd_ps(scale, _mm512_fnmadd_ps(zero, x_sum, scaled), before);
    });
  } else {
    const Grid grid = load_grid(tiles, group);
    each([&](__m512 codes, __m512 x_scale, __m512 x_sum, __m512 before) {
      const __m512 scaled = _mm512_mul_ps(codes, x_scale);
      return _mm512_fmadd_ps(x_sum, grid.minimum, _mm512_fmadd_ps(scaled, grid.scale, before));
    });
  }
}

// Two tiles, decoded in registers. Segments are whole blocks.
template <int kBits, int kRows>
void few_rows(const Operands& a, __m512* out) {
  constexpr int kChains = kRows < 4 ? 2 : 1;  // hide dpbusd's latency
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) out[row] = _mm512_setzero_ps();
  const uint8_t* block = a.codes;
  const uint8_t* tile_end = a.codes + a.codes_stride;
  const uint8_t* x = a.x;
  for (int64_t segment = 0; segment < a.segment_count; ++segment) {
    Sums sums[kRows][kChains] = {};
    const uint8_t* end = block + a.segments[segment].quads / kBlockQuads * block_bytes(kBits);
    for (; block != end; block += block_bytes(kBits), x += kBlockQuads * kRows * kXQuadBytes) {
      const uint8_t* ahead = block + kPrefetchBytes;
      if (ahead >= tile_end) ahead += a.codes_stride;  // the tiles after these
      for (int line = 0; line < kBits * kQuadBytes; line += kLineBytes) {
        _mm_prefetch(ahead + line, _MM_HINT_T1);
        _mm_prefetch(ahead + a.codes_stride + line, _MM_HINT_T1);
      }
      __m512i quads[kBlockQuads];
      decode_block<kBits>(block, a.codes_stride, quads);
#pragma GCC unroll 8
      for (int quad = 0; quad < kBlockQuads; ++quad) {
#pragma GCC unroll 8
        for (int row = 0; row < kRows; ++row) {
          const uint8_t* value = x + (quad * kRows + row) * kXQuadBytes;
          sums[row][quad % kChains] = add_dots(sums[row][quad % kChains], quads[quad], value);
        }
      }
    }
    Sums products[kRows];
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
      products[row] = sums[row][0];
      if constexpr (kChains > 1) products[row] += sums[row][1];
    }
    end_segment<kRows, 1>(a.affine[0], a.segments[segment].group, a.x_scales + segment * kRows,
                          a.x_sums + segment * kRows, products, out);
  }
}

// Unpacked bytes: widths differ in nothing.
template <int kRows, int kVectors>
void many_rows(const Operands& a, __m512 (*y)[kVectors]) {
  __m512 out[kRows][kVectors] = {};
  for (int64_t segment = 0; segment < a.segment_count; ++segment) {
    const Segment& s = a.segments[segment];
    const uint8_t* w = a.codes + s.code_quad * kVectorBytes;
    const uint8_t* x = a.x + s.x_quad * kRows * kXQuadBytes;
    Sums sums[kRows][kVectors] = {};
    for (int64_t quad = 0; quad < s.quads; ++quad, w += kVectorBytes, x += kRows * kXQuadBytes) {
      __m512i codes[kVectors];
#pragma GCC unroll 4
      for (int vector = 0; vector < kVectors; ++vector)
        codes[vector] = _mm512_load_si512(w + vector * a.codes_stride);
#pragma GCC unroll 6
      for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
        for (int vector = 0; vector < kVectors; ++vector)
          sums[row][vector] = add_dots(sums[row][vector], codes[vector], x + row * kXQuadBytes);
      }
    }
#pragma GCC unroll 4
    for (int vector = 0; vector < kVectors; ++vector)
      end_segment<kRows, kVectors>(a.affine[vector], s.group, a.x_scales + segment * kRows,
                                   a.x_sums + segment * kRows, sums[0] + vector, out[0] + vector);
  }
#pragma GCC unroll 6
  for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 4
    for (int vector = 0; vector < kVectors; ++vector) y[row][vector] = out[row][vector];
}

template <int kBits, int kRows>
void run_few(const PackedGemmArgs& a, const Operands& operands, int64_t row, int64_t tile) {
  __m512 out[kRows];
  few_rows<kBits, kRows>(operands, out);
  for (int i = 0; i < kRows; ++i) store_outputs(a, row + i, tile, out[i]);
}

template <int kRows, int kVectors>
void run_many(const PackedGemmArgs& a, const Operands& operands, int64_t row, int64_t tile) {
  __m512 out[kRows][kVectors];
  many_rows<kRows, kVectors>(operands, out);
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kVectors; ++j)
      store_outputs(a, row + i, tile + j * kVectorTiles, out[i][j]);
}

using Kernel = void (*)(const PackedGemmArgs&, const Operands&, int64_t, int64_t);
// From 2 rows: only a call of one row has a block of one.
template <int kBits>
constexpr Kernel kFewRowsKernels[kFewRows - 1] = {
    run_few<kBits, 2>, run_few<kBits, 3>, run_few<kBits, 4>, run_few<kBits, 5>,
    run_few<kBits, 6>, run_few<kBits, 7>, run_few<kBits, 8>};
template <int kVectors>
constexpr Kernel kPanelKernels[kManyRows] = {run_many<1, kVectors>, run_many<2, kVectors>,
                                             run_many<3, kVectors>, run_many<4, kVectors>,
                                             run_many<5, kVectors>, run_many<6, kVectors>};
constexpr const Kernel* kByVectors[kPanelVectors] = {kPanelKernels<1>, kPanelKernels<2>};

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
                    x.segment_count};
  for (int64_t i = 0; i < tiles; ++i)
    operands.affine[i / kVectorTiles][i % kVectorTiles] =
        avx2::tile_affine(a, smaller(tile + i, tile_count(a.n) - 1));
  return operands;
}

// Bytes from a tile to its neighbour, 0 for a last one without.
template <int kBits>
int64_t neighbour(const PackedGemmArgs& a, int64_t tile) {
  return tile + 1 < tile_count(a.n) ? tile_bytes(a.k, kBits) : 0;
}

// Tiles [begin, end) for one row.
template <int kBits>
void multiply_row(const PackedGemmArgs& a, const Activations& x, int64_t begin, int64_t end) {
  for (int64_t tile = begin; tile < end; ++tile)
    avx2::store_outputs(
        a, 0, tile,
        one_row<kBits>(a, a.tiles + tile * tile_bytes(a.k, kBits), avx2::tile_affine(a, tile), x));
}

// Pairs of tiles [begin, end).
template <int kBits>
void multiply_pairs(const PackedGemmArgs& a, const Activations& x, int64_t begin, int64_t end) {
  for (int64_t tile = begin * kVectorTiles; tile < end * kVectorTiles; tile += kVectorTiles) {
    const uint8_t* codes = a.tiles + tile * tile_bytes(a.k, kBits);
    for (int64_t block = 0; block < x.rows.count; ++block)
      kFewRowsKernels<kBits>[x.rows.rows(block) - 2](
          a, operands_of(a, x, block, tile, kVectorTiles, codes, neighbour<kBits>(a, tile)),
          x.rows.begin(block), tile);
  }
}

// The same by way of a panel of bytes that holds them all.
template <int kBits>
void multiply_panel(const PackedGemmArgs& a, const Activations& x, int64_t begin, int64_t end,
                    uint8_t* panel) {
  const int64_t blocks = block_count(a.k), stride = blocks * kBlockQuads * kVectorBytes;
  for (int64_t pair = begin; pair < end; ++pair) {
    const int64_t tile = pair * kVectorTiles;
    const uint8_t* codes = a.tiles + tile * tile_bytes(a.k, kBits);
    uint8_t* to = panel + (pair - begin) * stride;
    for (int64_t block = 0; block < blocks; ++block) {
      __m512i quads[kBlockQuads];
      decode_block<kBits>(codes + block * block_bytes(kBits), neighbour<kBits>(a, tile), quads);
#pragma GCC unroll 8
      for (int quad = 0; quad < kBlockQuads; ++quad)
        _mm512_store_si512(to + (block * kBlockQuads + quad) * kVectorBytes, quads[quad]);
    }
  }
  for (int64_t block = 0; block < x.rows.count; ++block) {
    for (int64_t pair = begin; pair < end; pair += kPanelVectors) {
      const int64_t vectors = smaller(kPanelVectors, end - pair), tile = pair * kVectorTiles;
      kByVectors[vectors - 1][x.rows.rows(block) - 1](
          a,
          operands_of(a, x, block, tile, vectors * kVectorTiles, panel + (pair - begin) * stride,
                      stride),
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

  const int64_t pairs = ceil_div(tile_count(a.n), kVectorTiles);
  const int64_t min_pairs = ceil_div(kMinTaskMacs, larger(a.m * kVectorRows * a.k, 1));
  if (few && a.m == 1) {
    parallel_for(tile_count(a.n), larger(min_pairs, 4) * kVectorTiles,
                 [&](int64_t begin, int64_t end) { multiply_row<kBits>(a, x, begin, end); });
    return;
  }
  if (few) {
    parallel_for(pairs, larger(min_pairs, 4),
                 [&](int64_t begin, int64_t end) { multiply_pairs<kBits>(a, x, begin, end); });
    return;
  }
  const int64_t pair_bytes = larger(block_count(a.k) * kBlockQuads * kVectorBytes, 1);
  const int64_t chunk = larger(kPanelBytes / pair_bytes / kPanelVectors, 1) * kPanelVectors;
  // Several tasks per thread even out their ends.
  const int64_t share = ceil_div(pairs, int64_t{4} * max_threads());
  const int64_t grain =
      larger(smaller(chunk, ceil_div(share, kPanelVectors) * kPanelVectors), min_pairs);
  parallel_for(pairs, grain, [&](int64_t begin, int64_t end) {
    const int64_t panel_floats = smaller(chunk, end - begin) * pair_bytes / sizeof(float);
    Scratch scratch(panel_floats);
    uint8_t* panel = reinterpret_cast<uint8_t*>(scratch.take(panel_floats));
    for (int64_t pair = begin; pair < end; pair += chunk)
      multiply_panel<kBits>(a, x, pair, smaller(pair + chunk, end), panel);
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
