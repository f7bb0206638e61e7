// SPDX-License-Identifier: Apache-2.0
// x^e for eight x >= 0 and one e > 0, in float32: 2^(e * log2 x).
// Include it above MMQ_AVX2_BEGIN; it opens its own target region.
#pragma once

#if defined(__x86_64__)

#include "cpu/target_avx2.h"

MMQ_AVX2_BEGIN
namespace mmq::cpu {
namespace {

// Largest relative error for exponents from 1/2 to 4, where the result is a normal number. Four
// roundings of about 2^-24 in e * log2(m) and ten in 2^rest; tests/native/test_power.cpp sweeps it.
constexpr double kPowerError = 1e-6;

// x below 2^-126 and results below it give 0, results from 2^128 on infinity, NaN and infinity NaN.
inline __m256 power(__m256 x, __m256 exponent) {
  const __m256 one = _mm256_set1_ps(1.f);
  const __m256 tiny = _mm256_set1_ps(1.17549435e-38f);
  // x = 2^n * m with m in [sqrt(1/2), sqrt(2)): the mantissa of x counted from that of sqrt(1/2).
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i offset = _mm256_sub_epi32(bits, _mm256_set1_epi32(0x3f3504f3));
  const __m256 n = _mm256_cvtepi32_ps(_mm256_srai_epi32(offset, 23));
  const __m256 m = _mm256_castsi256_ps(_mm256_add_epi32(
      _mm256_and_si256(offset, _mm256_set1_epi32(0x007fffff)), _mm256_set1_epi32(0x3f3504f3)));
  // log2 m = 2/ln 2 * atanh(z), z = (m - 1) / (m + 1), |z| <= 0.1716: the series up to z^9.
  const __m256 z = _mm256_div_ps(_mm256_sub_ps(m, one), _mm256_add_ps(m, one));
  const __m256 z2 = _mm256_mul_ps(z, z);
  __m256 series = _mm256_set1_ps(0.32059889f);                        // 2 / (9 ln 2)
  series = _mm256_fmadd_ps(series, z2, _mm256_set1_ps(0.41219859f));  // 2 / (7 ln 2)
  series = _mm256_fmadd_ps(series, z2, _mm256_set1_ps(0.57707802f));  // 2 / (5 ln 2)
  series = _mm256_fmadd_ps(series, z2, _mm256_set1_ps(0.96179669f));  // 2 / (3 ln 2)
  series = _mm256_fmadd_ps(series, z2, _mm256_set1_ps(2.88539008f));  // 2 / ln 2
  const __m256 log2_m = _mm256_mul_ps(series, z);
  // e * log2 x = whole + rest with |rest| <= 1/2; e * n and e * log2 m are joined unrounded.
  const __m256 sum = _mm256_mul_ps(exponent, _mm256_add_ps(n, log2_m));
  const __m256 whole = _mm256_round_ps(sum, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m256 rest = _mm256_fmadd_ps(exponent, log2_m, _mm256_fmsub_ps(exponent, n, whole));
  // 2^rest = exp(rest ln 2): the Taylor series, remainder below 1e-8.
  __m256 result = _mm256_set1_ps(1.5252734e-5f);  // ln^7 2 / 7!
  result = _mm256_fmadd_ps(result, rest, _mm256_set1_ps(1.5403530e-4f));
  result = _mm256_fmadd_ps(result, rest, _mm256_set1_ps(1.3333558e-3f));
  result = _mm256_fmadd_ps(result, rest, _mm256_set1_ps(9.6181291e-3f));
  result = _mm256_fmadd_ps(result, rest, _mm256_set1_ps(5.5504109e-2f));
  result = _mm256_fmadd_ps(result, rest, _mm256_set1_ps(0.24022651f));
  result = _mm256_fmadd_ps(result, rest, _mm256_set1_ps(0.69314718f));
  result = _mm256_fmadd_ps(result, rest, one);
  // Times 2^whole, through the exponent field.
  const __m256 clamped_whole =
      _mm256_min_ps(_mm256_max_ps(whole, _mm256_set1_ps(-127.f)), _mm256_set1_ps(128.f));
  const __m256i field = _mm256_slli_epi32(
      _mm256_add_epi32(_mm256_cvtps_epi32(clamped_whole), _mm256_set1_epi32(127)), 23);
  result = _mm256_mul_ps(result, _mm256_castsi256_ps(field));
  result = _mm256_and_ps(result, _mm256_cmp_ps(x, tiny, _CMP_GE_OQ));
  // x - x is 0 for every finite x, else NaN.
  return _mm256_add_ps(result, _mm256_mul_ps(_mm256_sub_ps(x, x), x));
}

}  // namespace
}  // namespace mmq::cpu
MMQ_AVX2_END

#endif
