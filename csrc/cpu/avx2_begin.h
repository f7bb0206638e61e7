// SPDX-License-Identifier: Apache-2.0
// Opens a region compiled for AVX2, FMA and F16C; avx2_end.h closes it. Include both below all
// other includes and keep everything between them in an anonymous namespace, but for functions
// that are declared elsewhere: an inline function that two files share must never be compiled
// with AVX2, because the linker may keep that copy for machines that lack it. For the same reason
// no file is compiled with -mavx2. There is no include guard: a file may open several regions.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
