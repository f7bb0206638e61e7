// SPDX-License-Identifier: Apache-2.0
// MMQ_AVX512BF16_BEGIN ... MMQ_AVX512BF16_END: code between them is compiled for AVX512-BF16 and
// all that target_avx512.h names. The rules are those of target_avx2.h.
#pragma once

#include "cpu/target_avx512.h"

#if defined(__clang__)
#define MMQ_AVX512BF16_BEGIN                                                                  \
  _Pragma(                                                                                    \
      "clang attribute push(__attribute__((target(\"avx2,fma,f16c,avx512f,avx512bw,avx512dq," \
      "avx512vl,avx512vnni,avx512bf16\"))), apply_to = function)")
#define MMQ_AVX512BF16_END _Pragma("clang attribute pop")
#else
#define MMQ_AVX512BF16_BEGIN           \
  _Pragma("GCC push_options") _Pragma( \
      "GCC target(\"avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16\")")
#define MMQ_AVX512BF16_END _Pragma("GCC pop_options")
#endif
