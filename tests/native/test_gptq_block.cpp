// SPDX-License-Identifier: Apache-2.0
// gptq_block: every instruction set gives the scalar version's bits.
#include <cstring>
#include <initializer_list>

#include "check.h"
#include "cpu/kernels.h"
#include "random.h"

using mmq::cpu::GptqBlockArgs;

namespace {

struct Result {
  std::vector<uint8_t> codes;
  std::vector<float> errors;
};

Result run(const char* isa, GptqBlockArgs args) {
  Result result{std::vector<uint8_t>(args.n * args.cols), std::vector<float>(args.n * args.cols)};
  args.codes = result.codes.data();
  args.errors = result.errors.data();
  mmq::cpu::select_isa(isa);
  mmq::cpu::kernels().gptq_block(args);
  return result;
}

bool same(const Result& a, const Result& b) {
  return a.codes == b.codes && !std::memcmp(a.errors.data(), b.errors.data(), 4 * a.errors.size());
}

void compare(int64_t n, int64_t cols, int64_t group, int bits, bool float_zero) {
  Random random(static_cast<uint32_t>(n * 1000 + cols));
  const int64_t groups = (cols + group - 1) / group;
  std::vector<float> w = random.floats(n * cols);
  std::vector<float> u = random.floats(cols * cols, -0.3f, 0.3f);
  for (int64_t i = 0; i < cols; ++i) u[i * cols + i] = random.in(0.5f, 2.f);
  const std::vector<float> scales = random.floats(n * groups, 0.05f, 0.4f);
  std::vector<float> zeros = random.floats(n * groups, 0.f, 3.f);
  if (!float_zero)
    for (float& zero : zeros) zero = static_cast<float>(static_cast<int>(zero));
  std::vector<int32_t> group_of(cols);
  for (int64_t i = 0; i < cols; ++i) group_of[i] = static_cast<int32_t>(i / group);
  const GptqBlockArgs args{
      w.data(), u.data(), scales.data(), zeros.data(), group_of.data(), nullptr, nullptr,
      n,        cols,     groups,        bits,         float_zero,      0};
  const Result expected = run("scalar", args);
  for (const char* const* isa = mmq::cpu::supported_isas(); *isa; ++isa) {
    CHECK(same(run(*isa, args), expected));
    const float before = w[0];
    w[0] += 0.73f;  // The comparison can fail.
    CHECK(!same(run(*isa, args), expected));
    w[0] = before;
  }
}

}  // namespace

int main() {
  for (const int64_t n : {1, 7, 8, 33})
    for (const int64_t cols : {1, 7, 8, 9, 40, 130})
      for (const int64_t group : {1, 7, 32, 200}) {
        compare(n, cols, group, 2, false);
        compare(n, cols, group, 8, true);
      }
  return failures() != 0;
}
