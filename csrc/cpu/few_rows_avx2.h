// SPDX-License-Identifier: Apache-2.0
// What the exact mode of packed_gemm needs to multiply few rows with codes decoded in registers:
// where the code of a column lies in a dword, and activations in the order and scale to match. A
// header of the AVX2 and AVX-512 files only.
#pragma once

#if defined(__x86_64__)

#include "cpu/kernels.h"
#include "cpu/layout.h"
#include "cpu/packed_gemm_avx2.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/target_avx2.h"

MMQ_AVX2_BEGIN

namespace mmq::cpu::avx2 {
namespace {

constexpr int kChainBlocks = kChainCols / kBlockCols;

// A code is a field of kBits bits of a dword. Widths of one plane are taken from the vectors as
// they lie in memory, 8 / kBits quads in each; the others from decoded quads, one per vector.
template <int kBits>
constexpr int kFieldQuads = (kBits & (kBits - 1)) == 0 ? 8 / kBits : 1;
template <int kBits>
constexpr int kFieldVectors = kBlockQuads / kFieldQuads<kBits>;

template <int kBits>
constexpr int field_position(int quad, int lane) {
  return 8 * lane + kBits * (quad % kFieldQuads<kBits>);
}

// A field is masked where it lies, not shifted down, and so comes out 2^position too large; x
// carries the inverse, exactly unless |x| < 2^-96. Only the topmost field is shifted, since
// conversion takes a dword's top bit for a sign.
template <int kBits>
constexpr bool is_top_field(int position) {
  return position + kBits == 32;
}

template <int kBits>
struct FieldScales {
  static constexpr int kPeriod = kFieldQuads<kBits> * kQuadCols;  // columns
  float of_column[kPeriod];
  constexpr FieldScales() : of_column{} {
    for (int i = 0; i < kPeriod; ++i) {
      const int position = field_position<kBits>(i / kQuadCols, i % kQuadCols);
      of_column[i] = is_top_field<kBits>(position) ? 1.f : 1.f / static_cast<float>(1u << position);
    }
  }
};

// The activations of a call, block after block of rows.
struct FewRowsActivations {
  float* x;     // [row block][k padded to blocks][row], times the field's scale
  float* sums;  // [row block][group][row], of x itself
};

// One row of one group: copies `count` columns to to[i * stride], zeros up to a whole block, and
// returns the sum of the columns, in 8 chains per kChainCols of them.
template <int kBits>
float prepare_group(const float* from, int64_t count, float* to, int64_t stride) {
  constexpr FieldScales<kBits> kScales;
  constexpr int kPeriod = FieldScales<kBits>::kPeriod;
  float total = 0;
  int64_t i = 0;
  for (int64_t begin = 0; begin < count; begin += kChainCols) {
    const int64_t end = smaller(begin + kChainCols, count);
    float sums[8] = {};
    for (; i + 8 <= end; i += 8)
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) {
        sums[j] += from[i + j];
        to[(i + j) * stride] = from[i + j] * kScales.of_column[(i + j) % kPeriod];
      }
    for (; i < end; ++i) {
      sums[0] += from[i];
      to[i * stride] = from[i] * kScales.of_column[i % kPeriod];
    }
    for (float sum : sums) total += sum;
  }
  for (const int64_t end = ceil_div(count, kBlockCols) * kBlockCols; i < end; ++i)
    to[i * stride] = 0;
  return total;
}

// Groups are whole blocks, but for the last one.
template <int kBits>
void prepare_few_rows(const PackedGemmArgs& a, const RowBlocks& rows,
                      const FewRowsActivations& to) {
  const int64_t groups = group_count(a.k, a.group_size);
  const int64_t cols = block_count(a.k) * kBlockCols;
  const int64_t group_macs = larger(ceil_div(a.m, rows.count) * smaller(a.group_size, a.k), 1);
  parallel_for(rows.count * groups, ceil_div(kMinTaskMacs / 4, group_macs),
               [&](int64_t task, int64_t task_end) {
                 for (; task < task_end; ++task) {
                   const int64_t block = task / groups, group = task % groups;
                   const int64_t first = rows.begin(block), count = rows.rows(block);
                   const int64_t begin = group * a.group_size;
                   for (int64_t row = 0; row < count; ++row)
                     to.sums[first * groups + group * count + row] = prepare_group<kBits>(
                         a.x + (first + row) * a.k + begin, smaller(a.group_size, a.k - begin),
                         to.x + first * cols + begin * count + row, count);
                 }
               });
}

// What a kernel reads for one block of rows and one tile.
struct FewRowsOperands {
  const uint8_t* tile;
  TileAffine affine[kHalves];
  const float* x;       // [k][rows]
  const float* x_sums;  // [group][rows]
  int64_t blocks, groups, group_blocks;
  float* sums;  // [rows][kTileRows]
};

// Measured: the processor's own prefetching does not keep up; codes are asked for so many bytes
// ahead, into L2.
constexpr int64_t kPrefetchBytes = 4096;

template <int kBits>
inline void prefetch_codes(const uint8_t* block) {
  for (int64_t i = kPrefetchBytes; i < kPrefetchBytes + block_bytes(kBits); i += kQuadBytes)
    _mm_prefetch(block + i, _MM_HINT_T1);
}

// FewRows has kRows and multiply<kBits>(rows, operands).
template <class FewRows, int kBits>
void multiply_few_rows(const PackedGemmArgs& a) {
  const int64_t groups = group_count(a.k, a.group_size), blocks = block_count(a.k);
  const int64_t cols = blocks * kBlockCols, tiles = tile_count(a.n);
  const RowBlocks rows(a.m, FewRows::kRows);
  Scratch memory(Scratch::padded(a.m * cols) + Scratch::padded(a.m * groups));
  const FewRowsActivations x{memory.take(a.m * cols), memory.take(a.m * groups)};
  prepare_few_rows<kBits>(a, rows, x);
  const int64_t grain = ceil_div(kMinTaskMacs, larger(a.m * kTileRows * cols, 1));
  parallel_for(tiles, grain, [&](int64_t begin, int64_t end) {
    alignas(64) float sums[FewRows::kRows * kTileRows];
    for (int64_t tile = begin; tile < end; ++tile) {
      for (int64_t block = 0; block < rows.count; ++block) {
        const int64_t first = rows.begin(block), count = rows.rows(block);
        FewRows::template multiply<kBits>(
            count, {a.tiles + tile * tile_bytes(a.k, kBits),
                    {half_affine(a, tile * kHalves), half_affine(a, tile * kHalves + 1)},
                    x.x + first * cols,
                    x.sums + first * groups,
                    blocks,
                    groups,
                    ceil_div(a.group_size, kBlockCols),
                    sums});
        for (int64_t row = 0; row < count; ++row)
          for (int64_t half = 0; half < kHalves; ++half)
            store_outputs(a, first + row, tile * kHalves + half,
                          _mm256_load_ps(sums + row * kTileRows + half * kHalfRows));
      }
    }
  });
}

// Whether decoding in registers serves the product, instead of a panel.
inline bool takes_few_rows(const PackedGemmArgs& a, int64_t panel_from_rows) {
  const bool whole_blocks = a.group_size % kBlockCols == 0 || a.group_size >= a.k;
  return a.k == 0 || (whole_blocks && a.m < panel_from_rows);
}

}  // namespace
}  // namespace mmq::cpu::avx2

MMQ_AVX2_END

#endif
