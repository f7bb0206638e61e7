// SPDX-License-Identifier: Apache-2.0
// packed_gemm with activations quantized per row and group on AVX-512 VNNI: dpbusd multiplies four
// unsigned codes by four signed activations and adds them to 32 bits, at every width, 8 included.
// Sums are the integers of packed_gemm_int8_avx2.cpp, scaled in the same order: results are equal.
//
// Few rows: a tile, or two if there is more than one row, is decoded in registers and multiplied by
// up to 8 rows. Many rows, and groups that are no multiple of a block: a chunk of tiles is unpacked
// to bytes in the L2 cache, [tile pair][quad][64 bytes], and multiplied 6 rows by 32 outputs, whose
// integer and fp32 sums all stay in registers: stores of 64 bytes take two cycles.
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
// Measured: a single row is bound by memory, and one stream of weights per thread, a tile at a
// time, needs no prefetch.
constexpr int64_t kSingleStreamRows = 1;
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

// The two vectors of outputs: the 8 rows of a tile, or the 16 of two neighbouring tiles. Sums is
// the type of dpbusd's sums; GCC stores arrays of __m512i, 64-bit integers, at every step.
struct OneTile {
  static constexpr int kTiles = 1;
  using Codes = __m256i;
  using Floats = __m256;
  using Sums = int32_t __attribute__((vector_size(32)));

  template <int kBits>
  static void decode_block(const uint8_t* block, int64_t, Codes* quads) {
    avx2::decode_block<kBits>(block, quads);
  }
  static Sums add_dots(Sums sums, Codes codes, const uint8_t* x) {
    const __m256i value = _mm256_set1_epi32(load_dword(x));
    return reinterpret_cast<Sums>(
        _mm256_dpbusd_epi32(reinterpret_cast<__m256i>(sums), codes, value));
  }
  static avx2::Grid load_grid(const avx2::TileAffine* tiles, int64_t group) {
    return avx2::load_grid(tiles[0], group);
  }
  static Floats set1(float value) { return _mm256_set1_ps(value); }
  static Floats to_floats(Sums sums) { return _mm256_cvtepi32_ps(reinterpret_cast<__m256i>(sums)); }
  static Floats fmadd(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
  static void store_outputs(const PackedGemmArgs& a, int64_t row, int64_t tile, Floats sums) {
    avx2::store_outputs(a, row, tile, sums);
  }
};

struct TwoTiles {
  static constexpr int kTiles = 2;
  using Codes = __m512i;
  using Floats = __m512;
  using Sums = int32_t __attribute__((vector_size(64)));

  template <int kBits>
  static void decode_block(const uint8_t* block, int64_t stride, Codes* quads) {
    avx512::decode_block<kBits>(block, stride, quads);
  }
  static Sums add_dots(Sums sums, Codes codes, const uint8_t* x) {
    const __m512i value = _mm512_set1_epi32(load_dword(x));
    return reinterpret_cast<Sums>(
        _mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sums), codes, value));
  }
  static Grid load_grid(const avx2::TileAffine* tiles, int64_t group) {
    return avx512::load_grid(tiles, group);
  }
  static Floats set1(float value) { return _mm512_set1_ps(value); }
  static Floats to_floats(Sums sums) { return _mm512_cvtepi32_ps(reinterpret_cast<__m512i>(sums)); }
  static Floats fmadd(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
  static void store_outputs(const PackedGemmArgs& a, int64_t row, int64_t tile, Floats sums) {
    avx512::store_outputs(a, row, tile, sums);
  }
};

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

// Ends a segment: out += s_x * (scale * products + minimum * sum(x_q)).
template <class V, int kRows, int kVectors>
inline __attribute__((always_inline)) void scale_products(
    const Operands& a, int64_t segment, const typename V::Sums (*products)[kVectors],
    typename V::Floats (*out)[kVectors]) {
#pragma GCC unroll 4
  for (int vector = 0; vector < kVectors; ++vector) {
    const auto grid = V::load_grid(a.affine[vector], a.segments[segment].group);
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
      const auto x_scale = V::set1(a.x_scales[segment * kRows + row]);
      const auto x_sum = V::set1(a.x_sums[segment * kRows + row]);
      const auto scaled = V::to_floats(products[row][vector]) * x_scale;
      out[row][vector] =
          V::fmadd(x_sum, grid.minimum, V::fmadd(scaled, grid.scale, out[row][vector]));
    }
  }
}

// A vector of outputs, decoded in registers. Segments are whole blocks.
template <class V, int kBits, int kRows>
void few_rows(const Operands& a, typename V::Floats (*y)[1]) {
  constexpr int kChains = kRows == 1 ? 4 : kRows < 4 ? 2 : 1;  // hide dpbusd's latency
  typename V::Floats out[kRows][1] = {};
  const uint8_t* block = a.codes;
  const uint8_t* tile_end = a.codes + a.codes_stride;
  const uint8_t* x = a.x;
  for (int64_t segment = 0; segment < a.segment_count; ++segment) {
    typename V::Sums sums[kRows][kChains] = {};
    const uint8_t* end = block + a.segments[segment].quads / kBlockQuads * block_bytes(kBits);
    for (; block != end; block += block_bytes(kBits), x += kBlockQuads * kRows * kXQuadBytes) {
      if constexpr (V::kTiles > 1) {
        const uint8_t* ahead = block + kPrefetchBytes;
        if (ahead >= tile_end) ahead += a.codes_stride;  // the tiles after these
        for (int line = 0; line < kBits * kQuadBytes; line += kLineBytes) {
          _mm_prefetch(ahead + line, _MM_HINT_T1);
          _mm_prefetch(ahead + a.codes_stride + line, _MM_HINT_T1);
        }
      }
      typename V::Codes quads[kBlockQuads];
      V::template decode_block<kBits>(block, a.codes_stride, quads);
#pragma GCC unroll 8
      for (int quad = 0; quad < kBlockQuads; ++quad) {
#pragma GCC unroll 8
        for (int row = 0; row < kRows; ++row) {
          const uint8_t* value = x + (quad * kRows + row) * kXQuadBytes;
          sums[row][quad % kChains] = V::add_dots(sums[row][quad % kChains], quads[quad], value);
        }
      }
    }
    typename V::Sums products[kRows][1];
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
      for (int chain = 1; chain < kChains; ++chain) sums[row][0] += sums[row][chain];
      products[row][0] = sums[row][0];
    }
    scale_products<V, kRows, 1>(a, segment, products, out);
  }
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) y[row][0] = out[row][0];
}

// Unpacked bytes: widths differ in nothing.
template <int kRows, int kVectors>
void many_rows(const Operands& a, __m512 (*y)[kVectors]) {
  __m512 out[kRows][kVectors] = {};
  for (int64_t segment = 0; segment < a.segment_count; ++segment) {
    const Segment& s = a.segments[segment];
    const uint8_t* w = a.codes + s.code_quad * kVectorBytes;
    const uint8_t* x = a.x + s.x_quad * kRows * kXQuadBytes;
    TwoTiles::Sums sums[kRows][kVectors] = {};
    for (int64_t quad = 0; quad < s.quads; ++quad, w += kVectorBytes, x += kRows * kXQuadBytes) {
      __m512i codes[kVectors];
#pragma GCC unroll 4
      for (int vector = 0; vector < kVectors; ++vector)
        codes[vector] = _mm512_load_si512(w + vector * a.codes_stride);
#pragma GCC unroll 6
      for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
        for (int vector = 0; vector < kVectors; ++vector)
          sums[row][vector] =
              TwoTiles::add_dots(sums[row][vector], codes[vector], x + row * kXQuadBytes);
      }
    }
    scale_products<TwoTiles, kRows, kVectors>(a, segment, sums, out);
  }
#pragma GCC unroll 6
  for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 4
    for (int vector = 0; vector < kVectors; ++vector) y[row][vector] = out[row][vector];
}

template <class V, int kBits, int kRows>
void run_few(const PackedGemmArgs& a, const Operands& operands, int64_t row, int64_t tile) {
  typename V::Floats out[kRows][1];
  few_rows<V, kBits, kRows>(operands, out);
  for (int i = 0; i < kRows; ++i) V::store_outputs(a, row + i, tile, out[i][0]);
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
// A block has one row only where the call has one.
template <int kBits>
constexpr Kernel kFewRowsKernels[kFewRows] = {
    run_few<OneTile, kBits, 1>,  run_few<TwoTiles, kBits, 2>, run_few<TwoTiles, kBits, 3>,
    run_few<TwoTiles, kBits, 4>, run_few<TwoTiles, kBits, 5>, run_few<TwoTiles, kBits, 6>,
    run_few<TwoTiles, kBits, 7>, run_few<TwoTiles, kBits, 8>};
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

// Tiles [begin, end), `step` at a time.
template <int kBits>
void multiply_tiles(const PackedGemmArgs& a, const Activations& x, int64_t begin, int64_t end,
                    int64_t step) {
  for (int64_t tile = begin; tile < end; tile += step) {
    const uint8_t* codes = a.tiles + tile * tile_bytes(a.k, kBits);
    for (int64_t block = 0; block < x.rows.count; ++block)
      kFewRowsKernels<kBits>[x.rows.rows(block) - 1](
          a, operands_of(a, x, block, tile, step, codes, neighbour<kBits>(a, tile)),
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
  if (few) {
    const int64_t step = a.m <= kSingleStreamRows ? 1 : kVectorTiles;
    parallel_for(ceil_div(tile_count(a.n), step), larger(min_pairs, 4) * kVectorTiles / step,
                 [&](int64_t begin, int64_t end) {
                   multiply_tiles<kBits>(a, x, begin * step, smaller(end * step, tile_count(a.n)),
                                         step);
                 });
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
