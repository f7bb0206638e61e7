// SPDX-License-Identifier: Apache-2.0
// awq_errors: every instruction set within rounding of the scalar version.
#include <cmath>
#include <initializer_list>

#include "check.h"
#include "cpu/kernels.h"
#include "random.h"

using mmq::cpu::AwqErrorsArgs;

namespace {

constexpr int64_t kCount = 2;

std::vector<double> run(const char* isa, AwqErrorsArgs args) {
  std::vector<double> errors(kCount);
  args.errors = errors.data();
  mmq::cpu::select_isa(isa);
  mmq::cpu::kernels().awq_errors(args);
  return errors;
}

bool close(const std::vector<double>& a, const std::vector<double>& b) {
  for (int64_t c = 0; c < kCount; ++c)
    if (!(std::fabs(a[c] - b[c]) <= 1e-4 * b[c])) return false;
  return true;
}

void compare(int64_t n, int64_t k, int64_t rows, int64_t group, mmq::GridKind kind) {
  Random random(static_cast<uint32_t>(n * 1000 + k));
  const std::vector<float> w = random.floats(n * k);
  std::vector<float> candidates = random.floats(kCount * k, 0.5f, 2.f);
  std::vector<float> factor = random.floats(rows * k);
  const AwqErrorsArgs args{
      w.data(), candidates.data(),       factor.data(), nullptr, n, k, rows, kCount, group, 3,
      kind,     mmq::ScaleType::kFloat16};
  const std::vector<double> expected = run("scalar", args);
  for (const char* const* isa = mmq::cpu::supported_isas(); *isa; ++isa) {
    CHECK(close(run(*isa, args), expected));
    CHECK(run(*isa, args) == run(*isa, args));
  }
  for (float& x : factor) x *= 1.001f;  // The comparison can fail.
  CHECK(expected[0] == 0 || !close(run("scalar", args), expected));
}

}  // namespace

int main() {
  for (const int64_t n : {1, 7, 97})
    for (const int64_t k : {1, 33, 256, 300})
      for (const int64_t group : {1, 7, 32, 400}) {
        compare(n, k, 19, group, mmq::GridKind::kInteger);
        compare(n, k, 5, group, mmq::GridKind::kFloat);
      }
  return failures() != 0;
}
