// SPDX-License-Identifier: Apache-2.0
// MMQ_AVX2_BEGIN ... MMQ_AVX2_END: code between them is compiled for AVX2, FMA and F16C.
//
// Never -mavx2 on a file: inline functions of shared headers would be emitted with AVX, and the
// linker may keep that copy for the baseline. So: all includes stand above MMQ_AVX2_BEGIN, all that
// lies between is in an anonymous namespace and uses no library template, and the code that
// allocates and forks stands below MMQ_AVX2_END.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__clang__)
#define MMQ_AVX2_BEGIN \
  _Pragma("clang attribute push(__attribute__((target(\"avx2,fma,f16c\"))), apply_to = function)")
#define MMQ_AVX2_END _Pragma("clang attribute pop")
#else
#define MMQ_AVX2_BEGIN _Pragma("GCC push_options") _Pragma("GCC target(\"avx2,fma,f16c\")")
#define MMQ_AVX2_END _Pragma("GCC pop_options")
#endif

#if defined(__x86_64__)
MMQ_AVX2_BEGIN

namespace mmq::cpu::avx2 {
namespace {

// In place of std::min and std::max.
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace
}  // namespace mmq::cpu::avx2

MMQ_AVX2_END
#endif
