// SPDX-License-Identifier: Apache-2.0
// packed_gemm with activations quantized per row and group on AVX2. With integer sums per group,
//   y = sum_groups s_x * (scale * sum(code * x_q) + minimum * sum(x_q)),
// or scale * (sum(code * x_q) - zero * sum(x_q)) where there are zeros of 16 bits.
//
// maddubs multiplies unsigned codes by signed activations and adds neighbours into 16 bits, with
// saturation. |pair| <= 2 * (2^b - 1) * 127, so 16-bit sums are safe for 8 additions up to 4 bits,
// 4 at 5, 2 at 6 and 1 at 7; then madd(ones) widens. At 8 bits one pair may overflow: codes and
// activations are widened to 16 bits first and madd adds straight into 32.
//
// Few rows: each tile is decoded in registers. Many rows, and groups that are no multiple of a
// block: a chunk of tiles is unpacked to bytes in the L2 cache, then multiplied 6 rows by a tile.
#if defined(__x86_64__)

#include <cstring>
#include <vector>

#include "cpu/activations_avx2.h"
#include "cpu/kernels.h"
#include "cpu/layout.h"
#include "cpu/packed_gemm_avx2.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/target_avx2.h"

MMQ_AVX2_BEGIN

namespace mmq::cpu::avx2 {
namespace {

constexpr int kFewRows = 4;
// Measured: up to so many rows decoding again for every 4 of them is cheaper than a panel, but not
// where codes are widened to 16 bits.
template <int kBits>
constexpr int64_t kPanelFromRows = kWide<kBits> ? kFewRows + 1 : 65;
constexpr int kManyRows = 6;
constexpr int64_t kPanelBytes = 256 * 1024;  // half of a 512 KB L2 cache

// 16-bit additions before widening; see above.
template <int kBits>
constexpr int kRunQuads = kBits <= 4   ? 8
                          : kBits == 5 ? 4
                          : kBits == 6 ? 2
                                       : 1;
static_assert(8 * 2 * 15 * 127 <= 32767 && 4 * 2 * 31 * 127 <= 32767 && 2 * 2 * 63 * 127 <= 32767 &&
              2 * 127 * 127 <= 32767);

inline __m256i broadcast_dword(const void* from) {
  int32_t value;
  std::memcpy(&value, from, sizeof value);
  return _mm256_set1_epi32(value);
}

// What a kernel reads for one block of rows and one tile.
struct Operands {
  const uint8_t* codes;  // few rows: as in layout.h; many rows: bytes, [quad][64]
  TileAffine affine[kHalves];
  const uint8_t* x;
  const float* x_scales;
  const float* x_sums;
  const Segment* segments;
  int64_t segment_count;
};

// products[row][half] += the dot products of `count` <= kRunQuads<kBits> quads for the first kCount
// halves there; codes(quad, half) yields a vector of codes, x points to the first quad. kInOrder
// keeps GCC from adding in a tree, for which it lacks registers.
template <int kBits, int kRows, int kCount, bool kInOrder, class Codes>
inline __attribute__((always_inline)) void add_run(int count, const Codes& codes, const uint8_t* x,
                                                   __m256i* products) {
  if constexpr (kWide<kBits>) {
    const __m256i even_bytes = _mm256_set1_epi16(0xff);
    __m256i even[kCount], odd[kCount];
#pragma GCC unroll 2
    for (int half = 0; half < kCount; ++half) {
      const __m256i quad = codes(0, half);
      even[half] = _mm256_and_si256(quad, even_bytes);
      odd[half] = _mm256_srli_epi16(quad, 8);
    }
#pragma GCC unroll 6
    for (int row = 0; row < kRows; ++row) {
      const __m256i x_even = broadcast_dword(x + row * 8), x_odd = broadcast_dword(x + row * 8 + 4);
#pragma GCC unroll 2
      for (int half = 0; half < kCount; ++half)
        products[row * kHalves + half] = _mm256_add_epi32(
            products[row * kHalves + half], _mm256_add_epi32(_mm256_madd_epi16(even[half], x_even),
                                                             _mm256_madd_epi16(odd[half], x_odd)));
    }
  } else {
    __m256i sums[kRows][kCount];
#pragma GCC unroll 8
    for (int quad = 0; quad < count; ++quad) {
      __m256i w[kCount];
#pragma GCC unroll 2
      for (int half = 0; half < kCount; ++half) w[half] = codes(quad, half);
#pragma GCC unroll 6
      for (int row = 0; row < kRows; ++row) {
        const __m256i value = broadcast_dword(x + (quad * kRows + row) * 4);
#pragma GCC unroll 2
        for (int half = 0; half < kCount; ++half) {
          const __m256i pairs = _mm256_maddubs_epi16(w[half], value);
          sums[row][half] = quad == 0 ? pairs : _mm256_add_epi16(sums[row][half], pairs);
          if constexpr (kInOrder) {
            if (quad > 0) __asm__("" : "+x"(sums[row][half]));
          }
        }
      }
    }
    const __m256i ones = _mm256_set1_epi16(1);
#pragma GCC unroll 6
    for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 2
      for (int half = 0; half < kCount; ++half)
        products[row * kHalves + half] = _mm256_add_epi32(products[row * kHalves + half],
                                                          _mm256_madd_epi16(sums[row][half], ones));
  }
}

// The end of a segment for both halves.
template <int kRows>
inline __attribute__((always_inline)) void end_segments(const Operands& a, int64_t segment,
                                                        const __m256i (*products)[kHalves],
                                                        __m256 (*out)[kHalves]) {
#pragma GCC unroll 2
  for (int half = 0; half < kHalves; ++half)
    end_segment<kRows, kHalves>(a.affine[half], a.segments[segment].group,
                                a.x_scales + segment * kRows, a.x_sums + segment * kRows,
                                products[0] + half, out[0] + half);
}

// Measured: in order, up to 4 bits take 0.77 to 0.85 of the time from 4 rows and groups of 64 on,
// but up to 1.2 times as long in groups of 32; short runs gain nothing.
template <int kBits>
constexpr bool kMayAddInOrder = kRunQuads<kBits> == kBlockQuads;
template <int kBits>
bool adds_in_order(const PackedGemmArgs& a) {
  return kMayAddInOrder<kBits> && a.m > 1 && smaller(a.group_size, a.k) > kBlockCols;
}

// Blocks of a segment times kCount halves, decoded in registers.
template <int kBits, int kRows, int kCount, bool kInOrder>
inline __attribute__((always_inline)) void add_blocks(const uint8_t* block, const uint8_t* x,
                                                      int64_t blocks, __m256i* products) {
  constexpr int kRun = kRunQuads<kBits>;
  __m256i sums[kRows][kHalves];
#pragma GCC unroll 4
  for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 2
    for (int half = 0; half < kCount; ++half) sums[row][half] = products[row * kHalves + half];
  for (; blocks > 0; --blocks, block += block_bytes(kBits)) {
    if constexpr (kRows == 1 && (kBits == 5 || kBits == 6)) touch_block<kBits>(block);
    __m256i decoded[kBlockQuads];
    if constexpr (kCount == 1) decode_block<kBits>(block, decoded);
#pragma GCC unroll 8
    for (int run = 0; run < kBlockQuads; run += kRun) {
      const auto codes = [&](int quad, int half) {
        return kCount == 1 ? decoded[run + quad]
                           : decode_quad<kBits>(block + half * kHalfBytes, run + quad);
      };
      add_run<kBits, kRows, kCount, kInOrder>(kRun, codes, x, sums[0]);
      x += kRun * kRows * kXQuadBytes<kBits>;
    }
  }
#pragma GCC unroll 4
  for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 2
    for (int half = 0; half < kCount; ++half) products[row * kHalves + half] = sums[row][half];
}

// Segments are whole blocks. The two halves share the broadcast activations; at widths whose
// decoding needs the registers they take turns, after so many blocks as stay in the L1 cache.
template <int kBits, int kRows, bool kInOrder>
void few_rows(const Operands& a, __m256 (*out)[kHalves]) {
  constexpr int kCount = kBits <= 4 || kBits == 8 ? kHalves : 1;
  constexpr int64_t kTurnBlocks = 8;
  const uint8_t* block = a.codes;
  const uint8_t* x = a.x;
  for (int64_t segment = 0; segment < a.segment_count; ++segment) {
    __m256i products[kRows][kHalves] = {};
    for (int64_t left = a.segments[segment].quads / kBlockQuads; left > 0;) {
      const int64_t blocks = kCount == kHalves ? left : smaller(left, kTurnBlocks);
#pragma GCC unroll 2
      for (int half = 0; half < kHalves; half += kCount)
        add_blocks<kBits, kRows, kCount, kInOrder>(block + half * kHalfBytes, x, blocks,
                                                   products[0] + half);
      left -= blocks;
      block += blocks * block_bytes(kBits);
      x += blocks * kBlockQuads * kRows * kXQuadBytes<kBits>;
    }
    end_segments<kRows>(a, segment, products, out);
  }
}

// Once unpacked, widths up to 4 differ in nothing and share one kernel.
template <int kBits>
constexpr int kPanelBits = kBits <= 4 ? 4 : kBits;

// Unpacked bytes.
template <int kBits, int kRows, bool kInOrder>
void many_rows(const Operands& a, __m256 (*out)[kHalves]) {
  constexpr int kRun = kRunQuads<kBits>;
  const uint8_t* x = a.x;
  for (int64_t segment = 0; segment < a.segment_count; ++segment) {
    __m256i products[kRows][kHalves] = {};
    const uint8_t* w = a.codes + a.segments[segment].code_quad * kQuadBytes;
    int64_t left = a.segments[segment].quads;
    const auto codes = [&](int quad, int half) {
      return load_vector(w + quad * kQuadBytes + half * kHalfBytes);
    };
    for (; left >= kRun; left -= kRun) {
      add_run<kBits, kRows, kHalves, kInOrder>(kRun, codes, x, products[0]);
      w += kRun * kQuadBytes;
      x += kRun * kRows * kXQuadBytes<kBits>;
    }
    for (; left > 0; --left) {
      add_run<kBits, kRows, kHalves, kInOrder>(1, codes, x, products[0]);
      w += kQuadBytes;
      x += kRows * kXQuadBytes<kBits>;
    }
    end_segments<kRows>(a, segment, products, out);
  }
}

template <int kBits, int kRows, bool kPanel, bool kInOrder>
void run_kernel(const PackedGemmArgs& a, const Operands& operands, int64_t row, int64_t tile) {
  __m256 out[kRows][kHalves] = {};
  if constexpr (kPanel)
    many_rows<kBits, kRows, kInOrder>(operands, out);
  else
    few_rows<kBits, kRows, kInOrder>(operands, out);
  for (int i = 0; i < kRows; ++i)
    for (int half = 0; half < kHalves; ++half)
      store_outputs(a, row + i, tile * kHalves + half, out[i][half]);
}

using Kernel = void (*)(const PackedGemmArgs&, const Operands&, int64_t, int64_t);
template <int kBits, bool kInOrder>
constexpr Kernel kFewRowsKernels[kFewRows] = {
    run_kernel<kBits, 1, false, kInOrder>, run_kernel<kBits, 2, false, kInOrder>,
    run_kernel<kBits, 3, false, kInOrder>, run_kernel<kBits, 4, false, kInOrder>};
template <int kBits, bool kInOrder>
constexpr Kernel kPanelKernels[kManyRows] = {
    run_kernel<kBits, 1, true, kInOrder>, run_kernel<kBits, 2, true, kInOrder>,
    run_kernel<kBits, 3, true, kInOrder>, run_kernel<kBits, 4, true, kInOrder>,
    run_kernel<kBits, 5, true, kInOrder>, run_kernel<kBits, 6, true, kInOrder>};
template <int kBits>
const Kernel* few_rows_kernels(const PackedGemmArgs& a) {
  return adds_in_order<kBits>(a) ? kFewRowsKernels<kBits, kMayAddInOrder<kBits>>
                                 : kFewRowsKernels<kBits, false>;
}
template <int kBits>
const Kernel* panel_kernels(const PackedGemmArgs& a) {
  return adds_in_order<kBits>(a) ? kPanelKernels<kBits, kMayAddInOrder<kBits>>
                                 : kPanelKernels<kBits, false>;
}

template <int kBits>
Operands operands_of(const PackedGemmArgs& a, const Activations& x, int64_t block, int64_t tile,
                     const uint8_t* codes) {
  const int64_t first = x.rows.begin(block);
  return {codes,
          {half_affine(a, tile * kHalves), half_affine(a, tile * kHalves + 1)},
          x.codes + first * x.quads * kXQuadBytes<kBits>,
          x.scales + first * x.segment_count,
          x.sums + first * x.segment_count,
          x.segments,
          x.segment_count};
}

template <int kBits>
void multiply_tiles(const PackedGemmArgs& a, const Activations& x, int64_t begin, int64_t end) {
  for (int64_t tile = begin; tile < end; ++tile) {
    const uint8_t* codes = a.tiles + tile * tile_bytes(a.k, kBits);
    for (int64_t block = 0; block < x.rows.count; ++block)
      few_rows_kernels<kBits>(a)[x.rows.rows(block) - 1](
          a, operands_of<kBits>(a, x, block, tile, codes), x.rows.begin(block), tile);
  }
}

// Tiles [begin, end) by way of a panel of bytes that holds them all.
template <int kBits>
void multiply_panel(const PackedGemmArgs& a, const Activations& x, int64_t begin, int64_t end,
                    uint8_t* panel) {
  const int64_t blocks = block_count(a.k);
  for (int64_t i = 0; i < (end - begin) * blocks; ++i) {
    const uint8_t* block = a.tiles + (begin * blocks + i) * block_bytes(kBits);
    for (int64_t half = 0; half < kHalves * kHalfBytes; half += kHalfBytes) {
      __m256i quads[kBlockQuads];
      decode_block<kBits>(block + half, quads);
#pragma GCC unroll 8
      for (int quad = 0; quad < kBlockQuads; ++quad)
        _mm256_store_si256(
            reinterpret_cast<__m256i*>(panel + i * kBlockCodes + quad * kQuadBytes + half),
            quads[quad]);
    }
  }
  for (int64_t block = 0; block < x.rows.count; ++block)
    for (int64_t tile = begin; tile < end; ++tile)
      panel_kernels<kPanelBits<kBits>>(a)[x.rows.rows(block) - 1](
          a, operands_of<kBits>(a, x, block, tile, panel + (tile - begin) * blocks * kBlockCodes),
          x.rows.begin(block), tile);
}

template <int kBits>
void multiply(const PackedGemmArgs& a, const Segment* segments, int64_t segment_count) {
  const bool few = a.m < kPanelFromRows<kBits> && whole_blocks(a);
  const QuantizedActivations<kBits> quantized(a, few ? kFewRows : kManyRows, segments,
                                              segment_count);
  const Activations& x = quantized.get();

  const int64_t tiles = tile_count(a.n);
  const int64_t min_tiles = ceil_div(kMinTaskMacs, larger(a.m * kTileRows * a.k, 1));
  if (few) {
    parallel_for(tiles, few_rows_grain(a),
                 [&](int64_t begin, int64_t end) { multiply_tiles<kBits>(a, x, begin, end); });
    return;
  }
  const int64_t tile_codes = larger(block_count(a.k) * kBlockCodes, 1);
  const int64_t chunk = larger(kPanelBytes / tile_codes, 1);
  // Several tasks per thread even out their ends.
  const int64_t share = ceil_div(tiles, int64_t{4} * max_threads());
  parallel_for(tiles, larger(smaller(chunk, share), min_tiles), [&](int64_t begin, int64_t end) {
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
}  // namespace mmq::cpu::avx2

MMQ_AVX2_END

namespace mmq::cpu::avx2 {

void packed_gemm_int8(const PackedGemmArgs& a) {
  const std::vector<Segment> segments = make_segments(a);
  kByBits[a.bits - kMinBits](a, segments.data(), static_cast<int64_t>(segments.size()));
}

}  // namespace mmq::cpu::avx2

#endif
