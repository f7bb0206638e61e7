// SPDX-License-Identifier: Apache-2.0
// Packing and unpacking of the canonical stream; see packing.h for the picture.
#include "packing.h"

#include "cpu/parallel.h"

namespace mmq {

void pack_row(const uint8_t* codes, int64_t cols, int bits, uint32_t* words) {
  uint64_t window = 0;
  int filled = 0;
  for (int64_t i = 0; i < cols; ++i) {
    window |= static_cast<uint64_t>(codes[i]) << filled;
    filled += bits;
    if (filled >= kWordBits) {
      *words++ = static_cast<uint32_t>(window);
      window >>= kWordBits;
      filled -= kWordBits;
    }
  }
  if (filled > 0) *words = static_cast<uint32_t>(window);
}

void unpack_row(const uint32_t* words, int64_t cols, int bits, uint8_t* codes) {
  const uint32_t mask = static_cast<uint32_t>(max_code(bits));
  uint64_t window = 0;
  int filled = 0;
  for (int64_t i = 0; i < cols; ++i) {
    if (filled < bits) {
      window |= static_cast<uint64_t>(*words++) << filled;
      filled += kWordBits;
    }
    codes[i] = static_cast<uint8_t>(window & mask);
    window >>= bits;
    filled -= bits;
  }
}

// Rows per task, so that a task is worth a fork: about 2^16 codes.
static int64_t rows_per_task(int64_t cols) { return 1 + (int64_t{1} << 16) / (cols + 1); }

void pack(const uint8_t* codes, int64_t rows, int64_t cols, int bits, uint32_t* words) {
  const int64_t stride_words = row_words(cols, bits);
  cpu::parallel_for(rows, rows_per_task(cols), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      pack_row(codes + row * cols, cols, bits, words + row * stride_words);
  });
}

void unpack(const uint32_t* words, int64_t rows, int64_t cols, int bits, uint8_t* codes) {
  const int64_t stride_words = row_words(cols, bits);
  cpu::parallel_for(rows, rows_per_task(cols), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      unpack_row(words + row * stride_words, cols, bits, codes + row * cols);
  });
}

}  // namespace mmq
