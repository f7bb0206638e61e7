// SPDX-License-Identifier: Apache-2.0
// Repacking between the canonical stream and the tiles of layout.h, eight codes to a 64-bit word.
#include "cpu/layout.h"

#include <algorithm>
#include <cstring>

#include "cpu/parallel.h"

namespace mmq::cpu {

void unpack_block(const uint8_t* block, int bits, uint8_t* codes) {
  std::memset(codes, 0, kBlockCodes);
  for_each_plane(bits, [&](int width, int low_bit, int offset_vectors) {
    const int quads_per_vector = 8 / width;
    for (int quad = 0; quad < kBlockQuads; ++quad) {
      const uint8_t* vector = block + (offset_vectors + quad / quads_per_vector) * kQuadBytes;
      const int shift = width * (quad % quads_per_vector);
      for (int i = 0; i < kQuadBytes; ++i)
        codes[quad * kQuadBytes + i] |=
            static_cast<uint8_t>(((vector[i] >> shift) & max_code(width)) << low_bit);
    }
  });
}

namespace {

// Tiles per task, so that a task is worth a fork: about 2^16 codes.
int64_t tiles_per_task(int64_t k) { return 1 + (int64_t{1} << 16) / (kTileRows * k + 1); }

// 32 codes of a row, one byte each: code 4 * q + i in byte i of quads[q].
struct RowCodes {
  uint32_t quads[kBlockQuads];
};

constexpr uint64_t low_bits(int count) { return ~uint64_t{0} >> (64 - count); }

// Eight codes of width kBits at the low end of a word to one byte each: the halves of the field go
// apart, then the halves of each half, then of each quarter.
template <int kBits>
uint64_t spread(uint64_t x) {
  constexpr uint64_t kFour = low_bits(4 * kBits);
  constexpr uint64_t kTwo = low_bits(2 * kBits) * 0x0000000100000001u;
  constexpr uint64_t kOne = low_bits(kBits) * 0x0001000100010001u;
  x = (x & kFour) | (x >> (4 * kBits) & kFour) << 32;
  x = (x & kTwo) | (x >> (2 * kBits) & kTwo) << 16;
  return (x & kOne) | (x >> kBits & kOne) << 8;
}

// The inverse of spread.
template <int kBits>
uint64_t gather(uint64_t x) {
  constexpr uint64_t kFour = low_bits(4 * kBits);
  constexpr uint64_t kTwo = low_bits(2 * kBits) * 0x0000000100000001u;
  constexpr uint64_t kOne = low_bits(kBits) * 0x0001000100010001u;
  x = (x & kOne) | (x >> 8 & kOne) << kBits;
  x = (x & kTwo) | (x >> 16 & kTwo) << (2 * kBits);
  return (x & kFour) | (x >> 32 & kFour) << (4 * kBits);
}

// kBits words of the stream to 32 codes and back. Eight codes are kBits bytes.
template <int kBits>
RowCodes read_words(const uint32_t* words) {
  const auto* bytes = reinterpret_cast<const uint8_t*>(words);
  RowCodes codes;
  for (int i = 0; i < 4; ++i) {
    uint64_t eight = 0;
    std::memcpy(&eight, bytes + i * kBits, kBits);
    eight = spread<kBits>(eight);
    codes.quads[2 * i] = static_cast<uint32_t>(eight);
    codes.quads[2 * i + 1] = static_cast<uint32_t>(eight >> 32);
  }
  return codes;
}

template <int kBits>
void write_words(const RowCodes& codes, uint32_t* words) {
  auto* bytes = reinterpret_cast<uint8_t*>(words);
  for (int i = 0; i < 4; ++i) {
    const uint64_t eight =
        gather<kBits>(codes.quads[2 * i] | uint64_t{codes.quads[2 * i + 1]} << 32);
    std::memcpy(bytes + i * kBits, &eight, kBits);
  }
}

// A row's 32 codes in a block whose first dword of that row is at `at`, and back.
template <int kBits>
void write_row(const RowCodes& codes, uint8_t* at) {
  for_each_plane(kBits, [&](int width, int low_bit, int offset_vectors) {
    const uint32_t mask = static_cast<uint32_t>(max_code(width)) * 0x01010101u;
    const int quads_per_vector = 8 / width;
    for (int vector = 0; vector < width; ++vector) {
      uint32_t dword = 0;
      for (int i = 0; i < quads_per_vector; ++i)
        dword |= (codes.quads[vector * quads_per_vector + i] >> low_bit & mask) << (width * i);
      std::memcpy(at + (offset_vectors + vector) * kQuadBytes, &dword, sizeof dword);
    }
  });
}

template <int kBits>
RowCodes read_row(const uint8_t* at) {
  RowCodes codes = {};
  for_each_plane(kBits, [&](int width, int low_bit, int offset_vectors) {
    const uint32_t mask = static_cast<uint32_t>(max_code(width)) * 0x01010101u;
    const int quads_per_vector = 8 / width;
    for (int vector = 0; vector < width; ++vector) {
      uint32_t dword;
      std::memcpy(&dword, at + (offset_vectors + vector) * kQuadBytes, sizeof dword);
      for (int i = 0; i < quads_per_vector; ++i)
        codes.quads[vector * quads_per_vector + i] |= (dword >> (width * i) & mask) << low_bit;
    }
  });
  return codes;
}

// One row of the stream, its last block filled up with zero codes, to its place in a tile, and
// back. Words after the last whole block are copied, so that nothing beyond the row is touched.
template <int kBits>
void row_to_tile(const uint32_t* words, int64_t k, uint8_t* at) {
  for (; k >= kBlockCols; k -= kBlockCols, words += kBits, at += block_bytes(kBits))
    write_row<kBits>(read_words<kBits>(words), at);
  if (k == 0) return;
  uint32_t last[kBits] = {};
  std::memcpy(last, words, row_words(k, kBits) * sizeof *words);
  const int used = static_cast<int>(k * kBits % kWordBits);
  if (used) last[row_words(k, kBits) - 1] &= static_cast<uint32_t>(low_bits(used));
  write_row<kBits>(read_words<kBits>(last), at);
}

template <int kBits>
void tile_to_row(const uint8_t* at, int64_t k, uint32_t* words) {
  for (; k >= kBlockCols; k -= kBlockCols, words += kBits, at += block_bytes(kBits))
    write_words<kBits>(read_row<kBits>(at), words);
  if (k == 0) return;
  uint32_t last[kBits] = {};
  write_words<kBits>(read_row<kBits>(at), last);
  std::memcpy(words, last, row_words(k, kBits) * sizeof *words);
}

using ToTile = void (*)(const uint32_t*, int64_t, uint8_t*);
using ToRow = void (*)(const uint8_t*, int64_t, uint32_t*);
constexpr ToTile kToTile[] = {row_to_tile<2>, row_to_tile<3>, row_to_tile<4>, row_to_tile<5>,
                              row_to_tile<6>, row_to_tile<7>, row_to_tile<8>};
constexpr ToRow kToRow[] = {tile_to_row<2>, tile_to_row<3>, tile_to_row<4>, tile_to_row<5>,
                            tile_to_row<6>, tile_to_row<7>, tile_to_row<8>};

}  // namespace

void repack(const uint32_t* words, int64_t n, int64_t k, int bits, uint8_t* tiles) {
  const ToTile to_tile = kToTile[bits - kMinBits];
  parallel_for(tile_count(n), tiles_per_task(k), [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      uint8_t* to = tiles + tile * tile_bytes(k, bits);
      const int64_t first = tile * kTileRows;
      if (first + kTileRows > n && k > 0)
        std::memset(to, 0, static_cast<size_t>(tile_bytes(k, bits)));
      for (int64_t row = first; row < std::min(first + kTileRows, n); ++row)
        to_tile(words + row * row_words(k, bits), k, to + (row - first) * kQuadCols);
    }
  });
}

void unrepack(const uint8_t* tiles, int64_t n, int64_t k, int bits, uint32_t* words) {
  const ToRow to_row = kToRow[bits - kMinBits];
  parallel_for(tile_count(n), tiles_per_task(k), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin * kTileRows; row < std::min(end * kTileRows, n); ++row)
      to_row(tiles + row / kTileRows * tile_bytes(k, bits) + row % kTileRows * kQuadCols, k,
             words + row * row_words(k, bits));
  });
}

}  // namespace mmq::cpu
