// SPDX-License-Identifier: Apache-2.0
// Activations quantized per row and group, in the order that packed_gemm_int8_avx2.cpp reads; a
// header of that file only.
#pragma once

#if defined(__x86_64__)

#include <cstring>
#include <limits>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/layout.h"
#include "cpu/packed_gemm_avx2.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/target_avx2.h"

namespace mmq::cpu::avx2 {
namespace {

// A run of columns of one group that is summed in integers. Where a group begins or ends inside a
// quad, the two groups' segments both read that quad of codes, each with its own copy of the
// activations, which is zero outside the segment.
//
// 32 bits each: kernels read a segment per group and tile, beside x in the L1 cache.
struct Segment {
  int32_t group;
  int32_t begin, end;  // columns
  int32_t code_quad;   // first quad of codes
  int32_t x_quad;      // first quad of quantized activations
  int32_t quads;
};

// 32-bit sums hold 2^14 products of 255 * 127.
constexpr int64_t kSegmentCols = int64_t{1} << 14;

bool whole_blocks(const PackedGemmArgs& a) {
  return a.group_size % kBlockCols == 0 || a.group_size >= a.k;
}

std::vector<Segment> make_segments(const PackedGemmArgs& a) {
  std::vector<Segment> segments;
  int64_t x_quad = 0;
  for (int64_t begin = 0; begin < a.k;) {
    const int64_t group = begin / a.group_size;
    int64_t end = a.k;
    if (a.k - begin > a.group_size - begin % a.group_size)
      end = begin + a.group_size - begin % a.group_size;
    if (end - begin > kSegmentCols) end = begin + kSegmentCols;
    const int64_t code_quad = begin / kQuadCols;
    int64_t quads = ceil_div(end, kQuadCols) - code_quad;
    if (whole_blocks(a)) quads = ceil_div(quads, kBlockQuads) * kBlockQuads;
    const auto narrow = [](int64_t value) { return static_cast<int32_t>(value); };
    segments.push_back({narrow(group), narrow(begin), narrow(end), narrow(code_quad),
                        narrow(x_quad), narrow(quads)});
    x_quad += quads;
    begin = end;
  }
  return segments;
}

}  // namespace
}  // namespace mmq::cpu::avx2

MMQ_AVX2_BEGIN

namespace mmq::cpu::avx2 {
namespace {

// Codes of 8 bits need activations of 16.
template <int kBits>
constexpr bool kWide = kBits == 8;
// Bytes of 4 quantized activations: int8 in order, or int16 in the order 0, 2, 1, 3, in which the
// even and the odd bytes of a quad of codes come.
template <int kBits>
constexpr int kXQuadBytes = kWide<kBits> ? 8 : 4;

// The quantized activations of a call, stored as RowBlocks says.
struct Activations {
  RowBlocks rows;
  const Segment* segments;
  int64_t segment_count;
  int64_t quads;   // of one row
  uint8_t* codes;  // [row block][quad][row][kXQuadBytes]
  float* scales;   // [row block][segment][row]: s_x
  float* sums;     // [row block][segment][row]: s_x * sum(x_q); symmetric: that times -zero
};

// The end of a segment for some rows and one tile, by what Activations holds:
//   out += scale * (s_x * products - zero * s_x * sum(x_q)),
// the zeros of 16-bit scales being subtracted before scale is multiplied: symmetric ones cost
// nothing here. Rows are `stride` apart in products and out.
template <int kRows, int kStride>
inline __attribute__((always_inline)) void end_segment(const TileAffine& a, int64_t group,
                                                       const float* x_scales, const float* x_sums,
                                                       const __m256i* products, __m256* out) {
  const auto each = [&](const auto& step) {
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row)
      out[row * kStride] =
          step(_mm256_cvtepi32_ps(products[row * kStride]), _mm256_set1_ps(x_scales[row]),
               _mm256_set1_ps(x_sums[row]), out[row * kStride]);
  };
  const uint8_t* from = a.data + group * affine_bytes(a.kind);
  if (a.kind == AffineKind::kScale16) {
    const __m256 scale = load_scales(from, a.type);
    each([&](__m256 codes, __m256 x_scale, __m256 x_sum, __m256 before) {
      return _mm256_fmadd_ps(scale, _mm256_fmadd_ps(codes, x_scale, x_sum), before);
    });
  } else if (a.kind == AffineKind::kScaleZero16) {
    const __m256 scale = load_scales(from, a.type);
    const __m256 zero = load_scales(from + kTileRows * 2, a.type);
    each([&](__m256 codes, __m256 x_scale, __m256 x_sum, __m256 before) {
      const __m256 scaled = _mm256_mul_ps(codes, x_scale);
      return _mm256_fmadd_ps(scale, _mm256_fnmadd_ps(zero, x_sum, scaled), before);
    });
  } else {
    const Grid grid = load_grid(a, group);
    each([&](__m256 codes, __m256 x_scale, __m256 x_sum, __m256 before) {
      const __m256 scaled = _mm256_mul_ps(codes, x_scale);
      return _mm256_fmadd_ps(x_sum, grid.minimum, _mm256_fmadd_ps(scaled, grid.scale, before));
    });
  }
}

// Horizontal steps: the other half of four lanes, the other lane of two.
constexpr int kSwapPairs = _MM_SHUFFLE(1, 0, 3, 2), kSwapLanes = _MM_SHUFFLE(2, 3, 0, 1);

// s_x of x[begin, end): max|x| / 127, 0 for zeros, NaN if the maximum is not finite. As integers
// the magnitudes order like the floats, with infinity and then NaN on top.
float scale_of(const float* x, int64_t begin, int64_t end) {
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  __m256i largest = _mm256_setzero_si256();
  int64_t k = begin;
  for (; k + 8 <= end; k += 8)
    largest = _mm256_max_epi32(largest, _mm256_and_si256(load_vector(x + k), magnitude));
  __m128i half =
      _mm_max_epi32(_mm256_castsi256_si128(largest), _mm256_extracti128_si256(largest, 1));
  half = _mm_max_epi32(half, _mm_shuffle_epi32(half, kSwapPairs));
  int32_t top = _mm_cvtsi128_si32(_mm_max_epi32(half, _mm_shuffle_epi32(half, kSwapLanes)));
  for (; k < end; ++k) {
    int32_t bits;
    std::memcpy(&bits, x + k, sizeof bits);
    bits &= 0x7fffffff;
    top = bits > top ? bits : top;
  }
  if (top == 0) return 0.f;
  if (top >= 0x7f800000) return std::numeric_limits<float>::quiet_NaN();
  float value;
  std::memcpy(&value, &top, sizeof value);
  value /= 127.f;
  // The smallest normal number keeps x / s_x below 128 for subnormal activations.
  return value < std::numeric_limits<float>::min() ? std::numeric_limits<float>::min() : value;
}

// Writes code `at` (counted from the segment's first quad) of a row.
template <int kBits>
inline void put_code(uint8_t* to, int64_t stride, int64_t at, int code) {
  uint8_t* quad = to + at / kQuadCols * stride;
  if constexpr (kWide<kBits>) {
    constexpr int kOrder[kQuadCols] = {0, 2, 1, 3};
    const int16_t wide = static_cast<int16_t>(code);
    std::memcpy(quad + kOrder[at % kQuadCols] * 2, &wide, sizeof wide);
  } else {
    quad[at % kQuadCols] = static_cast<uint8_t>(code);
  }
}

// Quantizes one row of a segment; `to` is its first quad, quads are `stride` bytes apart. Returns
// sum(x_q). Quads are zero before.
template <int kBits>
int32_t quantize(const float* x, const Segment& s, float scale, uint8_t* to, int64_t stride) {
  const int64_t origin = s.code_quad * kQuadCols;
  int32_t sum = 0;
  int64_t k = s.begin;
  const auto put = [&](int64_t stop) {
    for (; k < stop; ++k) {
      const int code = _mm_cvtss_si32(_mm_set_ss(x[k] / scale));
      put_code<kBits>(to, stride, k - origin, code);
      sum += code;
    }
  };
  put(smaller(ceil_div(s.begin, kQuadCols) * kQuadCols, s.end));
  const __m256 divisor = _mm256_set1_ps(scale);
  __m256i sums = _mm256_setzero_si256();
  for (; k + 8 <= s.end; k += 8) {
    const __m256i codes = _mm256_cvtps_epi32(_mm256_div_ps(_mm256_loadu_ps(x + k), divisor));
    sums = _mm256_add_epi32(sums, codes);
    const __m128i words =
        _mm_packs_epi32(_mm256_castsi256_si128(codes), _mm256_extracti128_si256(codes, 1));
    uint8_t* quad = to + (k - origin) / kQuadCols * stride;
    if constexpr (kWide<kBits>) {
      constexpr int kEvenFirst = _MM_SHUFFLE(3, 1, 2, 0);
      const __m128i ordered =
          _mm_shufflehi_epi16(_mm_shufflelo_epi16(words, kEvenFirst), kEvenFirst);
      _mm_storel_epi64(reinterpret_cast<__m128i*>(quad), ordered);
      _mm_storel_epi64(reinterpret_cast<__m128i*>(quad + stride),
                       _mm_unpackhi_epi64(ordered, ordered));
    } else {
      const __m128i bytes = _mm_packs_epi16(words, words);
      const int32_t low = _mm_cvtsi128_si32(bytes), high = _mm_extract_epi32(bytes, 1);
      std::memcpy(quad, &low, sizeof low);
      std::memcpy(quad + stride, &high, sizeof high);
    }
  }
  put(s.end);
  __m128i half = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
  half = _mm_add_epi32(half, _mm_shuffle_epi32(half, kSwapPairs));
  return sum + _mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, kSwapLanes)));
}

// All rows of a block, one segment.
template <int kBits>
void quantize_segment(const PackedGemmArgs& a, const Activations& x, int64_t block,
                      int64_t segment) {
  const Segment& s = x.segments[segment];
  const int64_t first = x.rows.begin(block), count = x.rows.rows(block);
  const int64_t stride = count * kXQuadBytes<kBits>;
  uint8_t* codes = x.codes + first * x.quads * kXQuadBytes<kBits> + s.x_quad * stride;
  std::memset(codes, 0, static_cast<size_t>(s.quads * stride));
  const int64_t begin = s.group * a.group_size, end = smaller(begin + a.group_size, a.k);
  for (int64_t row = 0; row < count; ++row) {
    const float* from = a.x + (first + row) * a.k;
    const float scale = scale_of(from, begin, end);
    int32_t sum = 0;
    if (scale > 0)  // neither a group of zeros nor NaN
      sum = quantize<kBits>(from, s, scale, codes + row * kXQuadBytes<kBits>, stride);
    const int64_t at = first * x.segment_count + segment * count + row;
    x.scales[at] = scale;
    x.sums[at] = scale * static_cast<float>(sum);
    if (a.affine_kind == AffineKind::kScale16) x.sums[at] *= -static_cast<float>(1 << (a.bits - 1));
  }
}

template <int kBits>
void quantize_rows(const PackedGemmArgs& a, const Activations& x) {
  const int64_t tasks = x.rows.count * x.segment_count;
  parallel_for(tasks, 1 + kMinTaskMacs * tasks / (8 * a.m * a.k + 1),
               [&](int64_t begin, int64_t end) {
                 for (int64_t task = begin; task < end; ++task)
                   quantize_segment<kBits>(a, x, task / x.segment_count, task % x.segment_count);
               });
}

// The quantized activations of one call, with their memory; kBits decides their type alone.
template <int kBits>
class QuantizedActivations {
 public:
  QuantizedActivations(const PackedGemmArgs& a, int64_t max_rows, const Segment* segments,
                       int64_t segment_count)
      : activations_{RowBlocks(a.m, max_rows),
                     segments,
                     segment_count,
                     quads(segments, segment_count),
                     nullptr,
                     nullptr,
                     nullptr},
        memory_(Scratch::padded(code_floats(a)) + 2 * Scratch::padded(a.m * segment_count)) {
    activations_.codes = reinterpret_cast<uint8_t*>(memory_.take(code_floats(a)));
    activations_.scales = memory_.take(a.m * segment_count);
    activations_.sums = memory_.take(a.m * segment_count);
    quantize_rows<kBits>(a, activations_);
  }
  const Activations& get() const { return activations_; }

 private:
  static int64_t quads(const Segment* segments, int64_t count) {
    return count > 0 ? segments[count - 1].x_quad + segments[count - 1].quads : 0;
  }
  int64_t code_floats(const PackedGemmArgs& a) const {
    return ceil_div(a.m * activations_.quads * kXQuadBytes<kBits>, sizeof(float));
  }

  Activations activations_;
  Scratch memory_;
};

}  // namespace
}  // namespace mmq::cpu::avx2

MMQ_AVX2_END

#endif
