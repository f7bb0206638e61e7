// SPDX-License-Identifier: Apache-2.0
// repack and unrepack: the canonical stream of packing.h to the fragment order of tiles.h and back,
// bitwise inverse of each other. Done once per weight; plain rather than fast.
#include <algorithm>

#include "cuda_runtime.h"
#include "launchers.h"
#include "packing.h"
#include "tiles.h"

namespace mmq::cuda {

namespace {

constexpr int kRepackThreads = 256;
constexpr int kMaxBlocks = 65536;  // threads stride over what is left

// Code `col` of a row of the canonical stream; reads at most two words of the row.
__device__ uint32_t read_code(const uint32_t* row, int64_t col, int bits) {
  const int64_t bit = col * bits;
  const int shift = static_cast<int>(bit % kWordBits);
  uint64_t window = row[bit / kWordBits];
  if (shift + bits > kWordBits) window |= static_cast<uint64_t>(row[bit / kWordBits + 1]) << 32;
  return static_cast<uint32_t>(window >> shift) & static_cast<uint32_t>(max_code(bits));
}

// One thread: one word of the tiles, gathered from the codes that have bits in it.
__global__ void __launch_bounds__(kRepackThreads)
    repack_kernel(const uint32_t* words, int64_t n, int64_t k, int bits, uint32_t* tiles) {
  const int64_t count = tiles_words(n, k, bits), row_length = row_words(k, bits);
  const int64_t step = static_cast<int64_t>(gridDim.x) * kRepackThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kRepackThreads + threadIdx.x; i < count;
       i += step) {
    const int64_t block = i / block_words(bits);
    const int in_block = static_cast<int>(i % block_words(bits));
    const int vector = in_block / (kLanes * kVectorWords);
    const int lane = in_block / kVectorWords % kLanes;
    int index = 0;
    while (vector >= plane_of(bits, index).low + plane_of(bits, index).width) ++index;
    const Plane plane = plane_of(bits, index);
    const int linear = (vector - plane.low) * kVectorWords + in_block % kVectorWords;
    const int tile = linear / plane.width, word = linear % plane.width;
    const int64_t first_feature = block / k_blocks(k) * kBlockN;
    const int64_t first_col = block % k_blocks(k) * kBlockK;
    const int fields = kTileRegisters / plane.width;
    uint32_t out = 0;
    for (int field = 0; field < fields; ++field) {
      const int reg = (word * fields + field) / kSteps, k_step = (word * fields + field) % kSteps;
      const int64_t feature = first_feature + feature_of(lane, tile, reg);
      for (int half = 0; half < 2; ++half) {
        const int64_t col = first_col + col_of(lane, reg, k_step, half);
        if (feature >= n || col >= k) continue;
        const uint32_t code = read_code(words + feature * row_length, col, bits);
        const uint32_t part = code >> plane.low & ((1u << plane.width) - 1);
        out |= part << (16 * half + field * plane.width);
      }
    }
    tiles[i] = out;
  }
}

// The code of a feature and column out of its block.
__device__ uint32_t gather_code(const uint32_t* block, int feature, int col, int bits) {
  const Place at = place_of(feature, col);
  uint32_t code = 0;
  for (int index = 0; index < plane_count(bits); ++index) {
    const Plane plane = plane_of(bits, index);
    const int word = field_word(plane.width, at.reg, at.step);
    const int bit = 16 * at.half + field_bit(plane.width, at.reg, at.step);
    const uint32_t part = block[block_word(plane, at.tile, word, at.lane)] >> bit;
    code |= (part & ((1u << plane.width) - 1)) << plane.low;
  }
  return code;
}

// One thread: one word of the canonical stream.
__global__ void __launch_bounds__(kRepackThreads)
    unrepack_kernel(const uint32_t* tiles, int64_t n, int64_t k, int bits, uint32_t* words) {
  const int64_t row_length = row_words(k, bits), count = n * row_length;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kRepackThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kRepackThreads + threadIdx.x; i < count;
       i += step) {
    const int64_t feature = i / row_length, first_bit = i % row_length * kWordBits;
    uint32_t out = 0;
    for (int64_t col = first_bit / bits; col < k && col * bits < first_bit + kWordBits; ++col) {
      const int64_t block = feature / kBlockN * k_blocks(k) + col / kBlockK;
      const uint32_t code =
          gather_code(tiles + block * block_words(bits), static_cast<int>(feature % kBlockN),
                      static_cast<int>(col % kBlockK), bits);
      const int shift = static_cast<int>(col * bits - first_bit);
      out |= shift >= 0 ? code << shift : code >> -shift;
    }
    words[i] = out;
  }
}

int blocks_for(int64_t words) {
  return static_cast<int>(
      std::min<int64_t>((words + kRepackThreads - 1) / kRepackThreads, kMaxBlocks));
}

}  // namespace

}  // namespace mmq::cuda

int64_t mmq_cuda_tiles_bytes(int64_t n, int64_t k, int bits) {
  return mmq::cuda::tiles_words(n, k, bits) * 4;
}

int mmq_cuda_repack(const uint32_t* words, int64_t n, int64_t k, int bits, uint32_t* tiles,
                    mmq::cuda::Stream stream) {
  using namespace mmq::cuda;
  const int blocks = blocks_for(tiles_words(n, k, bits));
  if (blocks == 0) return kOk;
  repack_kernel<<<blocks, kRepackThreads, 0, static_cast<cudaStream_t>(stream)>>>(words, n, k, bits,
                                                                                  tiles);
  return cudaGetLastError();
}

int mmq_cuda_unrepack(const uint32_t* tiles, int64_t n, int64_t k, int bits, uint32_t* words,
                      mmq::cuda::Stream stream) {
  using namespace mmq::cuda;
  const int blocks = blocks_for(n * mmq::row_words(k, bits));
  if (blocks == 0) return kOk;
  unrepack_kernel<<<blocks, kRepackThreads, 0, static_cast<cudaStream_t>(stream)>>>(tiles, n, k,
                                                                                    bits, words);
  return cudaGetLastError();
}
