// SPDX-License-Identifier: Apache-2.0
// Questions about the device: how many, which capability, whether this library can run there, and
// the names and texts of status numbers. Nothing here prints; every call leaves no sticky error.
#include <cuda_runtime.h>

#include "cuda/launchers.h"

namespace mmq::cuda {
namespace {

// Never launched: looking it up makes the driver load an image of this library, which fails if
// there is neither machine code nor PTX for the device.
__global__ void probe_kernel() {}

int failed(cudaError_t error) {
  cudaGetLastError();  // Clears it: a later launch must not be blamed.
  return -static_cast<int>(error);
}

}  // namespace
}  // namespace mmq::cuda

int mmq_cuda_device_count() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  return error == cudaSuccess ? count : mmq::cuda::failed(error);
}

int mmq_cuda_capability() {
  int device = 0, major = 0, minor = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  return error == cudaSuccess ? 10 * major + minor : mmq::cuda::failed(error);
}

int mmq_cuda_can_run() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, mmq::cuda::probe_kernel);
  return error == cudaSuccess ? 1 : mmq::cuda::failed(error);
}

const char* mmq_cuda_error_name(int status) {
  switch (status) {
    case mmq::cuda::kUnsupported:
      return "unsupported";
    case mmq::cuda::kWorkspaceTooSmall:
      return "workspaceTooSmall";
    default:
      return cudaGetErrorName(static_cast<cudaError_t>(status));
  }
}

const char* mmq_cuda_error_string(int status) {
  switch (status) {
    case mmq::cuda::kUnsupported:
      return "no kernel was built for these arguments";
    case mmq::cuda::kWorkspaceTooSmall:
      return "the workspace is smaller than this launch needs";
    default:
      return cudaGetErrorString(static_cast<cudaError_t>(status));
  }
}

const char* mmq_cuda_architectures() { return MMQ_CUDA_ARCHITECTURES; }
