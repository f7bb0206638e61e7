// SPDX-License-Identifier: Apache-2.0
// Repacking between the canonical stream and the tiles of layout.h, four rows in a vector.
#include "cpu/layout.h"

#include <algorithm>
#include <cstring>

#include "cpu/parallel.h"

namespace mmq::cpu {

void unpack_block(const uint8_t* block, int bits, uint8_t* codes) {
  std::memset(codes, 0, kBlockCodes);
  for_each_plane(bits, [&](int width, int low_bit) {
    const int quads_per_vector = 8 / width;
    for (int quad = 0; quad < kBlockQuads; ++quad) {
      const uint8_t* vector = block + (low_bit + quad / quads_per_vector) * kQuadBytes;
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

// Rows that a step works on side by side: a vector of 128 bits, which every processor has, holds
// one dword of each.
constexpr int kLanes = 4;
static_assert(kTileRows % kLanes == 0);
typedef uint32_t Rows __attribute__((vector_size(4 * kLanes)));

constexpr uint32_t low_bits(int count) { return ~uint32_t{0} >> (32 - count); }

// Four codes of width kBits at the low end of a dword to one byte each: the halves of the field go
// apart, then the halves of each half. Bits above the field are dropped.
template <int kBits>
Rows spread(Rows x) {
  if constexpr (kBits == 8) return x;
  constexpr uint32_t kTwo = low_bits(2 * kBits);
  constexpr uint32_t kOne = low_bits(kBits) * 0x00010001u;
  x = (x & kTwo) | (x >> 2 * kBits & kTwo) << 16;
  return (x & kOne) | (x >> kBits & kOne) << 8;
}

// The inverse of spread.
template <int kBits>
Rows gather(Rows x) {
  if constexpr (kBits == 8) return x;
  constexpr uint32_t kTwo = low_bits(2 * kBits);
  constexpr uint32_t kOne = low_bits(kBits) * 0x00010001u;
  x = (x & kOne) | (x >> 8 & kOne) << kBits;
  return (x & kTwo) | (x >> 16 & kTwo) << 2 * kBits;
}

// Calls visit(word, shift) for quad `quad` of a block: its 4 * bits bits begin at bit `shift` of
// word `word` of the row and may go on in the next one.
template <class Visit>
constexpr void at_quad(int quad, int bits, Visit visit) {
  const int bit = kQuadCols * bits * quad;
  visit(bit / kWordBits, bit % kWordBits);
}

// kBits words of each of four rows, `stride` words apart, to the rows' places in a block.
template <int kBits>
void rows_to_block(const uint32_t* words, int64_t stride, uint8_t* block) {
  Rows stream[kBits], quads[kBlockQuads];
  for (int i = 0; i < kBits; ++i)
    stream[i] = Rows{words[i], words[stride + i], words[2 * stride + i], words[3 * stride + i]};
  for (int quad = 0; quad < kBlockQuads; ++quad)
    at_quad(quad, kBits, [&](int word, int shift) {
      Rows field = stream[word] >> shift;
      if (shift + kQuadCols * kBits > kWordBits) field |= stream[word + 1] << (kWordBits - shift);
      quads[quad] = spread<kBits>(field);
    });
  for_each_plane(kBits, [&](int width, int low_bit) {
    const uint32_t mask = static_cast<uint32_t>(max_code(width)) * 0x01010101u;
    const int quads_per_vector = 8 / width;
    for (int vector = 0; vector < width; ++vector) {
      Rows dwords = {};
      for (int i = 0; i < quads_per_vector; ++i)
        dwords |= (quads[vector * quads_per_vector + i] >> low_bit & mask) << width * i;
      std::memcpy(block + (low_bit + vector) * kQuadBytes, &dwords, sizeof dwords);
    }
  });
}

// The inverse of rows_to_block.
template <int kBits>
void block_to_rows(const uint8_t* block, int64_t stride, uint32_t* words) {
  Rows stream[kBits] = {}, quads[kBlockQuads] = {};
  for_each_plane(kBits, [&](int width, int low_bit) {
    const uint32_t mask = static_cast<uint32_t>(max_code(width)) * 0x01010101u;
    const int quads_per_vector = 8 / width;
    for (int vector = 0; vector < width; ++vector) {
      Rows dwords;
      std::memcpy(&dwords, block + (low_bit + vector) * kQuadBytes, sizeof dwords);
      for (int i = 0; i < quads_per_vector; ++i)
        quads[vector * quads_per_vector + i] |= (dwords >> width * i & mask) << low_bit;
    }
  });
  for (int quad = 0; quad < kBlockQuads; ++quad)
    at_quad(quad, kBits, [&](int word, int shift) {
      const Rows field = gather<kBits>(quads[quad]);
      stream[word] |= field << shift;
      if (shift + kQuadCols * kBits > kWordBits) stream[word + 1] |= field >> (kWordBits - shift);
    });
  for (int i = 0; i < kBits; ++i)
    for (int row = 0; row < kLanes; ++row) words[row * stride + i] = stream[i][row];
}

// The first `rows` of four rows of k codes to their places in a tile, and back. What is missing of
// a block in rows or columns is filled up beside it, so that nothing beyond the stream is touched.
template <int kBits>
void rows_to_tile(const uint32_t* words, int64_t rows, int64_t k, uint8_t* at) {
  const int64_t stride = row_words(k, kBits);
  for (; k > 0; k -= kBlockCols, words += kBits, at += block_bytes(kBits)) {
    if (rows >= kLanes && k >= kBlockCols) {
      rows_to_block<kBits>(words, stride, at);
      continue;
    }
    uint32_t filled[kLanes * kBits] = {};
    const int64_t cols = std::min<int64_t>(k, kBlockCols), count = row_words(cols, kBits);
    const int used = static_cast<int>(cols * kBits - kWordBits * (count - 1));
    for (int64_t row = 0; row < std::min<int64_t>(rows, kLanes); ++row) {
      std::memcpy(filled + row * kBits, words + row * stride, count * sizeof *words);
      filled[row * kBits + count - 1] &= low_bits(used);
    }
    rows_to_block<kBits>(filled, kBits, at);
  }
}

template <int kBits>
void tile_to_rows(const uint8_t* at, int64_t rows, int64_t k, uint32_t* words) {
  const int64_t stride = row_words(k, kBits);
  for (; k > 0; k -= kBlockCols, words += kBits, at += block_bytes(kBits)) {
    if (rows >= kLanes && k >= kBlockCols) {
      block_to_rows<kBits>(at, stride, words);
      continue;
    }
    uint32_t filled[kLanes * kBits];
    block_to_rows<kBits>(at, kBits, filled);
    const int64_t count = row_words(std::min<int64_t>(k, kBlockCols), kBits);
    for (int64_t row = 0; row < std::min<int64_t>(rows, kLanes); ++row)
      std::memcpy(words + row * stride, filled + row * kBits, count * sizeof *words);
  }
}

using ToTile = void (*)(const uint32_t*, int64_t, int64_t, uint8_t*);
using ToRows = void (*)(const uint8_t*, int64_t, int64_t, uint32_t*);
constexpr ToTile kToTile[] = {rows_to_tile<2>, rows_to_tile<3>, rows_to_tile<4>, rows_to_tile<5>,
                              rows_to_tile<6>, rows_to_tile<7>, rows_to_tile<8>};
constexpr ToRows kToRows[] = {tile_to_rows<2>, tile_to_rows<3>, tile_to_rows<4>, tile_to_rows<5>,
                              tile_to_rows<6>, tile_to_rows<7>, tile_to_rows<8>};

}  // namespace

void repack(const uint32_t* words, int64_t n, int64_t k, int bits, uint8_t* tiles) {
  const ToTile to_tile = kToTile[bits - kMinBits];
  parallel_for(tile_count(n), tiles_per_task(k), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin * kTileRows; row < end * kTileRows; row += kLanes)
      to_tile(words + row * row_words(k, bits), n - row, k,
              tiles + row / kTileRows * tile_bytes(k, bits) + row % kTileRows * kQuadCols);
  });
}

void unrepack(const uint8_t* tiles, int64_t n, int64_t k, int bits, uint32_t* words) {
  const ToRows to_rows = kToRows[bits - kMinBits];
  parallel_for(tile_count(n), tiles_per_task(k), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin * kTileRows; row < std::min(end * kTileRows, n); row += kLanes)
      to_rows(tiles + row / kTileRows * tile_bytes(k, bits) + row % kTileRows * kQuadCols, n - row,
              k, words + row * row_words(k, bits));
  });
}

}  // namespace mmq::cpu
