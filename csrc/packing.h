// SPDX-License-Identifier: Apache-2.0
// The packed weight format: sizes and bit arithmetic, shared by every kernel.
//
// Canonical stream, on disk and in the state dict. One row per output feature; code i of width b
// occupies bits [i*b, (i+1)*b) of the row, and word j holds bits [32*j, 32*j+32):
//
//   b = 3   word 0                                  word 1
//           | c0 | c1 | c2 | ... | c9 | c10 (2 low bits) || c10 (1 high bit) | c11 | ...
//      bit   0    3    6          27   30             32   33
//
// The last word of a row is filled up with zero bits; rows never share a word, so 32 codes fill
// exactly b words and a row is read sequentially. Units: *_words are uint32, *_cols are codes.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace mmq {

constexpr int kMinBits = 2;
constexpr int kMaxBits = 8;
constexpr int kWordBits = 32;

MMQ_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

MMQ_HOST_DEVICE constexpr int64_t row_words(int64_t cols, int bits) {
  return ceil_div(cols * bits, kWordBits);
}

MMQ_HOST_DEVICE constexpr int max_code(int bits) { return (1 << bits) - 1; }

// Number of groups in a row; group_size is already resolved (positive).
MMQ_HOST_DEVICE constexpr int64_t group_count(int64_t cols, int64_t group_size) {
  return ceil_div(cols, group_size);
}

// Code `index` of a row; reads at most two words, never past the row's last one.
MMQ_HOST_DEVICE inline uint32_t get_code(const uint32_t* row, int64_t index, int bits) {
  const int64_t bit = index * bits;
  const int shift = static_cast<int>(bit % kWordBits);
  uint64_t window = row[bit / kWordBits];
  if (shift + bits > kWordBits) window |= static_cast<uint64_t>(row[bit / kWordBits + 1]) << 32;
  return static_cast<uint32_t>(window >> shift) & static_cast<uint32_t>(max_code(bits));
}

static_assert(row_words(32, 3) == 3 && row_words(33, 3) == 4 && row_words(0, 8) == 0);

// One row of codes (one byte each, already within range) to the stream, and back.
void pack_row(const uint8_t* codes, int64_t cols, int bits, uint32_t* words);
void unpack_row(const uint32_t* words, int64_t cols, int bits, uint8_t* codes);

// All rows, threads over rows. codes is [rows, cols], words is [rows, row_words(cols, bits)].
void pack(const uint8_t* codes, int64_t rows, int64_t cols, int bits, uint32_t* words);
void unpack(const uint32_t* words, int64_t rows, int64_t cols, int bits, uint8_t* codes);

}  // namespace mmq
