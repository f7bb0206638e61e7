// SPDX-License-Identifier: Apache-2.0
// grid_search: every instruction set gives the scalar version's bits, from the range and from the
// search over squares.
#include <initializer_list>

#include "check.h"
#include "cpu/kernels.h"
#include "random.h"

using mmq::cpu::GridSearchArgs;

namespace {

struct Result {
  std::vector<float> scales, zeros;
  bool operator==(const Result& other) const {
    return scales == other.scales && zeros == other.zeros;
  }
};

Result run(const char* isa, GridSearchArgs args) {
  const int64_t groups = (args.k + args.group_size - 1) / args.group_size;
  Result result{std::vector<float>(args.n * groups), std::vector<float>(args.n * groups)};
  args.scales = result.scales.data();
  args.zeros = result.zeros.data();
  mmq::cpu::select_isa(isa);
  mmq::cpu::kernels().grid_search(args);
  return result;
}

void compare(int64_t n, int64_t k, int64_t group, mmq::GridKind kind, int steps) {
  Random random(static_cast<uint32_t>(n * 1000 + k));
  std::vector<float> w = random.floats(n * k);
  const std::vector<float> importance = random.floats(k, 0.f, 1.f);
  const GridSearchArgs args{w.data(), importance.data(),        nullptr, nullptr, n,  k, group, 3,
                            kind,     mmq::ScaleType::kFloat16, steps,   0.8f,    2.f};
  const Result expected = run("scalar", args);
  for (const char* const* isa = mmq::cpu::supported_isas(); *isa; ++isa)
    CHECK(run(*isa, args) == expected);
  w[0] = 5.f;  // The comparison can fail.
  CHECK(!(run("scalar", args) == expected));
}

}  // namespace

int main() {
  using mmq::GridKind;
  for (const GridKind kind :
       {GridKind::kInteger, GridKind::kFloat, GridKind::kSymmetric, GridKind::kRestricted})
    for (const int64_t k : {2, 8, 33, 100})
      for (const int64_t group : {2, 7, 32, 200})
        for (const int steps : {0, 20}) compare(5, k, group, kind, steps);
  return failures() != 0;
}
