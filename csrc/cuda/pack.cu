// SPDX-License-Identifier: Apache-2.0
// pack and unpack: codes to the canonical bit stream of packing.h and back, bit for bit what the
// CPU makes.
//
// 32 codes fill exactly `bits` words, so a warp treats 32 codes of one row at a time: lane i holds
// code i when reading or writing codes, and word i (i < bits) when reading or writing words. Both
// sides are coalesced: 32 bytes of codes (one sector) against bits * 4 bytes of words.
//
//   grid.x   chunks of 32 codes, kChunksPerBlock a block, rows * ceil(cols / 32) of them in all
//   block    kChunksPerBlock warps
#include <cuda_runtime.h>

#include "cuda/launchers.h"
#include "packing.h"

namespace mmq::cuda {
namespace {

constexpr int kChunksPerBlock = 8;
constexpr int kLanes = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

struct Chunk {
  int64_t row, first_col, word;  // word: index of the chunk's first word in the row
};

__device__ Chunk chunk_of(int64_t index, int64_t chunks_per_row, int bits) {
  const int64_t row = index / chunks_per_row;
  const int64_t chunk = index - row * chunks_per_row;
  return {row, chunk * kLanes, chunk * bits};
}

__global__ void __launch_bounds__(kChunksPerBlock* kLanes)
    pack_kernel(const uint8_t* __restrict__ codes, int64_t rows, int64_t cols, int bits,
                int64_t chunks_per_row, uint32_t* __restrict__ words) {
  const int lane = threadIdx.x % kLanes;
  const int64_t index = int64_t{blockIdx.x} * kChunksPerBlock + threadIdx.x / kLanes;
  if (index >= rows * chunks_per_row) return;
  const Chunk at = chunk_of(index, chunks_per_row, bits);
  const int64_t col = at.first_col + lane;
  const uint32_t code = col < cols ? codes[at.row * cols + col] : 0;
  // Word `lane` of the chunk holds bits [32 lane, 32 lane + 32): codes lane * 32 / bits and on. The
  // loop is uniform over the warp, as shuffles need; at most 17 codes touch a word (2 bits: 16).
  const int first_code = lane * kWordBits / bits;
  const int codes_per_word = (kWordBits - 1) / bits + 2;
  uint32_t word = 0;
  for (int i = 0; i < codes_per_word; ++i) {
    const int from = first_code + i;
    const uint32_t other = __shfl_sync(kAllLanes, code, from & (kLanes - 1));
    const int shift = from * bits - lane * kWordBits;  // of the code's lowest bit within the word
    if (shift >= kWordBits || from >= kLanes) continue;
    word |= shift >= 0 ? other << shift : other >> -shift;
  }
  const int64_t words_per_row = row_words(cols, bits);
  if (lane < bits && at.word + lane < words_per_row)
    words[at.row * words_per_row + at.word + lane] = word;
}

__global__ void __launch_bounds__(kChunksPerBlock* kLanes)
    unpack_kernel(const uint32_t* __restrict__ words, int64_t rows, int64_t cols, int bits,
                  int64_t chunks_per_row, uint8_t* __restrict__ codes) {
  const int lane = threadIdx.x % kLanes;
  const int64_t index = int64_t{blockIdx.x} * kChunksPerBlock + threadIdx.x / kLanes;
  if (index >= rows * chunks_per_row) return;
  const Chunk at = chunk_of(index, chunks_per_row, bits);
  const int64_t words_per_row = row_words(cols, bits);
  uint32_t word = 0;
  if (lane < bits && at.word + lane < words_per_row)
    word = words[at.row * words_per_row + at.word + lane];
  const int bit = lane * bits;
  const uint32_t low = __shfl_sync(kAllLanes, word, bit / kWordBits);
  const uint32_t high = __shfl_sync(kAllLanes, word, (bit / kWordBits + 1) & (kLanes - 1));
  const uint32_t code = __funnelshift_r(low, high, bit % kWordBits) & max_code(bits);
  const int64_t col = at.first_col + lane;
  if (col < cols) codes[at.row * cols + col] = static_cast<uint8_t>(code);
}

// Blocks for rows * ceil(cols / 32) chunks, or 0 if a grid cannot have so many.
unsigned block_count(int64_t rows, int64_t chunks_per_row) {
  const int64_t blocks = ceil_div(rows * chunks_per_row, kChunksPerBlock);
  return blocks > 0x7fffffff ? 0 : static_cast<unsigned>(blocks);
}

}  // namespace
}  // namespace mmq::cuda

int mmq_cuda_pack(const uint8_t* codes, int64_t rows, int64_t cols, int bits, uint32_t* words,
                  mmq::cuda::Stream stream) {
  using namespace mmq::cuda;
  if (rows == 0 || cols == 0) return kOk;
  if (bits < mmq::kMinBits || bits > mmq::kMaxBits) return kUnsupported;
  const int64_t chunks = mmq::ceil_div(cols, kLanes);
  const unsigned blocks = block_count(rows, chunks);
  if (blocks == 0) return kUnsupported;
  pack_kernel<<<blocks, kChunksPerBlock * kLanes, 0, static_cast<cudaStream_t>(stream)>>>(
      codes, rows, cols, bits, chunks, words);
  return cudaGetLastError();
}

int mmq_cuda_unpack(const uint32_t* words, int64_t rows, int64_t cols, int bits, uint8_t* codes,
                    mmq::cuda::Stream stream) {
  using namespace mmq::cuda;
  if (rows == 0 || cols == 0) return kOk;
  if (bits < mmq::kMinBits || bits > mmq::kMaxBits) return kUnsupported;
  const int64_t chunks = mmq::ceil_div(cols, kLanes);
  const unsigned blocks = block_count(rows, chunks);
  if (blocks == 0) return kUnsupported;
  unpack_kernel<<<blocks, kChunksPerBlock * kLanes, 0, static_cast<cudaStream_t>(stream)>>>(
      words, rows, cols, bits, chunks, codes);
  return cudaGetLastError();
}
