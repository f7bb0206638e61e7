// SPDX-License-Identifier: Apache-2.0
// hessian_update: every instruction set within rounding of the scalar version's double sums.
#include <cmath>
#include <initializer_list>

#include "check.h"
#include "cpu/kernels.h"
#include "random.h"

namespace {

std::vector<double> run(const char* isa, const std::vector<float>& x, int64_t tokens, int64_t k) {
  std::vector<double> sum(static_cast<size_t>(k * k), 1.0);
  mmq::cpu::select_isa(isa);
  mmq::cpu::kernels().hessian_update({sum.data(), x.data(), tokens, k});
  return sum;
}

// Inputs are below 1: a chain of additions errs by its length times 2^-24 of at most `tokens`.
bool close(const std::vector<double>& a, const std::vector<double>& b, int64_t tokens) {
  const double bound = std::ldexp(static_cast<double>((tokens + 1) * tokens), -24);
  for (size_t i = 0; i < a.size(); ++i)
    if (!(std::fabs(a[i] - b[i]) <= bound)) return false;
  return true;
}

void compare(int64_t tokens, int64_t k) {
  Random random(static_cast<uint32_t>(tokens * 1000 + k));
  std::vector<float> x = random.floats(tokens * k);
  const std::vector<double> expected = run("scalar", x, tokens, k);
  for (int64_t i = 1; i < k; ++i) CHECK(expected[i * k] == 1.0);  // Below the diagonal.
  for (const char* const* isa = mmq::cpu::supported_isas(); *isa; ++isa) {
    CHECK(close(run(*isa, x, tokens, k), expected, tokens));
    CHECK(run(*isa, x, tokens, k) == run(*isa, x, tokens, k));
  }
  x[k - 1] += 1.f;  // The comparison can fail.
  CHECK(!close(run("scalar", x, tokens, k), expected, tokens));
}

}  // namespace

int main() {
  for (const int64_t tokens : {1, 15, 16, 17, 129})
    for (const int64_t k : {1, 7, 25, 48, 49, 100}) compare(tokens, k);
  compare(515, 50);
  return failures() != 0;
}
