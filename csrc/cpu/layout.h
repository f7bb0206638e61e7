// SPDX-License-Identifier: Apache-2.0
// The run-time layout of packed weights on the CPU, common to all CPU kernels. `repack` makes it
// from the canonical stream (packing.h) at load; it is never written to disk.
//
// Codes. Sixteen output rows form a tile, 32 consecutive in-features of a tile form a block of 512
// codes, and 4 in-features of a block form a quad. Unpacked to one byte per code, a quad is one
// 64-byte vector, whose dword r holds the 4 codes of row r; a multiply-add of neighbouring bytes
// with the broadcast 4 activations then needs no horizontal sum:
//
//            row 0           row 1                 row 15
//   quad j | k k+1 k+2 k+3 | k k+1 k+2 k+3 | ... | k k+1 k+2 k+3 |     k = 32 * block + 4 * j
//
// Vectors of 32 bytes take a tile as two halves of 8 rows each.
//
// A block is cut into bit planes whose widths divide 8, the low bits of a code in the widest one:
// 2 = 2, 3 = 2+1, 4 = 4, 5 = 4+1, 6 = 4+2, 7 = 4+2+1, 8 = 8. A plane of width p packs 8/p quads
// into one vector, quad j of the plane at bit p * (j % (8/p)) of every byte of vector j / (8/p):
//
//   block, b = 7 | 4-bit plane                | 2-bit plane      | 1-bit plane |
//   (7 vectors)  | q1:q0  q3:q2  q5:q4  q7:q6 | q3:..:q0 q7:..:q4| q7:......:q0|
//
// So a block of width b is b vectors, 64*b bytes: no bit is lost but in the padding. Order in
// memory: [tile][block][plane][vector][64 bytes]. Rows beyond n and columns beyond k hold code 0.
// Groups do not show in this order, so that any group size, odd or partial, has the same layout.
//
// Affine. w = code * scale + minimum in fp32; an integer zero z has minimum -z * scale, which is
// exact for fp16 and bf16 scales. Order: [tile][group][scale, zero or minimum][16 rows], the second
// of them only where there is one (AffineKind, quant_types.h); rows beyond n hold zeros, so that
// they add nothing. Few rows of activations read it from memory: 16 bits where 16 bits are stored.
#pragma once

#include <cstdint>

#include "packing.h"
#include "quant_types.h"

namespace mmq::cpu {

constexpr int kTileRows = 16;
constexpr int kHalfRows = 8;
constexpr int kHalves = kTileRows / kHalfRows;
constexpr int kQuadCols = 4;
constexpr int kBlockCols = 32;
constexpr int kBlockQuads = kBlockCols / kQuadCols;
constexpr int kQuadBytes = kTileRows * kQuadCols;  // one vector of unpacked codes
constexpr int kHalfBytes = kHalfRows * kQuadCols;
constexpr int kBlockCodes = kTileRows * kBlockCols;  // unpacked bytes of a block

constexpr int64_t tile_count(int64_t n) { return ceil_div(n, kTileRows); }
constexpr int64_t half_count(int64_t n) { return ceil_div(n, kHalfRows); }
constexpr int64_t block_count(int64_t k) { return ceil_div(k, kBlockCols); }
constexpr int64_t block_bytes(int bits) { return kQuadBytes * bits; }
constexpr int64_t tile_bytes(int64_t k, int bits) { return block_count(k) * block_bytes(bits); }
constexpr int64_t tiles_bytes(int64_t n, int64_t k, int bits) {
  return tile_count(n) * tile_bytes(k, bits);
}

// Of one tile and group.
constexpr int64_t affine_bytes(AffineKind kind) {
  return kind == AffineKind::kScale16       ? kTileRows * 2
         : kind == AffineKind::kScaleZero16 ? kTileRows * 4
                                            : kTileRows * 8;
}

// Calls visit(width, low_bit) for every plane of a block, in memory order. low_bit is the position
// of the plane's lowest bit in a code, and its first vector, for a plane has as many vectors as
// bits. Recursion, so that a compiler that knows `bits` knows all of it.
template <int kWidth = 8, class Visit>
constexpr void for_each_plane(int bits, Visit visit, int low_bit = 0) {
  if (bits & kWidth) {
    visit(kWidth, low_bit);
    low_bit += kWidth;
  }
  if constexpr (kWidth > 1) for_each_plane<kWidth / 2>(bits, visit, low_bit);
}

// One block to bytes, codes[quad][row][4].
void unpack_block(const uint8_t* block, int bits, uint8_t* codes);

// Canonical stream [n, row_words(k, bits)] to tiles of tiles_bytes(n, k, bits) bytes, and back.
void repack(const uint32_t* words, int64_t n, int64_t k, int bits, uint8_t* tiles);
void unrepack(const uint8_t* tiles, int64_t n, int64_t k, int bits, uint32_t* words);

}  // namespace mmq::cpu
