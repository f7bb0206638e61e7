// SPDX-License-Identifier: Apache-2.0
// CHECK(condition): counts and reports what does not hold; a test's main returns failures() != 0.
#pragma once

#include <cstdio>

inline int& failures() {
  static int count = 0;
  return count;
}

#define CHECK(condition)                                                   \
  do {                                                                     \
    if (!(condition)) {                                                    \
      ++failures();                                                        \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
    }                                                                      \
  } while (false)
