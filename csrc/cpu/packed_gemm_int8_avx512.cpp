// SPDX-License-Identifier: Apache-2.0
// packed_gemm with activations quantized per row and group on AVX-512 VNNI: dpbusd multiplies four
// unsigned codes by four signed activations and adds them to 32 bits, at every width, 8 included.
// Sums are the integers of packed_gemm_int8_avx2.cpp, scaled in the same order: results are equal.
//
// Few rows: two tiles are decoded in registers and multiplied by up to 8 rows. Many rows, and
// groups that are no multiple of a block: a chunk of tiles is unpacked to bytes in the L2 cache,
// [tile pair][quad][64 bytes], and multiplied 6 rows by 64 outputs; the fp32 sums wait in memory.
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
// Measured: one stream of weights per thread, as on AVX2, is faster for so few rows.
constexpr int64_t kSingleStreamRows = 2;
// Measured: two streams of short rows of tiles are too much for the processor's own prefetching.
constexpr int64_t kPrefetchBytes = 1024;
constexpr int kManyRows = 6;
constexpr int kPanelVectors = 4;
constexpr int kPanelTiles = kPanelVectors * kVectorTiles;
// Measured: up to so many rows decoding again for every 8 of them is cheaper than a panel.
constexpr int64_t kPanelFromRows = 17;
constexpr int64_t kPanelBytes = 256 * 1024;
constexpr int kVectorBytes = kVectorTiles * kQuadBytes;
// Activations are bytes at every width.
constexpr int kByteBits = 4;
constexpr int kXQuadBytes = avx2::kXQuadBytes<kByteBits>;

inline __m512i broadcast_dword(const void* from) {
  int32_t value;
  std::memcpy(&value, from, sizeof value);
  return _mm512_set1_epi32(value);
}

// The type of dpbusd's sums. GCC stores arrays of __m512i, 64-bit integers, at every step.
using Sums = int32_t __attribute__((vector_size(64)));

inline Sums add_dots(Sums sums, __m512i codes, __m512i x) {
  return reinterpret_cast<Sums>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sums), codes, x));
}

// What a kernel reads for one block of rows and one or more vectors of outputs.
struct Operands {
  const uint8_t* codes;   // few rows: a tile; many rows: bytes, [vector][quad][64]
  int64_t codes_stride;   // few rows: bytes to the other tile; many rows: to the next vector
  const float* affine;    // [tile][group][scale, minimum][8]
  int64_t affine_stride;  // floats from one tile to the next
  int64_t tiles;          // that exist
  const uint8_t* x;
  const float* x_scales;
  const float* x_sums;
  const Segment* segments;
  int64_t segment_count;
};

// Ends a segment: out += s_x * (scale * products + minimum * sum(x_q)).
template <int kRows, int kVectors>
inline void scale_products(const Operands& a, int64_t segment, const Sums (*products)[kVectors],
                           __m512 (*out)[kVectors]) {
  const float* affine = a.affine + a.segments[segment].group * kAffineFloats;
#pragma GCC unroll 4
  for (int vector = 0; vector < kVectors; ++vector) {
    const float* pair = affine + vector * kVectorTiles * a.affine_stride;
    const int64_t stride = vector * kVectorTiles + 1 < a.tiles ? a.affine_stride : 0;
    const __m512 scale = load_pair(pair, stride);
    const __m512 minimum = load_pair(pair + kTileRows, stride);
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
      const __m512 x_scale = _mm512_set1_ps(a.x_scales[segment * kRows + row]);
      const __m512 x_sum = _mm512_set1_ps(a.x_sums[segment * kRows + row]);
      const __m512 scaled = _mm512_mul_ps(
          _mm512_cvtepi32_ps(reinterpret_cast<__m512i>(products[row][vector])), x_scale);
      out[row][vector] =
          _mm512_fmadd_ps(x_sum, minimum, _mm512_fmadd_ps(scaled, scale, out[row][vector]));
    }
  }
}

// Two tiles, decoded in registers. Segments are whole blocks.
template <int kBits, int kRows>
void few_rows(const Operands& a, __m512 (*out)[1]) {
  constexpr int kChains = kRows == 1 ? 4 : kRows < 4 ? 2 : 1;  // hide dpbusd's latency
  const uint8_t* block = a.codes;
  const uint8_t* x = a.x;
  for (int64_t segment = 0; segment < a.segment_count; ++segment) {
    Sums sums[kRows][kChains] = {};
    for (int64_t left = a.segments[segment].quads; left > 0; left -= kBlockQuads) {
      __m512i quads[kBlockQuads];
      for (int line = 0; line < kBits * kQuadBytes; line += 64) {
        _mm_prefetch(block + kPrefetchBytes + line, _MM_HINT_T0);
        _mm_prefetch(block + a.codes_stride + kPrefetchBytes + line, _MM_HINT_T0);
      }
      decode_block<kBits>(block, a.codes_stride, quads);
#pragma GCC unroll 8
      for (int quad = 0; quad < kBlockQuads; ++quad) {
#pragma GCC unroll 8
        for (int row = 0; row < kRows; ++row) {
          const __m512i value = broadcast_dword(x + (quad * kRows + row) * kXQuadBytes);
          sums[row][quad % kChains] = add_dots(sums[row][quad % kChains], quads[quad], value);
        }
      }
      block += block_bytes(kBits);
      x += kBlockQuads * kRows * kXQuadBytes;
    }
    Sums products[kRows][1];
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
      for (int chain = 1; chain < kChains; ++chain) sums[row][0] += sums[row][chain];
      products[row][0] = sums[row][0];
    }
    scale_products<kRows, 1>(a, segment, products, out);
  }
}

// The integer sums of one segment of a panel, which leave the registers once, at the end.
template <int kRows, int kVectors>
inline void sum_segment(const uint8_t* w, int64_t stride, const uint8_t* x, int64_t quads,
                        Sums (*products)[kVectors]) {
  Sums sums[kRows][kVectors] = {};
  for (; quads > 0; --quads, w += kVectorBytes, x += kRows * kXQuadBytes) {
    __m512i codes[kVectors];
#pragma GCC unroll 4
    for (int vector = 0; vector < kVectors; ++vector)
      codes[vector] = _mm512_load_si512(w + vector * stride);
#pragma GCC unroll 6
    for (int row = 0; row < kRows; ++row) {
      const __m512i value = broadcast_dword(x + row * kXQuadBytes);
#pragma GCC unroll 4
      for (int vector = 0; vector < kVectors; ++vector)
        sums[row][vector] = add_dots(sums[row][vector], codes[vector], value);
    }
  }
#pragma GCC unroll 6
  for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 4
    for (int vector = 0; vector < kVectors; ++vector) products[row][vector] = sums[row][vector];
}

// Unpacked bytes: widths differ in nothing.
template <int kRows, int kVectors>
void many_rows(const Operands& a, __m512 (*out)[kVectors]) {
  for (int64_t segment = 0; segment < a.segment_count; ++segment) {
    const Segment& s = a.segments[segment];
    Sums products[kRows][kVectors];
    sum_segment<kRows, kVectors>(a.codes + s.code_quad * kVectorBytes, a.codes_stride,
                                 a.x + s.x_quad * kRows * kXQuadBytes, s.quads, products);
    scale_products<kRows, kVectors>(a, segment, products, out);
  }
}

template <int kBits, int kRows>
void run_few(const PackedGemmArgs& a, const Operands& operands, int64_t row, int64_t tile) {
  __m512 out[kRows][1] = {};
  few_rows<kBits, kRows>(operands, out);
  for (int i = 0; i < kRows; ++i) store_outputs(a, row + i, tile, out[i][0]);
}

template <int kRows, int kVectors>
void run_many(const PackedGemmArgs& a, const Operands& operands, int64_t row, int64_t tile) {
  __m512 out[kRows][kVectors] = {};
  many_rows<kRows, kVectors>(operands, out);
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kVectors; ++j)
      store_outputs(a, row + i, tile + j * kVectorTiles, out[i][j]);
}

using Kernel = void (*)(const PackedGemmArgs&, const Operands&, int64_t, int64_t);
template <int kBits>
constexpr Kernel kFewRowsKernels[kFewRows] = {
    run_few<kBits, 1>, run_few<kBits, 2>, run_few<kBits, 3>, run_few<kBits, 4>,
    run_few<kBits, 5>, run_few<kBits, 6>, run_few<kBits, 7>, run_few<kBits, 8>};
template <int kVectors>
constexpr Kernel kPanelKernels[kManyRows] = {run_many<1, kVectors>, run_many<2, kVectors>,
                                             run_many<3, kVectors>, run_many<4, kVectors>,
                                             run_many<5, kVectors>, run_many<6, kVectors>};
constexpr const Kernel* kByVectors[kPanelVectors] = {kPanelKernels<1>, kPanelKernels<2>,
                                                     kPanelKernels<3>, kPanelKernels<4>};

Operands operands_of(const PackedGemmArgs& a, const Activations& x, int64_t block, int64_t tile,
                     const uint8_t* codes, int64_t codes_stride) {
  const int64_t first = x.rows.begin(block);
  const int64_t affine_stride = group_count(a.k, a.group_size) * kAffineFloats;
  return {codes,
          codes_stride,
          a.affine + tile * affine_stride,
          affine_stride,
          tile_count(a.n) - tile,
          x.codes + first * x.quads * kXQuadBytes,
          x.scales + first * x.segment_count,
          x.sums + first * x.segment_count,
          x.segments,
          x.segment_count};
}

// Bytes from a tile to its neighbour, 0 for a last one without.
template <int kBits>
int64_t neighbour(const PackedGemmArgs& a, int64_t tile) {
  return tile + 1 < tile_count(a.n) ? tile_bytes(a.k, kBits) : 0;
}

// Pairs of tiles [begin, end).
template <int kBits>
void multiply_pairs(const PackedGemmArgs& a, const Activations& x, int64_t begin, int64_t end) {
  for (int64_t tile = begin * kVectorTiles; tile < end * kVectorTiles; tile += kVectorTiles) {
    const uint8_t* codes = a.tiles + tile * tile_bytes(a.k, kBits);
    for (int64_t block = 0; block < x.rows.count; ++block)
      kFewRowsKernels<kBits>[x.rows.rows(block) - 1](
          a, operands_of(a, x, block, tile, codes, neighbour<kBits>(a, tile)), x.rows.begin(block),
          tile);
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
          a, operands_of(a, x, block, tile, panel + (pair - begin) * stride, stride),
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
  if (a.m <= kSingleStreamRows) return avx2::packed_gemm_int8(a);
  const std::vector<avx2::Segment> segments = avx2::make_segments(a);
  kByBits[a.bits - kMinBits](a, segments.data(), static_cast<int64_t>(segments.size()));
}

}  // namespace mmq::cpu::avx512

#endif
