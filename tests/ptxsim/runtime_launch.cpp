// SPDX-License-Identifier: Apache-2.0
// The stand-in runtime's calls that nvcc's code makes: registration, launches; and what host code
// asks about kernels: attributes, occupancy.
#include <algorithm>

#include "runtime.h"

namespace ptxsim {
namespace {

struct CallConfiguration {
  Dim3 grid, block;
  size_t shared_bytes;
  cudaStream_t stream;
};

thread_local std::vector<CallConfiguration> call_configurations;

Function* find_function(Runtime& runtime, const void* stub) {
  const auto found = runtime.functions.find(stub);
  return found == runtime.functions.end() ? nullptr : &found->second;
}

// Calls body(function) with the loaded function of a stub.
template <typename Body>
cudaError_t with_function(const void* stub, Body body) {
  return call([&](Runtime& runtime) -> cudaError_t {
    Function* function = find_function(runtime, stub);
    if (function == nullptr) return kInvalidDeviceFunction;
    const cudaError_t error = runtime.load(function);
    return error == kSuccess ? body(runtime, *function) : error;
  });
}

int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// Registers are given to warps in units of 256, four warps at a time; shared memory in 128 bytes.
int resident_blocks(Runtime& runtime, const Function& function, int block_threads,
                    int64_t dynamic_shared_bytes) {
  const Architecture& limits = runtime.architecture();
  const KernelInfo& kernel = info(*function.kernel);
  if (block_threads > kernel.max_threads) return 0;
  const int64_t warps = (block_threads + 31) / 32;
  int64_t blocks =
      std::min<int64_t>(limits.max_blocks_per_sm, limits.max_threads_per_sm / 32 / warps);
  const int64_t warp_registers = round_up(runtime.registers(function) * 32, 256);
  if (warp_registers > 0) {
    const int64_t register_warps = kRegistersPerSm / warp_registers / 4 * 4;
    blocks = std::min(blocks, register_warps / warps);
  }
  if (dynamic_shared_bytes > runtime.max_dynamic_shared_bytes(function)) return 0;
  const int64_t shared_bytes = round_up(
      kernel.static_shared_bytes + dynamic_shared_bytes + Architecture::kReservedSharedBytes, 128);
  return static_cast<int>(std::min(blocks, limits.shared_bytes_per_sm / shared_bytes));
}

}  // namespace
}  // namespace ptxsim

using namespace ptxsim;  // the calls below are C functions

PTXSIM_EXPORT void** __cudaRegisterFatBinary(void* wrapper) {
  Runtime& runtime = Runtime::get();
  const std::lock_guard<std::recursive_mutex> lock(runtime.mutex);
  auto binary = std::make_unique<Binary>();
  binary->wrapper = wrapper;
  void** handle = reinterpret_cast<void**>(binary.get());
  runtime.binaries[handle] = std::move(binary);
  return handle;
}

PTXSIM_EXPORT void __cudaRegisterFatBinaryEnd(void**) {}

PTXSIM_EXPORT void __cudaUnregisterFatBinary(void** handle) {
  Runtime& runtime = Runtime::get();
  const std::lock_guard<std::recursive_mutex> lock(runtime.mutex);
  const auto found = runtime.binaries.find(handle);
  if (found == runtime.binaries.end()) return;
  const auto forget = [&](auto* entries) {
    for (auto it = entries->begin(); it != entries->end();) {
      it = it->second.binary == found->second.get() ? entries->erase(it) : std::next(it);
    }
  };
  forget(&runtime.functions);
  forget(&runtime.variables);
  runtime.binaries.erase(found);
}

PTXSIM_EXPORT void __cudaRegisterFunction(void** handle, const char* stub, char*, const char* name,
                                          int, void*, void*, void*, void*, int*) {
  Runtime& runtime = Runtime::get();
  const std::lock_guard<std::recursive_mutex> lock(runtime.mutex);
  Function function;
  function.binary = runtime.binaries.at(handle).get();
  function.name = name;
  runtime.functions[stub] = function;
}

PTXSIM_EXPORT void __cudaRegisterVar(void** handle, char* host_variable, char*, const char* name,
                                     int, size_t bytes, int, int) {
  Runtime& runtime = Runtime::get();
  const std::lock_guard<std::recursive_mutex> lock(runtime.mutex);
  runtime.variables[host_variable] = {runtime.binaries.at(handle).get(), name, bytes};
}

PTXSIM_EXPORT char __cudaInitModule(void**) { return 0; }

PTXSIM_EXPORT unsigned __cudaPushCallConfiguration(Dim3 grid, Dim3 block, size_t shared_bytes,
                                                   cudaStream_t stream) {
  call_configurations.push_back({grid, block, shared_bytes, stream});
  return 0;
}

PTXSIM_EXPORT cudaError_t __cudaPopCallConfiguration(Dim3* grid, Dim3* block, size_t* shared_bytes,
                                                     void* stream) {
  if (call_configurations.empty()) return Runtime::get().fail(kMissingConfiguration);
  const CallConfiguration& top = call_configurations.back();
  *grid = top.grid;
  *block = top.block;
  *shared_bytes = top.shared_bytes;
  *static_cast<cudaStream_t*>(stream) = top.stream;
  call_configurations.pop_back();
  return kSuccess;
}

// A handle is the stub's address: the function is looked up, and so loaded, at its launch.
PTXSIM_EXPORT cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* stub) {
  *kernel = const_cast<void*>(stub);
  return kSuccess;
}

PTXSIM_EXPORT cudaError_t cudaGetKernel(cudaKernel_t* kernel, const void* stub) {
  return with_function(stub, [&](Runtime&, Function&) { return __cudaGetKernel(kernel, stub); });
}

PTXSIM_EXPORT cudaError_t cudaLaunchKernel(const void* stub, Dim3 grid, Dim3 block, void** args,
                                           size_t shared_bytes, cudaStream_t) {
  return with_function(stub, [&](Runtime& runtime, Function& function) {
    return runtime.launch(&function, grid, block, shared_bytes, args);
  });
}

PTXSIM_EXPORT cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, Dim3 grid, Dim3 block,
                                             void** args, size_t shared_bytes,
                                             cudaStream_t stream) {
  return cudaLaunchKernel(kernel, grid, block, args, shared_bytes, stream);
}

PTXSIM_EXPORT cudaError_t cudaLaunchKernelExC(const LaunchConfig* config, const void* stub,
                                              void** args) {
  return with_function(stub, [&](Runtime& runtime, Function& function) -> cudaError_t {
    for (unsigned i = 0; i < config->attribute_count; ++i) {
      const int id = config->attributes[i].id;
      if (id == kAttributeCooperative || id == kAttributeClusterDimension) {
        return runtime.fail(kNotSupported, function.name +
                                               ": expected a launch without clusters and "
                                               "cooperative groups, got launch attribute " +
                                               std::to_string(id));
      }
    }
    return runtime.launch(&function, config->grid, config->block, config->dynamic_shared_bytes,
                          args);
  });
}

PTXSIM_EXPORT cudaError_t cudaFuncGetAttributes(FuncAttributes* attributes, const void* stub) {
  return with_function(stub, [&](Runtime& runtime, Function& function) {
    const KernelInfo& kernel = info(*function.kernel);
    *attributes = {};
    attributes->shared_bytes = kernel.static_shared_bytes;
    attributes->local_bytes = kernel.local_bytes;
    attributes->max_threads = kernel.max_threads;
    attributes->registers = runtime.registers(function);
    attributes->ptx_version = attributes->binary_version = function.binary->loaded_capability;
    attributes->max_dynamic_shared_bytes =
        static_cast<int>(runtime.max_dynamic_shared_bytes(function));
    attributes->shared_carveout = -1;
    return kSuccess;
  });
}

PTXSIM_EXPORT cudaError_t cudaFuncSetAttribute(const void* stub, int attribute, int value) {
  constexpr int kMaxDynamicSharedBytes = 8, kSharedCarveout = 9;
  return with_function(stub, [&](Runtime&, Function& function) -> cudaError_t {
    if (attribute == kSharedCarveout) return value <= 100 ? kSuccess : kInvalidValue;
    if (attribute != kMaxDynamicSharedBytes) return kNotSupported;
    const int64_t limit =
        Device::get().config.shared_optin - info(*function.kernel).static_shared_bytes;
    if (value < 0 || value > limit) return kInvalidValue;
    function.max_dynamic_shared_bytes = value;
    return kSuccess;
  });
}

PTXSIM_EXPORT cudaError_t cudaFuncSetCacheConfig(const void* stub, int) {
  return with_function(stub, [](Runtime&, Function&) { return kSuccess; });
}

PTXSIM_EXPORT cudaError_t cudaFuncGetName(const char** name, const void* stub) {
  return with_function(stub, [&](Runtime&, Function& function) {
    *name = function.name.c_str();
    return kSuccess;
  });
}

PTXSIM_EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int* blocks, const void* stub, int block_threads, size_t dynamic_shared_bytes, unsigned) {
  return with_function(stub, [&](Runtime& runtime, Function& function) -> cudaError_t {
    if (block_threads <= 0 || block_threads > kMaxThreadsPerBlock) return kInvalidValue;
    *blocks = resident_blocks(runtime, function, block_threads, dynamic_shared_bytes);
    return kSuccess;
  });
}

PTXSIM_EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(
    int* blocks, const void* stub, int block_threads, size_t dynamic_shared_bytes) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, stub, block_threads,
                                                                dynamic_shared_bytes, 0);
}
