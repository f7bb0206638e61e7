// SPDX-License-Identifier: Apache-2.0
// The grid arithmetic of grid.h on eight values at a time, bit for bit the same.
// Include it above MMQ_AVX2_BEGIN; it opens its own target region.
#pragma once

#if defined(__x86_64__)

#include "cpu/target_avx2.h"
#include "grid.h"

MMQ_AVX2_BEGIN
namespace mmq::cpu {
namespace {

constexpr int kRoundEven = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

// code_of and value_of; the limits are broadcast by the caller, outside its loop.
template <bool kFloatZero>
inline __m256 code_of(__m256 w, __m256 scale, __m256 zero, __m256 lowest, __m256 highest) {
  __m256 code;
  if (kFloatZero) {
    code = _mm256_round_ps(_mm256_div_ps(_mm256_sub_ps(w, zero), scale), kRoundEven);
  } else {
    code = _mm256_add_ps(_mm256_round_ps(_mm256_div_ps(w, scale), kRoundEven), zero);
  }
  return _mm256_min_ps(_mm256_max_ps(code, lowest), highest);
}

template <bool kFloatZero>
inline __m256 value_of(__m256 code, __m256 scale, __m256 zero) {
  return kFloatZero ? _mm256_add_ps(_mm256_mul_ps(code, scale), zero)
                    : _mm256_mul_ps(_mm256_sub_ps(code, zero), scale);
}

// range_of for any count >= 1.
inline Range range_of_avx2(const float* values, int64_t count) {
  if (count < 8) return range_of(values, count);
  __m256 low = _mm256_loadu_ps(values);
  __m256 high = low;
  __m256 unordered = _mm256_cmp_ps(low, low, _CMP_UNORD_Q);
  for (int64_t i = 8; i < count; i += 8) {
    const __m256 x = _mm256_loadu_ps(values + (i + 8 <= count ? i : count - 8));
    low = _mm256_min_ps(x, low);
    high = _mm256_max_ps(x, high);
    unordered = _mm256_or_ps(unordered, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  }
  if (_mm256_movemask_ps(unordered))
    return {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::quiet_NaN()};
  const __m128 lows = _mm_min_ps(_mm256_castps256_ps128(low), _mm256_extractf128_ps(low, 1));
  const __m128 highs = _mm_max_ps(_mm256_castps256_ps128(high), _mm256_extractf128_ps(high, 1));
  const __m128 low2 = _mm_min_ps(lows, _mm_movehl_ps(lows, lows));
  const __m128 high2 = _mm_max_ps(highs, _mm_movehl_ps(highs, highs));
  return {_mm_cvtss_f32(_mm_min_ss(low2, _mm_movehdup_ps(low2))),
          _mm_cvtss_f32(_mm_max_ss(high2, _mm_movehdup_ps(high2)))};
}

// Rows to columns: afterwards m[i] lane j is what m[j] lane i was.
inline void transpose8(__m256 (&m)[8]) {
  __m256 a[8], b[8];
  for (int i = 0; i < 4; ++i) {
    a[2 * i] = _mm256_unpacklo_ps(m[2 * i], m[2 * i + 1]);
    a[2 * i + 1] = _mm256_unpackhi_ps(m[2 * i], m[2 * i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
    b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xee);
    b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
    b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    m[i] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
    m[i + 4] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
  }
}

}  // namespace
}  // namespace mmq::cpu
MMQ_AVX2_END

#endif
