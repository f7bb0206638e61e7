// SPDX-License-Identifier: Apache-2.0
// libmmq_cuda.so as a table of functions, opened at the first call that needs it and never before,
// so that the module imports on machines without an NVIDIA driver and links no CUDA library.
#pragma once

#include <string>

#include "cuda/launchers.h"

namespace mmq {

// One pointer per function of cuda/launchers.h, under its name without the prefix.
struct CudaLibrary {
  std::string path;
  decltype(&mmq_cuda_tiles_bytes) tiles_bytes;
  decltype(&mmq_cuda_packed_gemm_workspace) packed_gemm_workspace;
  decltype(&mmq_cuda_packed_gemm) packed_gemm;
  decltype(&mmq_cuda_repack) repack;
  decltype(&mmq_cuda_unrepack) unrepack;
  decltype(&mmq_cuda_pack) pack;
  decltype(&mmq_cuda_unpack) unpack;
  decltype(&mmq_cuda_gptq_block) gptq_block;
  decltype(&mmq_cuda_awq_errors_workspace) awq_errors_workspace;
  decltype(&mmq_cuda_awq_errors) awq_errors;
  decltype(&mmq_cuda_device_count) device_count;
  decltype(&mmq_cuda_error_name) error_name;
  decltype(&mmq_cuda_error_string) error_string;
  decltype(&mmq_cuda_capability) capability;
  decltype(&mmq_cuda_can_run) can_run;
  decltype(&mmq_cuda_architectures) architectures;
};

// Where the library is looked for: MMQ_CUDA_LIBRARY, else beside the Python module.
std::string cuda_library_path();

// The library; opened once. Throws std::runtime_error that says why it cannot be had and what to
// do; a later call tries again.
const CudaLibrary& cuda_library();

// What `error`, a cudaError_t, means and what to do about it.
std::string describe_cuda_error(const CudaLibrary& library, int error);

// Throws std::runtime_error for a positive (cudaError_t) `status`, std::invalid_argument that names
// `arguments` and `fallback` for a negative one.
void check_cuda_status(const CudaLibrary& library, const char* op, int status,
                       const std::string& arguments, const char* fallback);

}  // namespace mmq
