// SPDX-License-Identifier: Apache-2.0
// Which row of the kernel table runs. A new instruction set is a new row.
#include <atomic>
#include <cstdlib>
#include <string>
#include <vector>

#include "checks.h"
#include "cpu/kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace mmq::cpu {

#if defined(__x86_64__)
bool avx2::supported() {
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return false;
  constexpr unsigned kFma = 1u << 12, kOsxsave = 1u << 27, kF16c = 1u << 29;
  if ((ecx & (kFma | kOsxsave | kF16c)) != (kFma | kOsxsave | kF16c)) return false;
  // XCR0 bits 1 and 2: the OS saves the SSE and AVX state.
  unsigned xcr0_low, xcr0_high;
  __asm__("xgetbv" : "=a"(xcr0_low), "=d"(xcr0_high) : "c"(0));
  if ((xcr0_low & 6u) != 6u) return false;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  constexpr unsigned kAvx2 = 1u << 5;
  return (ebx & kAvx2) != 0;
}

bool avx512::supported() {
  unsigned eax, ebx, ecx, edx;
  if (!avx2::supported()) return false;
  // XCR0 bits 5, 6 and 7: the OS saves masks and all of 32 registers of 512 bits.
  unsigned xcr0_low, xcr0_high;
  __asm__("xgetbv" : "=a"(xcr0_low), "=d"(xcr0_high) : "c"(0));
  if ((xcr0_low & 0xe0u) != 0xe0u) return false;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  constexpr unsigned kF = 1u << 16, kDq = 1u << 17, kBw = 1u << 30, kVl = 1u << 31;
  constexpr unsigned kVnni = 1u << 11;
  return (ebx & (kF | kDq | kBw | kVl)) == (kF | kDq | kBw | kVl) && (ecx & kVnni) != 0;
}

bool avx512bf16::supported() {
  unsigned eax, ebx, ecx, edx;
  if (!avx512::supported() || !__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx)) return false;
  constexpr unsigned kBf16 = 1u << 5;
  return (eax & kBf16) != 0;
}

void avx512::packed_gemm(const PackedGemmArgs& args) {
  args.mode == GemmMode::kExact ? packed_gemm_exact(args) : packed_gemm_int8(args);
}

void avx2::packed_gemm(const PackedGemmArgs& args) {
  args.mode == GemmMode::kExact ? packed_gemm_exact(args) : packed_gemm_int8(args);
}
#endif

namespace {

// Best first.
const Kernels kTable[] = {
#if defined(__x86_64__)
    {"avx512bf16", avx512bf16::supported, avx512::packed_gemm, avx512bf16::packed_gemm_bfloat16,
     avx2::gptq_block, avx2::awq_errors, avx2::grid_search, avx512::hessian_update},
    {"avx512", avx512::supported, avx512::packed_gemm, scalar::packed_gemm_bfloat16,
     avx2::gptq_block, avx2::awq_errors, avx2::grid_search, avx512::hessian_update},
    {"avx2", avx2::supported, avx2::packed_gemm, scalar::packed_gemm_bfloat16, avx2::gptq_block,
     avx2::awq_errors, avx2::grid_search, avx2::hessian_update},
#endif
    {"scalar", [] { return true; }, scalar::packed_gemm, scalar::packed_gemm_bfloat16,
     scalar::gptq_block, scalar::awq_errors, scalar::grid_search, scalar::hessian_update},
};

const Kernels* find(const std::string& name) {
  std::string known;
  for (const Kernels& row : kTable) {
    if (row.name == name) {
      check(row.supported(), "cpu_isa", "an instruction set that this machine supports", name);
      return &row;
    }
    known += known.empty() ? row.name : std::string(", ") + row.name;
  }
  refuse("cpu_isa", "one of " + known, name);
}

const Kernels* best() {
  const char* forced = std::getenv("MMQ_CPU_ISA");
  if (forced && *forced) return find(forced);
  for (const Kernels& row : kTable)
    if (row.supported()) return &row;
  return nullptr;  // Not reached: the scalar row is always supported.
}

std::atomic<const Kernels*>& in_use() {
  static std::atomic<const Kernels*> table{best()};
  return table;
}

}  // namespace

const Kernels& kernels() { return *in_use().load(std::memory_order_relaxed); }

const char* select_isa(const char* name) { return in_use().exchange(find(name))->name; }

const char* const* supported_isas() {
  static const std::vector<const char*> names = [] {
    std::vector<const char*> found;
    for (const Kernels& row : kTable)
      if (row.supported()) found.push_back(row.name);
    found.push_back(nullptr);
    return found;
  }();
  return names.data();
}

}  // namespace mmq::cpu
