// SPDX-License-Identifier: Apache-2.0
// Working memory of one task, aligned to a cache line, not initialised.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

namespace mmq::cpu {

class Scratch {
 public:
  explicit Scratch(int64_t floats)
      : data_(static_cast<float*>(::operator new(static_cast<size_t>(floats) * sizeof(float),
                                                 std::align_val_t{kAlignBytes}))) {}
  ~Scratch() { ::operator delete(data_, std::align_val_t{kAlignBytes}); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  // Hands out the next `floats` of the buffer, starting on a cache line.
  float* take(int64_t floats) {
    float* part = data_ + used_;
    used_ += padded(floats);
    return part;
  }

  // What take(floats) uses up.
  static constexpr int64_t padded(int64_t floats) { return (floats + 15) / 16 * 16; }

 private:
  static constexpr size_t kAlignBytes = 64;
  float* data_;
  int64_t used_ = 0;
};

}  // namespace mmq::cpu
