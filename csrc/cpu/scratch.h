// SPDX-License-Identifier: Apache-2.0
// Working memory of one call: aligned to cache lines, not initialized, freed at the end of scope.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mmq::cpu {

class Scratch {
 public:
  explicit Scratch(int64_t bytes);  // throws std::bad_alloc
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  template <class T>
  T* as() const {
    return static_cast<T*>(memory_);
  }

 private:
  void* memory_;
};

}  // namespace mmq::cpu
