// SPDX-License-Identifier: Apache-2.0
// gptq_block for AVX2: the operations of gptq_block_scalar.cpp in the same order per weight,
// without fused multiply-add, hence the same bits.
//
// A tile is kTileRows rows of the block, stored column by column:
//
//   tile[column][kTileRows]      rows run through the vector lanes, so a column step needs no
//   errors[column][kTileRows]    shuffle; both stay in L1/L2 for the whole recursion.
//
// Columns advance in strips of kStrip. Inside a strip each column updates the rest of the strip at
// once; the columns beyond it wait and then take the strip's kStrip updates in column order with
// one load and one store. A weight sees the same subtractions in the same order either way.
#include <algorithm>
#include <vector>

#include "cpu/grid_avx2.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "grid.h"
#include "packing.h"

#if defined(__x86_64__)

MMQ_AVX2_BEGIN
namespace mmq::cpu {
namespace {

constexpr int kVectors = 4;  // independent chains that hide the latency of the two divisions
constexpr int kTileRows = 8 * kVectors;
constexpr int kStrip = 8;

struct Tile {
  float* w;             // [cols][kTileRows]; a column's codes replace its weights once it is done
  float* errors;        // [cols][kTileRows]
  const float* scales;  // [slots][kTileRows]
  const float* zeros;   // [slots][kTileRows]
};

// w rows to tile columns. Missing rows of the last tile repeat the last row.
void load_tile(const float* w, int64_t cols, int64_t rows, float* tile) {
  for (int64_t first = 0; first < kTileRows; first += 8) {
    const float* row[8];
    for (int r = 0; r < 8; ++r) row[r] = w + (first + r < rows ? first + r : rows - 1) * cols;
    int64_t j = 0;
    for (; j + 8 <= cols; j += 8) {
      __m256 m[8];
      for (int r = 0; r < 8; ++r) m[r] = _mm256_loadu_ps(row[r] + j);
      transpose8(m);
      for (int c = 0; c < 8; ++c) _mm256_store_ps(tile + (j + c) * kTileRows + first, m[c]);
    }
    for (; j < cols; ++j)
      for (int r = 0; r < 8; ++r) tile[j * kTileRows + first + r] = row[r][j];
  }
}

// Tile columns back to rows: errors as they are, codes as bytes.
void store_tile(const Tile& tile, int64_t cols, int64_t rows, uint8_t* codes, float* errors) {
  for (int64_t first = 0; first < rows; first += 8) {
    const int count = static_cast<int>(rows - first < 8 ? rows - first : 8);
    int64_t j = 0;
    for (; j + 8 <= cols; j += 8) {
      __m256 m[8];
      for (int c = 0; c < 8; ++c) m[c] = _mm256_load_ps(tile.errors + (j + c) * kTileRows + first);
      transpose8(m);
      for (int r = 0; r < count; ++r) _mm256_storeu_ps(errors + (first + r) * cols + j, m[r]);
      for (int c = 0; c < 8; ++c) m[c] = _mm256_load_ps(tile.w + (j + c) * kTileRows + first);
      transpose8(m);
      for (int r = 0; r < count; ++r) {
        const __m256i wide = _mm256_cvtps_epi32(m[r]);
        const __m128i words =
            _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(codes + (first + r) * cols + j),
                         _mm_packus_epi16(words, words));
      }
    }
    for (; j < cols; ++j) {
      for (int r = 0; r < count; ++r) {
        errors[(first + r) * cols + j] = tile.errors[j * kTileRows + first + r];
        codes[(first + r) * cols + j] = static_cast<uint8_t>(tile.w[j * kTileRows + first + r]);
      }
    }
  }
}

// The columns [first, last) of one strip; each updates the later ones of the strip.
template <bool kFloatZero>
void strip(const GptqBlockArgs& a, const int32_t* slot_of, const Tile& tile, int64_t first,
           int64_t last) {
  const __m256 lowest = _mm256_set1_ps(static_cast<float>(a.min_code));
  const __m256 highest = _mm256_set1_ps(static_cast<float>(max_code(a.bits)));
  for (int64_t i = first; i < last; ++i) {
    const float* u_row = a.u + i * a.cols;
    const __m256 pivot = _mm256_broadcast_ss(u_row + i);
    const float* scales = tile.scales + static_cast<int64_t>(slot_of[i]) * kTileRows;
    const float* zeros = tile.zeros + static_cast<int64_t>(slot_of[i]) * kTileRows;
    float* column = tile.w + i * kTileRows;
    __m256 error[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      const __m256 w = _mm256_load_ps(column + 8 * v);
      const __m256 scale = _mm256_load_ps(scales + 8 * v);
      const __m256 zero = _mm256_load_ps(zeros + 8 * v);
      const __m256 code = code_of<kFloatZero>(w, scale, zero, lowest, highest);
      error[v] = _mm256_div_ps(_mm256_sub_ps(w, value_of<kFloatZero>(code, scale, zero)), pivot);
      _mm256_store_ps(column + 8 * v, code);
      _mm256_store_ps(tile.errors + i * kTileRows + 8 * v, error[v]);
    }
    for (int64_t j = i + 1; j < last; ++j) {
      const __m256 u = _mm256_broadcast_ss(u_row + j);
      float* later = tile.w + j * kTileRows;
      for (int v = 0; v < kVectors; ++v)
        _mm256_store_ps(later + 8 * v,
                        _mm256_sub_ps(_mm256_load_ps(later + 8 * v), _mm256_mul_ps(error[v], u)));
    }
  }
}

// The updates that a whole strip owes the columns after it: w[column] -= errors[i] * u[column][i]
// for i = 0..kStrip-1 in turn. `w` and `u` begin at the first of `columns` later columns.
void trail(float* w, const float* errors, const float* u, int64_t columns) {
  for (int v = 0; v < kVectors; ++v, w += 8, errors += 8) {
    __m256 error[kStrip];
    for (int i = 0; i < kStrip; ++i) error[i] = _mm256_load_ps(errors + i * kTileRows);
    for (int64_t j = 0; j < columns; ++j) {
      __m256 later = _mm256_load_ps(w + j * kTileRows);
      for (int i = 0; i < kStrip; ++i)
        later =
            _mm256_sub_ps(later, _mm256_mul_ps(error[i], _mm256_broadcast_ss(u + j * kStrip + i)));
      _mm256_store_ps(w + j * kTileRows, later);
    }
  }
}

template <bool kFloatZero>
void run_tile(const GptqBlockArgs& a, const int32_t* slot_of, const float* trailing_u,
              const Tile& tile, int64_t row, int64_t rows) {
  load_tile(a.w + row * a.cols, a.cols, rows, tile.w);
  for (int64_t first = 0; first < a.cols; first += kStrip) {
    const int64_t last = first + kStrip < a.cols ? first + kStrip : a.cols;
    strip<kFloatZero>(a, slot_of, tile, first, last);
    const int64_t columns = a.cols - last;
    if (columns == 0) break;
    trail(tile.w + last * kTileRows, tile.errors + first * kTileRows, trailing_u, columns);
    trailing_u += columns * kStrip;
  }
  store_tile(tile, a.cols, rows, a.codes + row * a.cols, a.errors + row * a.cols);
}

}  // namespace
}  // namespace mmq::cpu
MMQ_AVX2_END

namespace mmq::cpu::avx2 {
namespace {

// u as trail reads it: for each whole strip, for each column after it, the strip's kStrip entries.
std::vector<float> pack_trailing(const float* u, int64_t cols) {
  std::vector<float> packed;
  packed.reserve(static_cast<size_t>(cols * cols / 2));
  for (int64_t first = 0; first + kStrip < cols; first += kStrip)
    for (int64_t j = first + kStrip; j < cols; ++j)
      for (int64_t i = first; i < first + kStrip; ++i) packed.push_back(u[i * cols + j]);
  return packed;
}

}  // namespace

void gptq_block(const GptqBlockArgs& a) {
  // A slot is a group that occurs in this block; only those are transposed into the tile.
  std::vector<int32_t> slot_of(a.cols), slot_of_group(a.groups, -1), group_of_slot;
  for (int64_t i = 0; i < a.cols; ++i) {
    int32_t& slot = slot_of_group[a.group_of[i]];
    if (slot < 0) {
      slot = static_cast<int32_t>(group_of_slot.size());
      group_of_slot.push_back(a.group_of[i]);
    }
    slot_of[i] = slot;
  }
  const int64_t slots = static_cast<int64_t>(group_of_slot.size());
  const std::vector<float> trailing_u = pack_trailing(a.u, a.cols);
  parallel_for(ceil_div(a.n, kTileRows), 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(2 * (a.cols + slots) * kTileRows);
    float* scales = nullptr;
    float* zeros = nullptr;
    const Tile tile{scratch.take(a.cols * kTileRows), scratch.take(a.cols * kTileRows),
                    scales = scratch.take(slots * kTileRows),
                    zeros = scratch.take(slots * kTileRows)};
    for (int64_t t = begin; t < end; ++t) {
      const int64_t row = t * kTileRows;
      const int64_t rows = std::min<int64_t>(kTileRows, a.n - row);
      for (int64_t r = 0; r < kTileRows; ++r) {
        const int64_t source = (row + std::min(r, rows - 1)) * a.groups;
        for (int64_t s = 0; s < slots; ++s) {
          scales[s * kTileRows + r] = a.scales[source + group_of_slot[s]];
          zeros[s * kTileRows + r] = a.zeros[source + group_of_slot[s]];
        }
      }
      if (a.float_zero) {
        run_tile<true>(a, slot_of.data(), trailing_u.data(), tile, row, rows);
      } else {
        run_tile<false>(a, slot_of.data(), trailing_u.data(), tile, row, rows);
      }
    }
  });
}

}  // namespace mmq::cpu::avx2

#endif
