// SPDX-License-Identifier: Apache-2.0
// The vector power against std::pow in double, over the range the grid search uses.
#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <limits>

#include "check.h"
#include "cpu/kernels.h"
#include "cpu/power_avx2.h"

#if defined(__x86_64__)

MMQ_AVX2_BEGIN
namespace {

void power_of(const float* x, float exponent, float* y) {
  _mm256_storeu_ps(y, mmq::cpu::power(_mm256_loadu_ps(x), _mm256_set1_ps(exponent)));
}

}  // namespace
MMQ_AVX2_END

namespace {

double worst_error(float exponent) {
  double worst = 0;
  for (float x = 1e-6f; x < 256.f;) {
    float in[8], out[8];
    for (float& lane : in) {
      lane = x;
      x *= 1.0000931f;
    }
    power_of(in, exponent, out);
    for (int i = 0; i < 8; ++i) {
      const double exact = std::pow(static_cast<double>(in[i]), static_cast<double>(exponent));
      if (exact < std::numeric_limits<float>::min()) continue;
      worst = std::max(worst, std::fabs(out[i] - exact) / exact);
    }
  }
  return worst;
}

}  // namespace

int main() {
  if (!mmq::cpu::avx2::supported()) return 0;
  for (const float exponent : {0.5f, 1.f, 1.7f, 2.f, 2.4f, 3.f, 4.f}) {
    const double worst = worst_error(exponent);
    std::printf("power: exponent %.1f, largest relative error %.2e\n", exponent, worst);
    CHECK(worst < mmq::cpu::kPowerError);
    CHECK(worst > 0 || exponent == 1.f);  // The comparison sees rounding: it is not vacuous.
  }
  const float inf = std::numeric_limits<float>::infinity();
  const float in[8] = {0.f, inf, std::nanf(""), 1.f, 1e-40f, 1e30f, 4.f, 1e-30f};
  float out[8];
  power_of(in, 2.4f, out);
  CHECK(out[0] == 0.f && out[4] == 0.f && out[7] == 0.f);
  CHECK(out[1] != out[1] && out[2] != out[2]);
  CHECK(out[3] == 1.f && out[5] == inf);
  return failures() != 0;
}

#else
int main() { return 0; }
#endif
