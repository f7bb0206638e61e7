// SPDX-License-Identifier: Apache-2.0
// Seeded numbers for native tests. Vectors are exactly as long as needed, so that the address
// sanitizer sees one element too far.
#pragma once

#include <cstdint>
#include <vector>

class Random {
 public:
  explicit Random(uint32_t seed) : state_(seed * 2654435769u + 1u) {}

  // Uniform in [low, high).
  float in(float low, float high) {
    state_ = state_ * 1664525u + 1013904223u;
    return low + (high - low) * static_cast<float>(state_ >> 8) / 16777216.f;
  }

  std::vector<float> floats(int64_t count, float low = -1.f, float high = 1.f) {
    std::vector<float> values(static_cast<size_t>(count));
    for (float& value : values) value = in(low, high);
    return values;
  }

 private:
  uint32_t state_;
};
