// SPDX-License-Identifier: Apache-2.0
// The Python module's CUDA half: numbers and addresses are checked here, as in bindings.cpp; then
// the functions of cuda/launchers.h run, in a library that is opened at the first call.
#include <pybind11/pybind11.h>

#include <initializer_list>
#include <limits>
#include <sstream>
#include <string>

#include "bindings.h"
#include "cuda_library.h"

namespace py = pybind11;

namespace mmq {
namespace {

using cuda::ActivationType;

constexpr int64_t kMostElements = std::numeric_limits<int32_t>::max();
constexpr uintptr_t kAlignment = 16;  // bytes of a lane's widest load
constexpr char kRunOnTheCpu[] = "run it on the CPU";

// Kernels index with 32 bits where that saves registers.
void check_matrix(const char* op, int64_t rows, int64_t cols) {
  for (int64_t size : {rows, cols}) {
    check_size(op, size);
    check(size <= kMostElements, op, "sizes below 2^31 on CUDA", size);
  }
  check(rows * cols <= kMostElements, op, "matrices of fewer than 2^31 elements on CUDA",
        std::to_string(rows) + " x " + std::to_string(cols));
}

void check_aligned(const char* op, std::initializer_list<uintptr_t> addresses) {
  for (uintptr_t address : addresses)
    check(address % kAlignment == 0, op, "addresses that are multiples of 16", address);
}

cuda::Stream stream_of(uintptr_t stream) { return pointer<void>(stream); }

std::string named(std::initializer_list<std::pair<const char*, int64_t>> arguments) {
  std::ostringstream text;
  for (const auto& [name, value] : arguments)
    text << (text.tellp() > 0 ? ", " : "") << name << "=" << value;
  return text.str();
}

// pack, unpack, repack and unrepack: (from, to, rows, cols, bits, stream).
template <class From, class To>
void convert(const char* op,
             int (*CudaLibrary::*function)(const From*, int64_t, int64_t, int, To*, cuda::Stream),
             uintptr_t from, uintptr_t to, int64_t rows, int64_t cols, int bits, uintptr_t stream) {
  check_bits(op, bits);
  check_matrix(op, rows, cols);
  check_aligned(op, {from, to});
  const CudaLibrary& library = cuda_library();
  if (rows == 0 || cols == 0) return;
  int status;
  {
    py::gil_scoped_release release;
    status = (library.*function)(pointer<const From>(from), rows, cols, bits, pointer<To>(to),
                                 stream_of(stream));
  }
  check_cuda_status(library, op, status, named({{"rows", rows}, {"cols", cols}, {"bits", bits}}),
                    kRunOnTheCpu);
}

void bind_pack(uintptr_t codes, uintptr_t words, int64_t rows, int64_t cols, int bits,
               uintptr_t stream) {
  convert("pack", &CudaLibrary::pack, codes, words, rows, cols, bits, stream);
}

void bind_unpack(uintptr_t words, uintptr_t codes, int64_t rows, int64_t cols, int bits,
                 uintptr_t stream) {
  convert("unpack", &CudaLibrary::unpack, words, codes, rows, cols, bits, stream);
}

void bind_repack(uintptr_t words, uintptr_t tiles, int64_t n, int64_t k, int bits,
                 uintptr_t stream) {
  convert("repack", &CudaLibrary::repack, words, tiles, n, k, bits, stream);
}

void bind_unrepack(uintptr_t tiles, uintptr_t words, int64_t n, int64_t k, int bits,
                   uintptr_t stream) {
  convert("unrepack", &CudaLibrary::unrepack, tiles, words, n, k, bits, stream);
}

int64_t bind_tiles_bytes(int64_t n, int64_t k, int bits) {
  check_bits("tiles_bytes", bits);
  check_matrix("tiles_bytes", n, k);
  return cuda_library().tiles_bytes(n, k, bits);
}

// The arguments that packed_gemm and the size of its workspace share.
cuda::PackedGemmArgs gemm_args(int64_t m, int64_t n, int64_t k, int64_t group_size, int bits,
                               int activation, int affine_kind, int scale_type) {
  const char* op = "packed_gemm";
  check_bits(op, bits);
  check_matrix(op, m, k);
  check_matrix(op, n, k);
  check_matrix(op, m, n);
  check(group_size > 0, op, "a positive group size", group_size);
  check(activation == 1 || activation == 2, op, "activations of float16 or bfloat16", activation);
  check_enum(op, "an affine kind from 0 to 2", affine_kind, 3);
  check_enum(op, "a scale type from 0 to 2", scale_type, 3);
  cuda::PackedGemmArgs args{};
  args.m = m;
  args.n = n;
  args.k = k;
  args.group_size = group_size;
  args.bits = bits;
  args.activation = static_cast<ActivationType>(activation);
  args.affine_kind = static_cast<AffineKind>(affine_kind);
  args.scale_type = static_cast<ScaleType>(scale_type);
  return args;
}

int64_t bind_packed_gemm_workspace(int64_t m, int64_t n, int64_t k, int64_t group_size, int bits,
                                   int activation, int affine_kind, int scale_type) {
  const cuda::PackedGemmArgs args =
      gemm_args(m, n, k, group_size, bits, activation, affine_kind, scale_type);
  return cuda_library().packed_gemm_workspace(&args);
}

void bind_packed_gemm(uintptr_t x, uintptr_t tiles, uintptr_t affine, uintptr_t bias,
                      uintptr_t perm, uintptr_t in_scale, uintptr_t y, uintptr_t workspace,
                      int64_t m, int64_t n, int64_t k, int64_t group_size, int bits, int activation,
                      int affine_kind, int scale_type, uintptr_t stream) {
  cuda::PackedGemmArgs args =
      gemm_args(m, n, k, group_size, bits, activation, affine_kind, scale_type);
  check_aligned("packed_gemm", {x, tiles, affine, bias, perm, in_scale, y, workspace});
  const CudaLibrary& library = cuda_library();
  if (m == 0 || n == 0) return;
  args.x = pointer<const void>(x);
  args.tiles = pointer<const uint32_t>(tiles);
  args.affine = pointer<const void>(affine);
  args.bias = pointer<const void>(bias);
  args.perm = pointer<const int32_t>(perm);
  args.in_scale = pointer<const float>(in_scale);
  args.y = pointer<void>(y);
  args.workspace = pointer<void>(workspace);
  int status;
  {
    py::gil_scoped_release release;
    status = library.packed_gemm(&args, stream_of(stream));
  }
  check_cuda_status(library, "packed_gemm", status,
                    named({{"m", m},
                           {"n", n},
                           {"k", k},
                           {"group_size", group_size},
                           {"bits", bits},
                           {"affine_kind", affine_kind}}),
                    "run the layer on the CPU, or as dense: QuantLinear.to_dense()");
}

void bind_gptq_block(uintptr_t w, uintptr_t u, uintptr_t scales, uintptr_t zeros,
                     uintptr_t group_of, uintptr_t codes, uintptr_t errors, int64_t n, int64_t cols,
                     int64_t groups, int bits, bool float_zero, int min_code, uintptr_t stream) {
  check_bits("gptq_block", bits);
  check(min_code == 0 || min_code == 1, "gptq_block", "a min_code of 0 or 1", min_code);
  check_matrix("gptq_block", n, cols);
  check_matrix("gptq_block", cols, cols);
  check_matrix("gptq_block", n, groups);
  check_aligned("gptq_block", {w, u, scales, zeros, group_of, codes, errors});
  const CudaLibrary& library = cuda_library();
  if (n == 0 || cols == 0) return;
  const cuda::GptqBlockArgs args{pointer<const float>(w),
                                 pointer<const float>(u),
                                 pointer<const float>(scales),
                                 pointer<const float>(zeros),
                                 pointer<const int32_t>(group_of),
                                 pointer<uint8_t>(codes),
                                 pointer<float>(errors),
                                 n,
                                 cols,
                                 groups,
                                 bits,
                                 float_zero,
                                 min_code};
  int status;
  {
    py::gil_scoped_release release;
    status = library.gptq_block(&args, stream_of(stream));
  }
  check_cuda_status(library, "gptq_block", status,
                    named({{"n", n}, {"cols", cols}, {"groups", groups}, {"bits", bits}}),
                    "use shorter blocks (GptqOptions.block), or quantize on the CPU");
}

cuda::AwqErrorsArgs awq_args(int64_t n, int64_t k, int64_t rows, int64_t count, int64_t group_size,
                             int bits, int kind, int scale_type) {
  const char* op = "awq_errors";
  check_bits(op, bits);
  check_matrix(op, n, k);
  check_matrix(op, rows, k);
  check_matrix(op, count, k);
  check(group_size > 0, op, "a positive group size", group_size);
  check_enum(op, "a grid kind from 0 to 3", kind, 4);
  check_enum(op, "a scale type from 0 to 2", scale_type, 3);
  return {nullptr,
          nullptr,
          nullptr,
          nullptr,
          nullptr,
          n,
          k,
          rows,
          count,
          group_size,
          bits,
          static_cast<GridKind>(kind),
          static_cast<ScaleType>(scale_type)};
}

int64_t bind_awq_errors_workspace(int64_t n, int64_t k, int64_t rows, int64_t count,
                                  int64_t group_size, int bits, int kind, int scale_type) {
  const cuda::AwqErrorsArgs args = awq_args(n, k, rows, count, group_size, bits, kind, scale_type);
  return cuda_library().awq_errors_workspace(&args);
}

void bind_awq_errors(uintptr_t w, uintptr_t candidates, uintptr_t factor, uintptr_t errors,
                     uintptr_t workspace, int64_t n, int64_t k, int64_t rows, int64_t count,
                     int64_t group_size, int bits, int kind, int scale_type, uintptr_t stream) {
  cuda::AwqErrorsArgs args = awq_args(n, k, rows, count, group_size, bits, kind, scale_type);
  check_aligned("awq_errors", {w, candidates, factor, errors, workspace});
  const CudaLibrary& library = cuda_library();
  if (count == 0) return;
  args.w = pointer<const float>(w);
  args.candidates = pointer<const float>(candidates);
  args.factor = pointer<const float>(factor);
  args.errors = pointer<double>(errors);
  args.workspace = pointer<void>(workspace);
  int status;
  {
    py::gil_scoped_release release;
    status = library.awq_errors(&args, stream_of(stream));
  }
  check_cuda_status(library, "awq_errors", status,
                    named({{"n", n},
                           {"k", k},
                           {"rows", rows},
                           {"count", count},
                           {"group_size", group_size},
                           {"bits", bits}}),
                    "search on the CPU");
}

// For people: what the library holds and what the machine has. Throws where there is no library.
py::dict cuda_status() {
  const CudaLibrary& library = cuda_library();
  const int devices = library.device_count();
  py::dict found;
  found["path"] = library.path;
  found["architectures"] = library.architectures();
  found["devices"] = devices > 0 ? devices : 0;
  found["problem"] = devices < 0    ? describe_cuda_error(library, -devices)
                     : devices == 0 ? describe_cuda_error(library, 100)
                                    : std::string();
  if (devices <= 0) return found;
  const int capability = library.capability();
  found["capability"] = capability;
  if (capability < 0) {
    found["problem"] = describe_cuda_error(library, -capability);
  } else if (const int runs = library.can_run(); runs <= 0) {
    found["problem"] = describe_cuda_error(library, -runs);
  }
  return found;
}

}  // namespace

void bind_cuda(py::module_& m) {
  m.def("cuda_pack", &bind_pack);
  m.def("cuda_unpack", &bind_unpack);
  m.def("cuda_repack", &bind_repack);
  m.def("cuda_unrepack", &bind_unrepack);
  m.def("cuda_tiles_bytes", &bind_tiles_bytes);
  m.def("cuda_packed_gemm_workspace", &bind_packed_gemm_workspace);
  m.def("cuda_packed_gemm", &bind_packed_gemm);
  m.def("cuda_gptq_block", &bind_gptq_block);
  m.def("cuda_awq_errors_workspace", &bind_awq_errors_workspace);
  m.def("cuda_awq_errors", &bind_awq_errors);
  m.def("cuda_library_path", &cuda_library_path);
  m.def("cuda_status", &cuda_status);
}

}  // namespace mmq
