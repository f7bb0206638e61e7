// SPDX-License-Identifier: Apache-2.0
// What the bindings of CPU and CUDA kernels share: addresses and the checks of numbers.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "checks.h"
#include "packing.h"

namespace mmq {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

inline void check_bits(const char* op, int bits) {
  check(bits >= kMinBits && bits <= kMaxBits, op, "bits from 2 to 8", bits);
}

inline void check_size(const char* op, int64_t size) {
  check(size >= 0, op, "a size of 0 or more", size);
}

inline void check_enum(const char* op, const char* what, int value, int count) {
  check(value >= 0 && value < count, op, what, value);
}

void bind_cuda(pybind11::module_& m);  // bindings_cuda.cpp

}  // namespace mmq
