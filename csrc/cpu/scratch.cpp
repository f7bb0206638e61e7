// SPDX-License-Identifier: Apache-2.0
#include "cpu/scratch.h"

#include <cstdlib>
#include <new>

namespace mmq::cpu {

Scratch::Scratch(int64_t bytes) {
  constexpr size_t kCacheLine = 64;
  const size_t rounded = (static_cast<size_t>(bytes) + kCacheLine) / kCacheLine * kCacheLine;
  memory_ = std::aligned_alloc(kCacheLine, rounded);
  if (!memory_) throw std::bad_alloc();
}

Scratch::~Scratch() { std::free(memory_); }

}  // namespace mmq::cpu
