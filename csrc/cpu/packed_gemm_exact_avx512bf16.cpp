// SPDX-License-Identifier: Apache-2.0
// packed_gemm with bfloat16 activations on AVX512-BF16: vdpbf16ps multiplies pairs of bfloat16
// numbers and adds the products to fp32 sums, at twice the rate of fp32 multiply-adds. The frame is
// dense_panel_avx2.h: 7 rows by 32 outputs, whose 14 sums and 14 totals both stay in registers.
//
//   panel  [pair of columns][outputs][2]          codes less the integer zero (codes alone where
//                                                 there are minima): at most 255, exact in bfloat16
//          scales, minima [segment][outputs]      fp32, behind it
//   x      [panel][row block][pair][kRowSlots][2] zeros where there is no row or column
//
// A segment is what a panel has of one group, at most kChainCols columns. A segment's sum has no
// scale yet; totals += scale * segment's sum, and at the end of a group minimum * sum of x.
//
// Rounding. The product of two bfloat16 numbers has 16 bits: exact. vdpbf16ps adds the two products
// one after the other (observed: the odd column first, on Zen 4), so a segment's sum is a chain of
// at most kChainCols fp32 additions, as everywhere in exact mode; so it is where the products are
// added to each other first. The instruction takes subnormal numbers for zeros and makes none.
// x is therefore looked through while it is packed: if a magnitude is neither zero nor in
// [2^-119, 2^111), the call is left to the fp32 kernels. Otherwise every number that occurs is a
// multiple of 2^-126 (8 significant bits from 2^-119 on; rounding to fp32 keeps that), hence zero
// or normal, and no sum reaches 256 * 255 * 2^111 < 2^127. NaN and infinity go the same way out.
#if defined(__x86_64__)

#include <cstring>

#include "cpu/dense_panel_avx2.h"
#include "cpu/kernels.h"
#include "cpu/layout.h"
#include "cpu/packed_gemm_avx512.h"
#include "cpu/target_avx512bf16.h"

MMQ_AVX512BF16_BEGIN

namespace mmq::cpu::avx512bf16 {
namespace {

using avx2::PanelOperands;
using avx2::PanelRows;
using avx2::RowBlocks;
using avx2::smaller;

// Measured: from so many rows on it is faster than decoding in registers at every width (Zen 4).
constexpr int64_t kFromRows = 6;

constexpr int kPairCols = 2;
constexpr int kVectors = 2;
constexpr int kCols = kVectors * kTileRows;
constexpr int64_t kDepth = avx2::kPanelFloats / kCols * kPairCols;
constexpr int kRowSlots = 8;
constexpr int64_t kBlockFloats = kDepth / kPairCols * kRowSlots;
constexpr int kMaxSegments = kDepth / kBlockCols;
constexpr int kMinimaAt = kMaxSegments * kCols;  // behind the scales
constexpr int kScaleFloats = 2 * kMinimaAt;

// --- activations ---

// The bits of 2^-119, and how many magnitudes lie from there to below 2^111.
constexpr int16_t kLeast = (127 - 119) << 7, kMagnitudes = (119 + 111) << 7;

inline __mmask32 first_lanes(int64_t count) {
  return count >= 32 ? ~__mmask32{0} : (__mmask32{1} << count) - 1;
}

// Transposes 8 rows of 16 dwords: to[column][row].
inline void transpose(const __m512i* rows, float* to) {
  __m512i lanes[4][2];  // [column % 4][row / 4], 128 bits for each column / 4
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m512i* four = rows + 4 * i;
    const __m512i low01 = _mm512_unpacklo_epi32(four[0], four[1]);
    const __m512i low23 = _mm512_unpacklo_epi32(four[2], four[3]);
    const __m512i high01 = _mm512_unpackhi_epi32(four[0], four[1]);
    const __m512i high23 = _mm512_unpackhi_epi32(four[2], four[3]);
    lanes[0][i] = _mm512_unpacklo_epi64(low01, low23);
    lanes[1][i] = _mm512_unpackhi_epi64(low01, low23);
    lanes[2][i] = _mm512_unpacklo_epi64(high01, high23);
    lanes[3][i] = _mm512_unpackhi_epi64(high01, high23);
  }
  // Selections of 128 bits: the first or last two of each operand, the even or odd of each.
  constexpr int kFirst = 0x44, kLast = 0xee, kEven = 0x88, kOdd = 0xdd;
#pragma GCC unroll 2
  for (int i = 0; i < 4; i += 2, to += 16) {
    const __m512i* left = lanes[i];
    const __m512i* right = lanes[i + 1];
    const __m512i a = _mm512_shuffle_i32x4(left[0], left[1], kFirst);
    const __m512i b = _mm512_shuffle_i32x4(right[0], right[1], kFirst);
    const __m512i c = _mm512_shuffle_i32x4(left[0], left[1], kLast);
    const __m512i d = _mm512_shuffle_i32x4(right[0], right[1], kLast);
    _mm512_store_si512(to, _mm512_shuffle_i32x4(a, b, kEven));
    _mm512_store_si512(to + 32, _mm512_shuffle_i32x4(a, b, kOdd));
    _mm512_store_si512(to + 64, _mm512_shuffle_i32x4(c, d, kEven));
    _mm512_store_si512(to + 96, _mm512_shuffle_i32x4(c, d, kOdd));
  }
}

// `count` rows of one panel, `stride` apart, to to[pair][kRowSlots], with zeros where there is no
// row or column. False if a number is not zero and has a magnitude outside [2^-119, 2^111).
bool pack_block(const uint16_t* from, int64_t stride, int64_t count, int64_t cols, float* to) {
  __mmask32 other = 0;
  for (int64_t i = 0; i < cols; i += 32, to += 32 / kPairCols * kRowSlots) {
    const __mmask32 lanes = first_lanes(cols - i);
    __m512i rows[kRowSlots] = {};
    for (int64_t row = 0; row < count; ++row) {
      rows[row] = _mm512_maskz_loadu_epi16(lanes, from + row * stride + i);
      const __m512i magnitude = _mm512_and_si512(rows[row], _mm512_set1_epi16(0x7fff));
      other |= _mm512_mask_cmpge_epu16_mask(_mm512_test_epi16_mask(magnitude, magnitude),
                                            _mm512_sub_epi16(magnitude, _mm512_set1_epi16(kLeast)),
                                            _mm512_set1_epi16(kMagnitudes));
    }
    transpose(rows, to);
  }
  return other == 0;
}

// The sum of x[0, count), in 16 chains per kChainCols columns.
float sum_of(const uint16_t* x, int64_t count) {
  float total = 0;
  for (int64_t begin = 0; begin < count; begin += kChainCols) {
    __m512 sums = _mm512_setzero_ps();
    for (int64_t i = begin; i < smaller(begin + kChainCols, count); i += 16) {
      const __mmask16 lanes = static_cast<__mmask16>(first_lanes(smaller(count - i, 16)));
      const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, x + i));
      sums = _mm512_add_ps(sums, _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16)));
    }
    total += _mm512_reduce_add_ps(sums);
  }
  return total;
}

// Packs the rows, and sums their groups if there are minima. False: some x is tiny, huge or not
// finite.
bool pack(const PackedGemmArgs& a, const RowBlocks& rows, float* x, float* sums) {
  const int64_t groups = group_count(a.k, a.group_size);
  Scratch flags(rows.count);
  float* plain = flags.take(rows.count);
  parallel_for(rows.count, 1 + kMinTaskMacs * rows.count / (a.m * a.k),
               [&](int64_t block, int64_t end) {
                 for (; block < end; ++block) {
                   const int64_t first = rows.begin(block), count = rows.rows(block);
                   const uint16_t* from = a.x_bfloat16 + first * a.k;
                   bool good = true;
                   for (int64_t k = 0; k < a.k; k += kDepth)
                     good &= pack_block(from + k, a.k, count, smaller(kDepth, a.k - k),
                                        x + (k / kDepth * rows.count + block) * kBlockFloats);
                   plain[block] = good;
                   if (!sums) continue;
                   float* sum = sums + first * groups;
                   for (int64_t row = 0; row < count; ++row)
                     for (int64_t k = 0; k < a.k; k += a.group_size)
                       *sum++ = sum_of(from + row * a.k + k, smaller(a.group_size, a.k - k));
                 }
               });
  bool all = true;
  for (int64_t block = 0; block < rows.count; ++block) all = all && plain[block] != 0;
  return all;
}

// --- weights ---

// w = (code - zero) * scale + minimum of 16 rows; zeros are integers.
struct IntegerGrid {
  __m512 scale, zero, minimum;
};

inline IntegerGrid load_integer_grid(const avx2::TileAffine& a, int64_t group) {
  if (a.kind == AffineKind::kScaleMin32) {
    const avx512::Grid grid = avx512::load_tile_grid(a, group);
    return {grid.scale, _mm512_setzero_ps(), grid.minimum};
  }
  const uint8_t* from = a.data + group * affine_bytes(a.kind);
  const __m512 zero = a.kind == AffineKind::kScale16
                          ? _mm512_set1_ps(-a.minus_zero)
                          : avx512::load_scales(from + kTileRows * 2, a.type);
  return {avx512::load_scales(from, a.type), zero, _mm512_setzero_ps()};
}

// A byte of a dword, ORed where it lies into the significand of a power of two whose last place
// there is 1, is that power plus the byte; less power plus zero it is the byte less the zero.
struct ByteToFloat {
  __m512i mask, power;
  __m512 offset;
  ByteToFloat(int position, __m512 zero)
      : mask(_mm512_set1_epi32(0xff << position)),
        power(_mm512_set1_epi32((127 + 23 - position) << 23)),
        offset(_mm512_add_ps(_mm512_castsi512_ps(power), zero)) {}
  __m512i operator()(__m512i dwords) const {
    constexpr int kAndOr = 0xea;  // (a & b) | c
    return _mm512_castps_si512(_mm512_sub_ps(
        _mm512_castsi512_ps(_mm512_ternarylogic_epi32(dwords, mask, power, kAndOr)), offset));
  }
};

// One block to pairs out[16][kCols].
template <int kBits>
inline void decode_pairs(const uint8_t* block, __m512 zero, float* out) {
  const ByteToFloat even(0, zero), odd(8, zero);
  __m512i quads[kBlockQuads];
  avx512::decode_block<kBits>(block, quads);
#pragma GCC unroll 8
  for (int quad = 0; quad < kBlockQuads; ++quad) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half, out += kCols) {
      const __m512i bytes = half ? _mm512_srli_epi32(quads[quad], 16) : quads[quad];
      // At most 8 significant bits: the lower halves are zero.
      _mm512_store_si512(out, _mm512_or_si512(_mm512_srli_epi32(even(bytes), 16), odd(bytes)));
    }
  }
}

// Columns [begin, end) of a strip, with the scales and minima of its segments. Minima are zero
// where a group goes on in the next panel; outputs of tiles that do not exist are zero.
template <int kBits>
void decode_panel(const PackedGemmArgs& a, int64_t tile, int64_t begin, int64_t end, float* panel) {
  const int64_t tiles = tile_count(a.n);
  if (tile + kVectors > tiles)
    std::memset(panel, 0, sizeof(float) * (avx2::kPanelFloats + kScaleFloats));
  const int64_t last_tile = smaller(tile + kVectors, tiles);
  for (; tile < last_tile; ++tile, panel += kTileRows) {
    const avx2::TileAffine affine = avx2::tile_affine(a, tile);
    const uint8_t* block =
        a.tiles + tile * tile_bytes(a.k, kBits) + begin / kBlockCols * block_bytes(kBits);
    float* out = panel;
    float* scales = panel + avx2::kPanelFloats;
    for (int64_t k = begin; k < end; scales += kCols) {
      const int64_t group = k / a.group_size, group_end = smaller((group + 1) * a.group_size, a.k);
      const int64_t stop = smaller(group_end, end);
      const IntegerGrid grid = load_integer_grid(affine, group);
      _mm512_store_ps(scales, grid.scale);
      _mm512_store_ps(scales + kMinimaAt, stop == group_end ? grid.minimum : _mm512_setzero_ps());
      for (; k < stop;
           k += kBlockCols, block += block_bytes(kBits), out += kBlockCols / kPairCols * kCols)
        decode_pairs<kBits>(block, grid.zero, out);
      k = stop;
    }
  }
}

// --- products ---

template <int kRows>
void panel_kernel(const PanelOperands& a) {
  const float* x = a.x;
  const float* w = a.panel;
  const float* scales = a.panel + avx2::kPanelFloats;
  const int64_t end = a.k + a.depth;
  int64_t group = a.k / a.group_size;
  __m512 out[kRows][kVectors] = {};
  if (!a.begin) {
#pragma GCC unroll 12
    for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 2
      for (int i = 0; i < kVectors; ++i)
        out[row][i] = _mm512_load_ps(a.sums + row * kCols + i * kTileRows);
  }
  for (int64_t k = a.k; k < end; ++group, scales += kCols) {
    const int64_t stop = smaller((group + 1) * a.group_size, end);
    __m512 sums[kRows][kVectors] = {};
    for (; k < stop; k += kPairCols, x += kRowSlots, w += kCols) {
      const __m512bh weights[kVectors] = {(__m512bh)_mm512_load_ps(w),
                                          (__m512bh)_mm512_load_ps(w + kTileRows)};
#pragma GCC unroll 12
      for (int row = 0; row < kRows; ++row) {
        const __m512bh value = (__m512bh)_mm512_set1_ps(x[row]);
#pragma GCC unroll 2
        for (int i = 0; i < kVectors; ++i)
          sums[row][i] = _mm512_dpbf16_ps(sums[row][i], value, weights[i]);
      }
    }
    k = stop;
#pragma GCC unroll 2
    for (int i = 0; i < kVectors; ++i) {
      const __m512 scale = _mm512_load_ps(scales + i * kTileRows);
#pragma GCC unroll 12
      for (int row = 0; row < kRows; ++row)
        out[row][i] = _mm512_fmadd_ps(sums[row][i], scale, out[row][i]);
    }
    if (!a.x_sums) continue;
#pragma GCC unroll 2
    for (int i = 0; i < kVectors; ++i) {
      const __m512 minimum = _mm512_load_ps(scales + kMinimaAt + i * kTileRows);
#pragma GCC unroll 12
      for (int row = 0; row < kRows; ++row)
        out[row][i] =
            _mm512_fmadd_ps(_mm512_set1_ps(a.x_sums[row * a.groups + group]), minimum, out[row][i]);
    }
  }
#pragma GCC unroll 12
  for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 2
    for (int i = 0; i < kVectors; ++i)
      _mm512_store_ps(a.sums + row * kCols + i * kTileRows, out[row][i]);
}

// A strip's sums, plus bias, to row `row` of y, rounded to nearest even; fewer at the end of n.
void store_strip(const PackedGemmArgs& a, int64_t row, int64_t tile, const float* sums) {
  for (int i = 0; i < kVectors; ++i, sums += kTileRows) {
    const int64_t first = tile * kTileRows + i * kTileRows;
    if (first >= a.n) return;
    const __mmask16 lanes = static_cast<__mmask16>(first_lanes(smaller(a.n - first, kTileRows)));
    __m512 sum = _mm512_load_ps(sums);
    if (a.bias) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(lanes, a.bias + first));
    // Not by vcvtneps2bf16, which makes zeros of subnormal numbers.
    const __m512i bits = _mm512_castps_si512(sum);
    const __m512i even = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded =
        _mm512_add_epi32(bits, _mm512_add_epi32(even, _mm512_set1_epi32(0x7fff)));
    const __m512i kept = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(sum, sum, _CMP_UNORD_Q),
                                               _mm512_set1_epi32(0x7fc00000));
    _mm256_mask_storeu_epi16(a.y_bfloat16 + row * a.n + first, lanes,
                             _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16)));
  }
}

struct Panel {
  static constexpr int kRows = 7;
  static constexpr int kTiles = kCols / kTileRows;
  static constexpr int64_t kDepth = avx512bf16::kDepth;
  static constexpr int64_t kBlockFloats = avx512bf16::kBlockFloats;
  static constexpr int64_t kScaleFloats = avx512bf16::kScaleFloats;
  // Measured (Zen 4): 512 rows in one task, for which weights are decoded once, take 2 % less time
  // than in two.
  static constexpr int64_t kChunkRows = 640;
  // Tasks of one strip lose nothing and even out the threads' ends.
  static constexpr int64_t kChunkTiles = kVectors;

  static void multiply(int64_t rows, const PanelOperands& operands) {
    static constexpr void (*kKernels[kRows])(const PanelOperands&) = {
        panel_kernel<1>, panel_kernel<2>, panel_kernel<3>, panel_kernel<4>,
        panel_kernel<5>, panel_kernel<6>, panel_kernel<7>};
    kKernels[rows - 1](operands);
  }

  template <int kBits>
  static void decode(const PackedGemmArgs& a, int64_t tile, int64_t begin, int64_t end,
                     float* panel) {
    decode_panel<kBits>(a, tile, begin, end, panel);
  }

  static void store(const PackedGemmArgs& a, int64_t row, int64_t tile, const float* sums) {
    store_strip(a, row, tile, sums);
  }
};

constexpr void (*kByBits[])(const PackedGemmArgs&, const RowBlocks&, const PanelRows&) = {
    avx2::multiply_packed_rows<Panel, 2>, avx2::multiply_packed_rows<Panel, 3>,
    avx2::multiply_packed_rows<Panel, 4>, avx2::multiply_packed_rows<Panel, 5>,
    avx2::multiply_packed_rows<Panel, 6>, avx2::multiply_packed_rows<Panel, 7>,
    avx2::multiply_packed_rows<Panel, 8>};

bool multiply(const PackedGemmArgs& a) {
  const RowBlocks rows(a.m, Panel::kRows);
  const bool minima = a.affine_kind == AffineKind::kScaleMin32;
  const int64_t x_floats = ceil_div(a.k, kDepth) * rows.count * kBlockFloats;
  const int64_t sum_floats = minima ? a.m * group_count(a.k, a.group_size) : 0;
  Scratch memory(Scratch::padded(x_floats) + sum_floats);
  float* x = memory.take(x_floats);
  float* sums = minima ? memory.take(sum_floats) : nullptr;
  if (!pack(a, rows, x, sums)) return false;
  kByBits[a.bits - kMinBits](a, rows, {x, sums});
  return true;
}

}  // namespace
}  // namespace mmq::cpu::avx512bf16

MMQ_AVX512BF16_END

namespace mmq::cpu::avx512bf16 {

bool packed_gemm_bfloat16(const PackedGemmArgs& a) {
  const bool whole_blocks = a.group_size % kBlockCols == 0 || a.group_size >= a.k;
  return a.m >= kFromRows && a.k > 0 && whole_blocks && multiply(a);
}

}  // namespace mmq::cpu::avx512bf16

#endif
