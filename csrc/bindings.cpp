// SPDX-License-Identifier: Apache-2.0
// The Python module: raw pointers and sizes, never a torch header. Tensors were checked for device,
// dtype, shape and contiguity by mmq_ext/ops.py, which holds them alive during the call; here the
// numbers are checked.
#include "bindings.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/layout.h"
#include "cpu/parallel.h"

namespace py = pybind11;

namespace mmq {
namespace {

void bind_pack(uintptr_t codes, int64_t rows, int64_t cols, int bits, uintptr_t words) {
  check_bits("pack", bits);
  check_size("pack", rows);
  check_size("pack", cols);
  py::gil_scoped_release release;
  pack(pointer<const uint8_t>(codes), rows, cols, bits, pointer<uint32_t>(words));
}

void bind_unpack(uintptr_t words, int64_t rows, int64_t cols, int bits, uintptr_t codes) {
  check_bits("unpack", bits);
  check_size("unpack", rows);
  check_size("unpack", cols);
  py::gil_scoped_release release;
  unpack(pointer<const uint32_t>(words), rows, cols, bits, pointer<uint8_t>(codes));
}

void bind_repack(uintptr_t words, int64_t n, int64_t k, int bits, uintptr_t tiles) {
  check_bits("repack", bits);
  check_size("repack", n);
  check_size("repack", k);
  py::gil_scoped_release release;
  cpu::repack(pointer<const uint32_t>(words), n, k, bits, pointer<uint8_t>(tiles));
}

void bind_unrepack(uintptr_t tiles, int64_t n, int64_t k, int bits, uintptr_t words) {
  check_bits("unrepack", bits);
  check_size("unrepack", n);
  check_size("unrepack", k);
  py::gil_scoped_release release;
  cpu::unrepack(pointer<const uint8_t>(tiles), n, k, bits, pointer<uint32_t>(words));
}

void bind_packed_gemm(uintptr_t x, uintptr_t tiles, uintptr_t affine, uintptr_t bias, uintptr_t y,
                      int64_t m, int64_t n, int64_t k, int64_t group_size, int bits, int mode,
                      int affine_kind, int scale_type, bool bfloat16) {
  check_bits("packed_gemm", bits);
  for (int64_t size : {m, n, k}) check_size("packed_gemm", size);
  check(k <= INT32_MAX, "packed_gemm", "k below 2^31", k);  // Columns are counted in 32 bits.
  check(group_size > 0, "packed_gemm", "a positive group size", group_size);
  check_enum("packed_gemm", "mode 0 (exact) or 1 (int8)", mode, 2);
  check_enum("packed_gemm", "an affine kind from 0 to 2", affine_kind, 3);
  check_enum("packed_gemm", "a scale type from 0 to 2", scale_type, 3);
  if (m == 0 || n == 0) return;
  py::gil_scoped_release release;
  const auto fp32 = [&](uintptr_t address) { return bfloat16 ? 0 : address; };
  const auto bf16 = [&](uintptr_t address) { return bfloat16 ? address : 0; };
  cpu::packed_gemm({pointer<const float>(fp32(x)), pointer<const uint8_t>(tiles),
                    pointer<const void>(affine), pointer<const float>(bias),
                    pointer<float>(fp32(y)), m, n, k, group_size, bits,
                    static_cast<cpu::GemmMode>(mode), static_cast<AffineKind>(affine_kind),
                    static_cast<ScaleType>(scale_type), pointer<const uint16_t>(bf16(x)),
                    pointer<uint16_t>(bf16(y))});
}

void bind_gptq_block(uintptr_t w, uintptr_t u, uintptr_t scales, uintptr_t zeros,
                     uintptr_t group_of, uintptr_t codes, uintptr_t errors, int64_t n, int64_t cols,
                     int64_t groups, int bits, bool float_zero, int min_code) {
  check_bits("gptq_block", bits);
  check(min_code == 0 || min_code == 1, "gptq_block", "a min_code of 0 or 1", min_code);
  for (int64_t size : {n, cols, groups}) check_size("gptq_block", size);
  if (n == 0 || cols == 0) return;
  const int32_t* group = pointer<const int32_t>(group_of);
  for (int64_t i = 0; i < cols; ++i)
    check(group[i] >= 0 && group[i] < groups, "gptq_block", "group indices below the group count",
          group[i]);
  const float* factor = pointer<const float>(u);
  for (int64_t i = 0; i < cols; ++i)
    check(factor[i * cols + i] > 0.f && std::isfinite(factor[i * cols + i]), "gptq_block",
          "a factor with a positive, finite diagonal", factor[i * cols + i]);
  py::gil_scoped_release release;
  cpu::kernels().gptq_block({pointer<const float>(w), factor, pointer<const float>(scales),
                             pointer<const float>(zeros), group, pointer<uint8_t>(codes),
                             pointer<float>(errors), n, cols, groups, bits, float_zero, min_code});
}

void bind_awq_errors(uintptr_t w, uintptr_t candidates, uintptr_t factor, uintptr_t errors,
                     int64_t n, int64_t k, int64_t rows, int64_t count, int64_t group_size,
                     int bits, int kind, int scale_type) {
  check_bits("awq_errors", bits);
  for (int64_t size : {n, k, rows, count}) check_size("awq_errors", size);
  check(group_size > 0, "awq_errors", "a positive group size", group_size);
  check_enum("awq_errors", "a grid kind from 0 to 3", kind, 4);
  check_enum("awq_errors", "a scale type from 0 to 2", scale_type, 3);
  py::gil_scoped_release release;
  cpu::kernels().awq_errors({pointer<const float>(w), pointer<const float>(candidates),
                             pointer<const float>(factor), pointer<double>(errors), n, k, rows,
                             count, group_size, bits, static_cast<GridKind>(kind),
                             static_cast<ScaleType>(scale_type)});
}

void bind_grid_search(uintptr_t w, uintptr_t importance, uintptr_t scales, uintptr_t zeros,
                      int64_t n, int64_t k, int64_t group_size, int bits, int kind, int scale_type,
                      int steps, float shrink, float exponent) {
  check_bits("grid_search", bits);
  check_size("grid_search", n);
  check_size("grid_search", k);
  check(group_size > 0, "grid_search", "a positive group size", group_size);
  check_enum("grid_search", "a grid kind from 0 to 3", kind, 4);
  check_enum("grid_search", "a scale type from 0 to 2", scale_type, 3);
  check(steps >= 0, "grid_search", "0 or more steps", steps);
  check(shrink >= 0.f && shrink < 1.f, "grid_search", "a shrink from 0 to below 1", shrink);
  check(exponent > 0.f, "grid_search", "a positive exponent", exponent);
  if (n == 0 || k == 0) return;
  py::gil_scoped_release release;
  cpu::kernels().grid_search({pointer<const float>(w), pointer<const float>(importance),
                              pointer<float>(scales), pointer<float>(zeros), n, k, group_size, bits,
                              static_cast<GridKind>(kind), static_cast<ScaleType>(scale_type),
                              steps, shrink, exponent});
}

void bind_hessian_update(uintptr_t sum, uintptr_t x, int64_t tokens, int64_t k) {
  check_size("hessian_update", tokens);
  check_size("hessian_update", k);
  if (tokens == 0 || k == 0) return;
  py::gil_scoped_release release;
  cpu::kernels().hessian_update({pointer<double>(sum), pointer<const float>(x), tokens, k});
}

std::vector<std::string> cpu_isas() {
  std::vector<std::string> names;
  for (const char* const* name = cpu::supported_isas(); *name; ++name) names.emplace_back(*name);
  return names;
}

}  // namespace
}  // namespace mmq

PYBIND11_MODULE(_C, m) {
  using namespace mmq;
  m.doc() = "mmq kernels over raw pointers; call them through mmq_ext.ops.";
  m.def("pack", &bind_pack);
  m.def("unpack", &bind_unpack);
  m.def("repack", &bind_repack);
  m.def("unrepack", &bind_unrepack);
  m.def("packed_gemm", &bind_packed_gemm);
  m.def("gptq_block", &bind_gptq_block);
  m.def("awq_errors", &bind_awq_errors);
  m.def("grid_search", &bind_grid_search);
  m.def("hessian_update", &bind_hessian_update);
  m.def("cpu_isa", [] { return std::string(cpu::kernels().name); });
  m.def("cpu_isas", &cpu_isas);
  m.def("select_isa",
        [](const std::string& name) { return std::string(cpu::select_isa(name.c_str())); });
  m.def("max_threads", &cpu::max_threads);
  m.def("threading_backend", [] { return std::string(cpu::threading_backend()); });
  bind_cuda(m);
}
