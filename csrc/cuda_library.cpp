// SPDX-License-Identifier: Apache-2.0
// Opening libmmq_cuda.so, and words for what its functions return.
#include "cuda_library.h"

#include <dlfcn.h>
#include <sys/stat.h>

#include <cstdlib>
#include <mutex>
#include <stdexcept>

namespace mmq {
namespace {

constexpr char kFileName[] = "libmmq_cuda.so";

bool exists(const std::string& path) {
  struct stat info;
  return stat(path.c_str(), &info) == 0;
}

template <class Function>
void look_up(void* handle, const std::string& path, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(handle, name));
  if (!function)
    throw std::runtime_error("cuda: expected a function " + std::string(name) + " in " + path +
                             ", got none; the library is of another version, build it again");
}

CudaLibrary open_library() {
  CudaLibrary library;
  library.path = cuda_library_path();
  const std::string& path = library.path;
  if (!exists(path))
    throw std::runtime_error(
        "cuda: expected the CUDA kernels in " + path +
        ", got no such file; this build has none. Build them where nvcc is on the PATH: "
        "cmake -S . -B build/dev -DMMQ_CUDA=on && cmake --build build/dev");
  void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!handle)
    throw std::runtime_error("cuda: cannot open the CUDA kernels: " + std::string(dlerror()));
#define MMQ_LOOK_UP(function) look_up(handle, path, "mmq_cuda_" #function, library.function)
  MMQ_LOOK_UP(tiles_bytes);
  MMQ_LOOK_UP(packed_gemm_workspace);
  MMQ_LOOK_UP(packed_gemm);
  MMQ_LOOK_UP(repack);
  MMQ_LOOK_UP(unrepack);
  MMQ_LOOK_UP(pack);
  MMQ_LOOK_UP(unpack);
  MMQ_LOOK_UP(gptq_block);
  MMQ_LOOK_UP(awq_errors_workspace);
  MMQ_LOOK_UP(awq_errors);
  MMQ_LOOK_UP(device_count);
  MMQ_LOOK_UP(error_name);
  MMQ_LOOK_UP(error_string);
  MMQ_LOOK_UP(capability);
  MMQ_LOOK_UP(can_run);
  MMQ_LOOK_UP(architectures);
#undef MMQ_LOOK_UP
  return library;
}

std::string with_point(int capability) {  // 80 as "8.0"
  return std::to_string(capability / 10) + "." + std::to_string(capability % 10);
}

// What to do about the errors that a machine's set-up causes, by the numbers of cudaError_t.
std::string advice(const CudaLibrary& library, int error) {
  switch (error) {
    case 35:   // cudaErrorInsufficientDriver
    case 222:  // cudaErrorUnsupportedPtxVersion
      return "no NVIDIA driver was found, or it is too old: install one for CUDA 13 or newer "
             "(nvidia-smi shows the version), or run on the CPU";
    case 34:  // cudaErrorStubLibrary
      return "a stub stands in the place of the NVIDIA driver: remove it from the library path";
    case 100:  // cudaErrorNoDevice
      return "the driver sees no device: see nvidia-smi and CUDA_VISIBLE_DEVICES, or run on the "
             "CPU";
    case 209: {  // cudaErrorNoKernelImageForDevice
      const int capability = library.capability();
      return "the device's compute capability is " +
             (capability > 0 ? with_point(capability) : std::string("unknown")) + ", " +
             library.path + " holds " + library.architectures() +
             ": build it with MMQ_CUDA_ARCHS for this device, or run on the CPU";
    }
    case 2:  // cudaErrorMemoryAllocation
      return "the device's memory is full: use a smaller batch";
    default:
      return "";
  }
}

}  // namespace

std::string cuda_library_path() {
  if (const char* path = std::getenv("MMQ_CUDA_LIBRARY"); path && *path) return path;
  Dl_info info;
  if (!dladdr(reinterpret_cast<void*>(&cuda_library_path), &info)) return kFileName;
  const std::string module = info.dli_fname;
  return module.substr(0, module.rfind('/') + 1) + kFileName;
}

const CudaLibrary& cuda_library() {
  static std::mutex mutex;
  static CudaLibrary library;
  static bool is_open = false;
  const std::lock_guard<std::mutex> lock(mutex);
  if (!is_open) {
    library = open_library();
    is_open = true;
  }
  return library;
}

std::string describe_cuda_error(const CudaLibrary& library, int error) {
  const std::string hint = advice(library, error);
  return std::string(library.error_name(error)) + " (" + library.error_string(error) + ")" +
         (hint.empty() ? "" : "; " + hint);
}

void check_cuda_status(const CudaLibrary& library, const char* op, int status,
                       const std::string& arguments, const char* fallback) {
  if (status == cuda::kOk) return;
  if (status > 0)
    throw std::runtime_error(std::string(op) + ": CUDA failed with " +
                             describe_cuda_error(library, status));
  if (status == cuda::kUnsupported)
    throw std::invalid_argument(std::string(op) + ": expected arguments that a CUDA kernel was " +
                                "built for, got " + arguments + "; " + fallback);
  throw std::invalid_argument(std::string(op) + ": expected a larger workspace, got status " +
                              std::to_string(status) + " for " + arguments);
}

}  // namespace mmq
