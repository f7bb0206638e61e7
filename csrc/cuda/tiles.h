// SPDX-License-Identifier: Apache-2.0
// The order in which the CUDA kernels read packed weights: picture, sizes, index arithmetic.
//
// Weights are the left operand of mma.m16n8k16 (16 out-features x 16 in-features), activations the
// right one (16 in-features x 8 rows), so that a lane's results belong to few features and it needs
// few scales. The unit is a block of 64 out-features (a strip) and 64 in-features:
//
//   file:    strip 0 [ block k=0 | block k=64 | ... ]  strip 1 [ block k=0 | ... ]  ...
//   block:   kBits vectors [ lane 0: 16 bytes | lane 1: 16 bytes | ... | lane 31 ]
//
// Four operands ("tiles", 16 features each) by four k steps (16 columns each) make a block; a lane
// holds 4 registers of two codes per tile and step: 64 registers, 128 codes, 4 * kBits words. With
// lane = 4 * g + t, register r of tile i and step j holds, in its low and its high half (e = 0, 1),
//
//   feature 8 * g + 2 * i + (r & 1)          (of 64: a lane's 8 features are neighbours)
//   column  16 * j + 8 * (r >> 1) + 2 * t + e  (of 64: as ldmatrix hands out activations)
//
// Features may be dealt to operand rows in any order; this one lets a lane read its 8 scales and
// write its 8 results with one 16-byte access.
//
// A width is a sum of planes of 8, 4, 2 and 1 bits, the widest plane with the lowest bits of the
// code. A plane of p bits takes p words for the 16 registers of a tile; register n = 4 * r + j lies
// in word n / (16 / p), field n % (16 / p) of each half:
//
//   p = 4   word r      | e=1: j=3 | j=2 | j=1 | j=0 | e=0: j=3 | j=2 | j=1 | j=0 |
//            bit        31        28    24    20    16         12     8     4     0
//
// so that one AND takes two codes that belong into one register. The words of tiles 0..3 follow one
// another and fill p vectors of four words; planes follow one another. Padding (features past n,
// columns past k) has code zero; kernels multiply it by zero activations and do not store it.
// Units: words are uint32, vectors 16 bytes a lane.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define MMQ_HOST_DEVICE __host__ __device__
#else
#define MMQ_HOST_DEVICE
#endif

namespace mmq::cuda {

constexpr int kBlockN = 64;        // out-features of a block
constexpr int kBlockK = 64;        // in-features of a block
constexpr int kTileFeatures = 16;  // rows of the mma operand
constexpr int kStepCols = 16;      // columns of the mma operand
constexpr int kTiles = kBlockN / kTileFeatures;
constexpr int kSteps = kBlockK / kStepCols;
constexpr int kLanes = 32;
constexpr int kVectorWords = 4;
constexpr int kRegisters = 4;                        // of the operand, per lane
constexpr int kTileRegisters = kRegisters * kSteps;  // per lane, tile and block

MMQ_HOST_DEVICE constexpr int64_t strips(int64_t n) { return (n + kBlockN - 1) / kBlockN; }
MMQ_HOST_DEVICE constexpr int64_t k_blocks(int64_t k) { return (k + kBlockK - 1) / kBlockK; }
MMQ_HOST_DEVICE constexpr int64_t padded_n(int64_t n) { return strips(n) * kBlockN; }
MMQ_HOST_DEVICE constexpr int block_words(int bits) { return bits * kLanes * kVectorWords; }
MMQ_HOST_DEVICE constexpr int64_t tiles_words(int64_t n, int64_t k, int bits) {
  return strips(n) * k_blocks(k) * block_words(bits);
}

// A plane: its width, and how many bits (and so words per tile) lie in the planes before it.
struct Plane {
  int width, low;
};

MMQ_HOST_DEVICE constexpr int plane_count(int bits) {
  return (bits >> 3 & 1) + (bits >> 2 & 1) + (bits >> 1 & 1) + (bits & 1);
}

MMQ_HOST_DEVICE constexpr Plane plane_of(int bits, int index) {
  int low = 0;
  for (int width = 8; width > 0; width /= 2) {
    if ((bits & width) == 0) continue;
    if (index-- == 0) return {width, low};
    low += width;
  }
  return {0, low};
}

// Where one code lies: its lane, tile and register in the block.
struct Place {
  int lane, tile, reg, step, half;
};

MMQ_HOST_DEVICE constexpr Place place_of(int feature, int col) {
  return {feature / 8 * 4 + col % 8 / 2, feature % 8 / 2, feature % 2 + col % 16 / 8 * 2,
          col / kStepCols, col % 2};
}

MMQ_HOST_DEVICE constexpr int feature_of(int lane, int tile, int reg) {
  return lane / 4 * 8 + tile * 2 + reg % 2;
}

MMQ_HOST_DEVICE constexpr int col_of(int lane, int reg, int step, int half) {
  return step * kStepCols + reg / 2 * 8 + lane % 4 * 2 + half;
}

// Word of a tile (0..width-1 within the plane) and bit of the plane's field of a register.
MMQ_HOST_DEVICE constexpr int field_word(int width, int reg, int step) {
  return (reg * kSteps + step) / (kTileRegisters / width);
}

MMQ_HOST_DEVICE constexpr int field_bit(int width, int reg, int step) {
  return (reg * kSteps + step) % (kTileRegisters / width) * width;
}

// Index of a word in its block.
MMQ_HOST_DEVICE constexpr int block_word(Plane plane, int tile, int word, int lane) {
  const int linear = tile * plane.width + word;
  const int vector = plane.low + linear / kVectorWords;
  return (vector * kLanes + lane) * kVectorWords + linear % kVectorWords;
}

static_assert(plane_count(7) == 3 && plane_of(7, 1).width == 2 && plane_of(7, 1).low == 4);
static_assert(field_word(4, 3, 2) == 3 && field_bit(4, 3, 2) == 8, "as in the picture");

}  // namespace mmq::cuda
