// SPDX-License-Identifier: Apache-2.0
// packed_gemm of every supported instruction set, both modes, against sums in double. Buffers have
// exactly the stated sizes, so that the sanitizers see any step beyond them.
#include <cmath>
#include <cstdint>
#include <vector>

#include "check.h"
#include "cpu/kernels.h"
#include "cpu/layout.h"
#include "packing.h"

namespace {

using mmq::cpu::GemmMode;

struct Random {
  uint32_t state = 1;
  uint32_t next() { return (state = state * 1664525u + 1013904223u) >> 8; }
  float uniform() { return static_cast<float>(next()) / 8388608.f - 1.f; }  // [-1, 1)
};

void check_shape(const char* isa, int64_t m, int64_t n, int64_t k, int64_t group_size, int bits) {
  Random random;
  const int64_t groups = mmq::group_count(k, group_size);
  std::vector<uint8_t> codes(n * k);
  for (uint8_t& code : codes) code = static_cast<uint8_t>(random.next() & mmq::max_code(bits));
  std::vector<float> x(m * k), bias(n), scales(n * groups), minima(n * groups);
  for (float& value : x) value = random.uniform();
  for (float& value : bias) value = random.uniform();
  for (int64_t i = 0; i < n * groups; ++i) {
    scales[i] = 0.1f + 0.05f * random.uniform();
    minima[i] = -scales[i] * static_cast<float>(mmq::max_code(bits) / 2);
  }

  std::vector<uint32_t> words(n * mmq::row_words(k, bits));
  mmq::pack(codes.data(), n, k, bits, words.data());
  std::vector<uint8_t> tiles(mmq::cpu::tiles_bytes(n, k, bits));
  mmq::cpu::repack(words.data(), n, k, bits, tiles.data());
  constexpr int kAffineFloats = 2 * mmq::cpu::kTileRows;
  std::vector<float> affine(mmq::cpu::tile_count(n) * groups * kAffineFloats, 0.f);
  for (int64_t row = 0; row < n; ++row)
    for (int64_t group = 0; group < groups; ++group) {
      float* grid = affine.data() + (row / mmq::cpu::kTileRows * groups + group) * kAffineFloats +
                    row % mmq::cpu::kTileRows;
      grid[0] = scales[row * groups + group];
      grid[mmq::cpu::kTileRows] = minima[row * groups + group];
    }

  for (GemmMode mode : {GemmMode::kExact, GemmMode::kInt8}) {
    std::vector<float> y(m * n, NAN);
    mmq::cpu::kernels().packed_gemm({x.data(), tiles.data(), affine.data(), bias.data(), y.data(),
                                     m, n, k, group_size, bits, mode, mmq::AffineKind::kScaleMin32,
                                     mmq::ScaleType::kFloat32});
    for (int64_t i = 0; i < m; ++i)
      for (int64_t row = 0; row < n; ++row) {
        double sum = bias[row], size = 1;
        double steps = 0;  // sum |w| * half a step of the quantized activations, |x| <= 1
        for (int64_t j = 0; j < k; ++j) {
          const int64_t at = row * groups + j / group_size;
          const double w = codes[row * k + j] * double(scales[at]) + double(minima[at]);
          sum += x[i * k + j] * w;
          size += std::fabs(x[i * k + j]) * (codes[row * k + j] * scales[at] - minima[at]);
          steps += std::fabs(w) / 254;
        }
        const double bound = 1e-5 * size + (mode == GemmMode::kInt8 ? 1.001 * steps : 0);
        const bool within = std::fabs(y[i * n + row] - sum) <= bound;
        CHECK(within);
        if (!within)
          std::fprintf(stderr, "  %s mode %d m=%d k=%d g=%d b=%d at [%d, %d]: %g, not %g +- %g\n",
                       isa, int(mode), int(m), int(k), int(group_size), bits, int(i), int(row),
                       y[i * n + row], sum, bound);
      }
  }
}

}  // namespace

int main() {
  struct Shape {
    int64_t m, n, k, group_size;
  };
  const Shape shapes[] = {{0, 8, 32, 32},  {1, 2, 33, 33},     {1, 16, 64, 32},    {3, 9, 70, 7},
                          {4, 24, 96, 32}, {5, 7, 40, 1},      {13, 17, 300, 128}, {14, 8, 31, 31},
                          {2, 8, 0, 1},    {33, 150, 544, 64}, {130, 20, 70, 32},  {0, 8, 33, 7}};
  for (const char* const* isa = mmq::cpu::supported_isas(); *isa; ++isa) {
    mmq::cpu::select_isa(*isa);
    for (int bits = mmq::kMinBits; bits <= mmq::kMaxBits; ++bits)
      for (const Shape& s : shapes) check_shape(*isa, s.m, s.n, s.k, s.group_size, bits);
  }
  return failures();
}
