// SPDX-License-Identifier: Apache-2.0
// pack and unpack: codes to the canonical bit stream of packing.h and back, bit for bit what the
// CPU makes.
//
// 32 codes, a chunk, fill exactly `bits` words. A warp treats kChunks = 8 chunks of one row: lane i
// holds code i of each chunk on one side, and words i and i + 32 of the 8 * bits words on the
// other, moved by shuffles. Both sides are coalesced and whole sectors: 32 bytes of codes per
// chunk, bits * 32 bytes of words.
//
//   grid.x   rows * ceil(cols / 256) warps, kWarps a block
//   block    kWarps warps
#include <cuda_runtime.h>

#include "cuda/launchers.h"
#include "packing.h"

namespace mmq::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kLanes = 32;
constexpr int kChunks = 8;
constexpr int kWarpCols = kChunks * kLanes;
constexpr unsigned kAllLanes = 0xffffffffu;
static_assert(kChunks * kMaxBits <= 2 * kLanes, "two words per lane");

// The part of a row that a warp treats.
struct Part {
  int64_t row, col, word;  // first column, and first word within the row
};

__device__ bool part_of_warp(int64_t rows, int64_t cols, int bits, Part& part) {
  const int64_t parts_per_row = ceil_div(cols, kWarpCols);
  const int64_t index = int64_t{blockIdx.x} * kWarps + threadIdx.x / kLanes;
  part.row = index / parts_per_row;
  const int64_t within = index - part.row * parts_per_row;
  part.col = within * kWarpCols;
  part.word = within * kChunks * bits;
  return part.row < rows;
}

// Word `lane` of the 32 codes that the lanes hold: its bits [32 lane, 32 lane + 32) of the stream
// begin in code lane * 32 / bits. Of use to lanes below `bits` only, but all take part.
__device__ uint32_t word_of_chunk(uint32_t code, int lane, int bits) {
  const int first = lane * kWordBits / bits;
  const int most = (kWordBits - 1) / bits + 2;  // codes that touch a word
  uint32_t word = 0;
  for (int i = 0; i < most; ++i) {
    const int from = first + i;
    const uint32_t other = __shfl_sync(kAllLanes, code, from & (kLanes - 1));
    const int shift = from * bits - lane * kWordBits;  // of the code's lowest bit in the word
    if (shift < kWordBits) word |= shift >= 0 ? other << shift : other >> -shift;
  }
  return word;
}

__global__ void __launch_bounds__(kWarps* kLanes)
    pack_kernel(const uint8_t* __restrict__ codes, int64_t rows, int64_t cols, int bits,
                uint32_t* __restrict__ words) {
  const int lane = threadIdx.x % kLanes;
  Part at;
  if (!part_of_warp(rows, cols, bits, at)) return;
  uint32_t low = 0, high = 0;  // words `lane` and `lane + 32` of the part
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    const int64_t col = at.col + chunk * kLanes + lane;
    const uint32_t code = col < cols ? codes[at.row * cols + col] : 0;
    const uint32_t word = word_of_chunk(code, lane, bits);
    const int from_low = lane - chunk * bits;  // this lane's words, within the chunk
    const int from_high = from_low + kLanes;
    const uint32_t for_low = __shfl_sync(kAllLanes, word, from_low & (kLanes - 1));
    const uint32_t for_high = __shfl_sync(kAllLanes, word, from_high & (kLanes - 1));
    if (from_low >= 0 && from_low < bits) low = for_low;
    if (from_high >= 0 && from_high < bits) high = for_high;
  }
  const int64_t words_per_row = row_words(cols, bits);
  const int64_t left = words_per_row - at.word;
  const int64_t count = left < kChunks * bits ? left : kChunks * bits;
  uint32_t* to = words + at.row * words_per_row + at.word;
  if (lane < count) to[lane] = low;
  if (lane + kLanes < count) to[lane + kLanes] = high;
}

__global__ void __launch_bounds__(kWarps* kLanes)
    unpack_kernel(const uint32_t* __restrict__ words, int64_t rows, int64_t cols, int bits,
                  uint8_t* __restrict__ codes) {
  const int lane = threadIdx.x % kLanes;
  Part at;
  if (!part_of_warp(rows, cols, bits, at)) return;
  const int64_t words_per_row = row_words(cols, bits);
  const int64_t left = words_per_row - at.word;
  const int64_t count = left < kChunks * bits ? left : kChunks * bits;
  const uint32_t* from = words + at.row * words_per_row + at.word;
  const uint32_t low = lane < count ? from[lane] : 0;
  const uint32_t high = lane + kLanes < count ? from[lane + kLanes] : 0;
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    const int64_t col = at.col + chunk * kLanes + lane;
    // The code lies in word `first` and, if it crosses a border, the next one.
    const int bit = lane * bits;
    const int first = chunk * bits + bit / kWordBits;
    uint32_t window[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int word = first + i;
      const uint32_t in_low = __shfl_sync(kAllLanes, low, word & (kLanes - 1));
      const uint32_t in_high = __shfl_sync(kAllLanes, high, word & (kLanes - 1));
      window[i] = word < kLanes ? in_low : in_high;
    }
    const uint32_t code = __funnelshift_r(window[0], window[1], bit % kWordBits) & max_code(bits);
    if (col < cols) codes[at.row * cols + col] = static_cast<uint8_t>(code);
  }
}

// Blocks for all rows, or 0 if a grid cannot have so many.
unsigned block_count(int64_t rows, int64_t cols) {
  const int64_t blocks = ceil_div(rows * ceil_div(cols, kWarpCols), kWarps);
  return blocks > 0x7fffffff ? 0 : static_cast<unsigned>(blocks);
}

}  // namespace
}  // namespace mmq::cuda

int mmq_cuda_pack(const uint8_t* codes, int64_t rows, int64_t cols, int bits, uint32_t* words,
                  mmq::cuda::Stream stream) {
  using namespace mmq::cuda;
  if (rows == 0 || cols == 0) return kOk;
  if (bits < mmq::kMinBits || bits > mmq::kMaxBits) return kUnsupported;
  const unsigned blocks = block_count(rows, cols);
  if (blocks == 0) return kUnsupported;
  pack_kernel<<<blocks, kWarps * kLanes, 0, static_cast<cudaStream_t>(stream)>>>(codes, rows, cols,
                                                                                 bits, words);
  return cudaGetLastError();
}

int mmq_cuda_unpack(const uint32_t* words, int64_t rows, int64_t cols, int bits, uint8_t* codes,
                    mmq::cuda::Stream stream) {
  using namespace mmq::cuda;
  if (rows == 0 || cols == 0) return kOk;
  if (bits < mmq::kMinBits || bits > mmq::kMaxBits) return kUnsupported;
  const unsigned blocks = block_count(rows, cols);
  if (blocks == 0) return kUnsupported;
  unpack_kernel<<<blocks, kWarps * kLanes, 0, static_cast<cudaStream_t>(stream)>>>(
      words, rows, cols, bits, codes);
  return cudaGetLastError();
}
