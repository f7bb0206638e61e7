// SPDX-License-Identifier: Apache-2.0
// MMQ_AVX512_BEGIN ... MMQ_AVX512_END: code between them is compiled for AVX-512 F, BW, DQ, VL and
// VNNI. The rules are those of target_avx2.h.
#pragma once

#include "cpu/target_avx2.h"

#if defined(__clang__)
#define MMQ_AVX512_BEGIN                                                                      \
  _Pragma(                                                                                    \
      "clang attribute push(__attribute__((target(\"avx2,fma,f16c,avx512f,avx512bw,avx512dq," \
      "avx512vl,avx512vnni\"))), apply_to = function)")
#define MMQ_AVX512_END _Pragma("clang attribute pop")
#else
#define MMQ_AVX512_BEGIN      \
  _Pragma("GCC push_options") \
      _Pragma("GCC target(\"avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni\")")
#define MMQ_AVX512_END _Pragma("GCC pop_options")
#endif
