// SPDX-License-Identifier: Apache-2.0
// packed_gemm of every supported instruction set, both modes, with fp32 and bfloat16 activations,
// against sums in double. Buffers have exactly the stated sizes, so that the sanitizers see any
// step beyond them.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "check.h"
#include "cpu/kernels.h"
#include "cpu/layout.h"
#include "packing.h"

namespace {

using mmq::AffineKind;
using mmq::cpu::GemmMode;

struct Random {
  uint32_t state = 1;
  uint32_t next() { return (state = state * 1664525u + 1013904223u) >> 8; }
  float uniform() { return static_cast<float>(next()) / 8388608.f - 1.f; }  // [-1, 1)
};

uint16_t to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<uint16_t>(bits >> 16);
}

float of_bfloat16(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Scales are bfloat16 numbers, so that every kind stores them exactly.
std::vector<uint8_t> make_affine(AffineKind kind, const std::vector<float>& scales, float zero,
                                 int64_t n, int64_t groups) {
  constexpr int kRows = mmq::cpu::kTileRows;
  const int64_t bytes = mmq::cpu::affine_bytes(kind);
  std::vector<uint8_t> affine(mmq::cpu::tile_count(n) * groups * bytes, 0);
  for (int64_t row = 0; row < n; ++row)
    for (int64_t group = 0; group < groups; ++group) {
      uint8_t* to = affine.data() + (row / kRows * groups + group) * bytes;
      const float scale = scales[row * groups + group], minimum = -scale * zero;
      if (kind == AffineKind::kScaleMin32) {
        std::memcpy(to + row % kRows * 4, &scale, 4);
        std::memcpy(to + (kRows + row % kRows) * 4, &minimum, 4);
        continue;
      }
      const uint16_t halves[] = {to_bfloat16(scale), to_bfloat16(zero)};
      std::memcpy(to + row % kRows * 2, &halves[0], 2);
      if (kind == AffineKind::kScaleZero16)
        std::memcpy(to + (kRows + row % kRows) * 2, &halves[1], 2);
    }
  return affine;
}

struct Shape {
  int64_t m, n, k, group_size;
};

void check_shape(const char* isa, const Shape& shape, int bits, AffineKind kind, bool bfloat16) {
  const auto [m, n, k, group_size] = shape;
  Random random;
  const int64_t groups = mmq::group_count(k, group_size);
  std::vector<uint8_t> codes(n * k);
  for (uint8_t& code : codes) code = static_cast<uint8_t>(random.next() & mmq::max_code(bits));
  std::vector<float> x(m * k), bias(n), scales(n * groups);
  for (float& value : x) value = of_bfloat16(to_bfloat16(random.uniform()));
  for (float& value : bias) value = random.uniform();
  for (float& value : scales) value = of_bfloat16(to_bfloat16(0.1f + 0.05f * random.uniform()));
  const float zero = static_cast<float>(1 << (bits - 1));
  std::vector<uint16_t> x_halves(m * k);
  for (int64_t i = 0; i < m * k; ++i) x_halves[i] = to_bfloat16(x[i]);

  std::vector<uint32_t> words(n * mmq::row_words(k, bits));
  mmq::pack(codes.data(), n, k, bits, words.data());
  std::vector<uint8_t> tiles(mmq::cpu::tiles_bytes(n, k, bits));
  mmq::cpu::repack(words.data(), n, k, bits, tiles.data());
  const std::vector<uint8_t> affine = make_affine(kind, scales, zero, n, groups);

  for (GemmMode mode : {GemmMode::kExact, GemmMode::kInt8}) {
    std::vector<float> y(m * n, NAN);
    std::vector<uint16_t> y_halves(m * n, 0x7fc0);
    mmq::cpu::packed_gemm({bfloat16 ? nullptr : x.data(), tiles.data(), affine.data(), bias.data(),
                           bfloat16 ? nullptr : y.data(), m, n, k, group_size, bits, mode, kind,
                           mmq::ScaleType::kBfloat16, bfloat16 ? x_halves.data() : nullptr,
                           bfloat16 ? y_halves.data() : nullptr});
    for (int64_t i = 0; i < m; ++i)
      for (int64_t row = 0; row < n; ++row) {
        double sum = bias[row], size = 1;
        double steps = 0;  // sum |w| * half a step of the quantized activations, |x| <= 1
        for (int64_t j = 0; j < k; ++j) {
          const double scale = scales[row * groups + j / group_size];
          const double w = (codes[row * k + j] - zero) * scale;
          sum += x[i * k + j] * w;
          size += std::fabs(x[i * k + j]) * (codes[row * k + j] + zero) * scale;
          steps += std::fabs(w) / 254;
        }
        const double bound = 1e-5 * size + (mode == GemmMode::kInt8 ? 1.001 * steps : 0) +
                             (bfloat16 ? 0.004 * (std::fabs(sum) + steps) : 0);
        const float found = bfloat16 ? of_bfloat16(y_halves[i * n + row]) : y[i * n + row];
        const bool within = std::fabs(found - sum) <= bound;
        CHECK(within);
        if (!within)
          std::fprintf(stderr, "  %s mode %d m=%d k=%d g=%d b=%d at [%d, %d]: %g, not %g +- %g\n",
                       isa, int(mode), int(m), int(k), int(group_size), bits, int(i), int(row),
                       found, sum, bound);
      }
  }
}

}  // namespace

int main() {
  const Shape shapes[] = {{0, 8, 32, 32},  {1, 2, 33, 33},     {1, 16, 64, 32},    {3, 9, 70, 7},
                          {4, 24, 96, 32}, {5, 7, 40, 1},      {13, 17, 300, 128}, {14, 8, 31, 31},
                          {2, 8, 0, 1},    {33, 150, 544, 64}, {130, 20, 70, 32},  {0, 8, 33, 7}};
  for (const char* const* isa = mmq::cpu::supported_isas(); *isa; ++isa) {
    mmq::cpu::select_isa(*isa);
    for (int bits = mmq::kMinBits; bits <= mmq::kMaxBits; ++bits)
      for (const Shape& shape : shapes) {
        check_shape(*isa, shape, bits, AffineKind::kScaleMin32, false);
        for (AffineKind kind :
             {AffineKind::kScale16, AffineKind::kScaleZero16, AffineKind::kScaleMin32})
          check_shape(*isa, shape, bits, kind, true);
      }
  }
  return failures();
}
