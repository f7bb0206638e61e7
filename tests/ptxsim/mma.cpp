// SPDX-License-Identifier: Apache-2.0
// mma.sync: m16n8k16 and m16n8k8 on f16 and bf16 with fp32 accumulation, m16n8k32 on bytes.
//
// lane = 4 g + t. A register r holds row g + 8 (r & 1), columns 2t + 8 (r >> 1) and the next one,
// which makes each register an 8x8 matrix in row order. B register r holds k = 2t + 8r and the next
// one, column g. C register r holds row g + 8 (r >> 1), column 2t + (r & 1).
//
// Products are summed in the order of k in fp32, rounded to nearest. With Config::mma_truncate a
// block of 8 products and the accumulator is aligned to the largest exponent and truncated instead,
// roughly as tensor cores do.

#include <algorithm>
#include <cmath>
#include <cstring>

#include "collectives.h"
#include "lanes.h"

namespace ptxsim {
namespace {

// Column j of an accumulator's row lies at j: the even columns first, then the odd ones, so that a
// row is two pieces of four lanes.
constexpr int place(int column) { return (column & 1) * 4 + column / 2; }

// Which outputs an undefined input feeds.
struct UndefinedFeed {
  uint32_t rows = 0, columns = 0;         // of the 16x8 result
  uint32_t of_register(int half) const {  // lanes of C registers 2 half, 2 half + 1, even columns
    uint32_t lanes = 0;
    for (int g = 0; g < 8; ++g) {
      if (rows >> (g + 8 * half) & 1) lanes |= 0xfu << (4 * g);
    }
    return lanes;
  }
  uint32_t of_columns(int odd) const {
    uint32_t lanes = 0;
    for (int t = 0; t < 4; ++t) {
      if (columns >> (2 * t + odd) & 1) lanes |= 0x11111111u << t;
    }
    return lanes;
  }
};

// Of f16 accumulators register r holds row g + 8r, columns 2t and 2t + 1: both columns at once.
// Undefined outputs: C's own, plus whole rows of undefined A and columns of undefined B.
void undefined(Warp& w, const Instr& in, int a_registers, int b_registers, int c_registers = 4) {
  const int a_first = c_registers, b_first = a_first + a_registers;
  const int c_first = b_first + b_registers;
  uint32_t any = 0;
  for (int i = a_first; i < c_first + c_registers; ++i) any |= w.undef[in.ops[i].undef];
  if (any == 0) {
    for (int i = 0; i < c_registers; ++i) w.undef[in.ops[i].undef] = 0;
    return;
  }
  UndefinedFeed feed;
  for (int r = 0; r < a_registers; ++r) {
    const uint32_t u = w.undef[in.ops[a_first + r].undef];
    for (int g = 0; g < 8; ++g) {
      if (u >> (4 * g) & 0xf) feed.rows |= 1u << (g + 8 * (r & 1));
    }
  }
  for (int r = 0; r < b_registers; ++r) {
    const uint32_t u = w.undef[in.ops[b_first + r].undef];
    for (int g = 0; g < 8; ++g) {
      if (u >> (4 * g) & 0xf) feed.columns |= 1u << g;
    }
  }
  uint32_t out[4];
  for (int r = 0; r < c_registers; ++r) {
    out[r] = w.undef[in.ops[c_first + r].undef];
    if (c_registers == 4) {
      out[r] |= feed.of_register(r >> 1) | feed.of_columns(r & 1);
    } else {
      out[r] |= feed.of_register(r) | feed.of_columns(0) | feed.of_columns(1);
    }
  }
  for (int r = 0; r < c_registers; ++r) w.undef[in.ops[r].undef] = out[r];
}

template <class H>
void widen_row(const uint32_t* from, float* to) {  // 8 values
#if defined(__F16C__) && defined(__AVX__)
  if constexpr (std::is_same_v<H, Half>) {
    __m128i halves;
    std::memcpy(&halves, from, sizeof(halves));
    _mm256_storeu_ps(to, _mm256_cvtph_ps(halves));
    return;
  }
#endif
  for (int i = 0; i < 4; ++i) {
    to[2 * i] = H::widen(static_cast<uint16_t>(from[i]));
    to[2 * i + 1] = H::widen(static_cast<uint16_t>(from[i] >> 16));
  }
}

// c + the sum of `n` products, all cut at 2^-24 of the largest magnitude.
float truncated_sum(float c, const float* a, const float* b, int stride, int n) {
  double terms[9];
  terms[0] = c;
  int top = -1000;
  for (int i = 0; i < n; ++i) terms[i + 1] = static_cast<double>(a[i]) * b[i * stride];
  for (int i = 0; i <= n; ++i) {
    if (!std::isfinite(terms[i])) {
      double sum = 0;
      for (int j = 0; j <= n; ++j) sum += terms[j];
      return static_cast<float>(sum);
    }
    if (terms[i] != 0) top = std::max(top, std::ilogb(terms[i]));
  }
  if (top == -1000) return c;
  double sum = 0;
  const double unit = std::ldexp(1.0, top - 24);
  for (int i = 0; i <= n; ++i) sum += std::trunc(terms[i] / unit) * unit;
  return double_to_float(sum, Round::kZero);
}

// The accumulators of both halves of the rows, even columns first, as fp32.
template <int kRegisters>
void read_accumulators(Warp& w, const Operand* ops, float c[16][8]) {
  for (int half = 0; half < 2; ++half) {
    if constexpr (kRegisters == 4) {
      const uint32_t* even = data<uint32_t>(w, ops[2 * half]);
      const uint32_t* odd = data<uint32_t>(w, ops[2 * half + 1]);
      for (int g = 0; g < 8; ++g) {
        std::memcpy(&c[g + 8 * half][0], even + 4 * g, 16);
        std::memcpy(&c[g + 8 * half][4], odd + 4 * g, 16);
      }
    } else {
      const uint32_t* both = data<uint32_t>(w, ops[half]);
      for (int l = 0; l < kLanes; ++l) {
        c[l / 4 + 8 * half][l % 4] = half_to_float(static_cast<uint16_t>(both[l]));
        c[l / 4 + 8 * half][4 + l % 4] = half_to_float(static_cast<uint16_t>(both[l] >> 16));
      }
    }
  }
}

template <int kRegisters>
void write_accumulators(Warp& w, const Operand* ops, const float c[16][8]) {
  for (int half = 0; half < 2; ++half) {
    if constexpr (kRegisters == 4) {
      uint32_t* even = data<uint32_t>(w, ops[2 * half]);
      uint32_t* odd = data<uint32_t>(w, ops[2 * half + 1]);
      for (int g = 0; g < 8; ++g) {
        std::memcpy(even + 4 * g, &c[g + 8 * half][0], 16);
        std::memcpy(odd + 4 * g, &c[g + 8 * half][4], 16);
      }
    } else {
      uint32_t* both = data<uint32_t>(w, ops[half]);
      for (int l = 0; l < kLanes; ++l) {
        const float* row = c[l / 4 + 8 * half];
        both[l] =
            static_cast<uint32_t>(float_to_half(row[4 + l % 4])) << 16 | float_to_half(row[l % 4]);
      }
    }
  }
}

template <class H, int kK, int kC>
void mma_float(Warp& w, const Instr& in, uint32_t) {
  constexpr int kA = kK == 16 ? 4 : 2, kB = kK / 8;
  alignas(32) float a[16][kK], transposed[8][8], b[kK][8], c[16][8];
  for (int r = 0; r < kA; ++r) {
    const uint32_t* from = data<uint32_t>(w, in.ops[kC + r]);
    for (int g = 0; g < 8; ++g) widen_row<H>(from + 4 * g, &a[g + 8 * (r & 1)][8 * (r >> 1)]);
  }
  for (int r = 0; r < kB; ++r) {
    const uint32_t* from = data<uint32_t>(w, in.ops[kC + kA + r]);
    for (int g = 0; g < 8; ++g) widen_row<H>(from + 4 * g, transposed[g]);
    for (int k = 0; k < 8; ++k) {
      for (int g = 0; g < 8; ++g) b[8 * r + k][place(g)] = transposed[g][k];
    }
  }
  read_accumulators<kC>(w, in.ops + kC + kA + kB, c);
  if (w.launch->config->mma_truncate) {
    for (int row = 0; row < 16; ++row) {
      for (int j = 0; j < 8; ++j) {
        for (int k = 0; k < kK; k += 8) {
          c[row][j] = truncated_sum(c[row][j], &a[row][k], &b[k][j], 8, 8);
        }
      }
    }
  } else {
    for (int row = 0; row < 16; ++row) {
      float sum[8];
      std::memcpy(sum, c[row], sizeof(sum));
      for (int k = 0; k < kK; ++k) {
        for (int j = 0; j < 8; ++j) sum[j] += a[row][k] * b[k][j];
      }
      std::memcpy(c[row], sum, sizeof(sum));
    }
  }
  undefined(w, in, kA, kB, kC);
  write_accumulators<kC>(w, in.ops, c);
}

// A register r: row g + 8 (r & 1), k = 4t + 16 (r >> 1) + 0..3; B register r: k = 4t + 16 r + 0..3.
template <class A, class B>
void mma_integer(Warp& w, const Instr& in, uint32_t) {
  A a[16][32];
  B b[8][32];
  for (int r = 0; r < 4; ++r) {
    const uint32_t* from = data<uint32_t>(w, in.ops[4 + r]);
    for (int g = 0; g < 8; ++g) {
      std::memcpy(&a[g + 8 * (r & 1)][16 * (r >> 1)], from + 4 * g, 16);
    }
  }
  for (int r = 0; r < 2; ++r) {
    const uint32_t* from = data<uint32_t>(w, in.ops[8 + r]);
    for (int g = 0; g < 8; ++g) std::memcpy(&b[g][16 * r], from + 4 * g, 16);
  }
  uint32_t out[4][kLanes];
  for (int r = 0; r < 4; ++r) {
    const uint32_t* c = data<uint32_t>(w, in.ops[10 + r]);
    for (int l = 0; l < kLanes; ++l) {
      const int row = l / 4 + 8 * (r >> 1), column = 2 * (l % 4) + (r & 1);
      uint32_t sum = c[l];
      for (int k = 0; k < 32; ++k) sum += static_cast<uint32_t>(a[row][k] * b[column][k]);
      out[r][l] = sum;
    }
  }
  undefined(w, in, 4, 2);
  for (int r = 0; r < 4; ++r) std::memcpy(data<uint32_t>(w, in.ops[r]), out[r], sizeof(out[r]));
}

}  // namespace

Fn mma_float_op(Type type, int k, bool half_accumulators) {
  if (type == Type::kF16 && half_accumulators) {
    return k == 16 ? mma_float<Half, 16, 2> : k == 8 ? mma_float<Half, 8, 2> : nullptr;
  }
  if (half_accumulators) return nullptr;
  if (type == Type::kF16) {
    return k == 16 ? mma_float<Half, 16, 4> : k == 8 ? mma_float<Half, 8, 4> : nullptr;
  }
  if (type != Type::kBf16) return nullptr;
  return k == 16 ? mma_float<Bfloat, 16, 4> : k == 8 ? mma_float<Bfloat, 8, 4> : nullptr;
}

Fn mma_integer_op(bool a_signed, bool b_signed) {
  if (a_signed) return b_signed ? mma_integer<int8_t, int8_t> : mma_integer<int8_t, uint8_t>;
  return b_signed ? mma_integer<uint8_t, int8_t> : mma_integer<uint8_t, uint8_t>;
}

}  // namespace ptxsim
