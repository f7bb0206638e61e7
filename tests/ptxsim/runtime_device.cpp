// SPDX-License-Identifier: Apache-2.0
// The stand-in runtime's one device: its number, attributes and properties; streams, events,
// synchronization, which have nothing to wait for.
#include <chrono>
#include <cstdio>
#include <cstring>
#include <set>

#include "runtime.h"

namespace ptxsim {
namespace {

constexpr int kDriverVersion = 13000;  // CUDA 13.0, for the driver and the runtime
constexpr size_t kGlobalBytes = size_t{40} << 30;
constexpr size_t kConstBytes = 64 << 10;

struct Event {
  std::chrono::steady_clock::time_point time;
  bool recorded = false;
};

// Handles that are in use; the default streams are 0, 1 (legacy) and 2 (per thread).
std::set<const void*>& live_streams() {
  static auto& streams = *new std::set<const void*>;
  return streams;
}

std::set<const void*>& live_events() {
  static auto& events = *new std::set<const void*>;
  return events;
}

cudaError_t check_stream(cudaStream_t stream) {
  const bool known = reinterpret_cast<uintptr_t>(stream) <= 2 || live_streams().count(stream) > 0;
  return known ? kSuccess : kInvalidResourceHandle;
}

cudaError_t check_event(cudaEvent_t event) {
  return live_events().count(event) > 0 ? kSuccess : kInvalidResourceHandle;
}

// cudaDeviceAttr numbers; those that are not listed are refused rather than guessed.
cudaError_t attribute(Runtime& runtime, int number, int* value) {
  const Architecture& limits = runtime.architecture();
  const Config& config = Device::get().config;
  switch (number) {
    case 1:  // threads of a block, along x, along y
    case 2:
    case 3:
      *value = kMaxThreadsPerBlock;
      return kSuccess;
    case 4:  // threads along z
      *value = 64;
      return kSuccess;
    case 5:  // blocks along x
      *value = INT32_MAX;
      return kSuccess;
    case 6:  // blocks along y, z
    case 7:
      *value = UINT16_MAX;
      return kSuccess;
    case 8:
      *value = kSharedBytesPerBlock;
      return kSuccess;
    case 9:
      *value = kConstBytes;
      return kSuccess;
    case 10:
      *value = 32;
      return kSuccess;
    case 12:  // registers of a block, of a multiprocessor
    case 82:
      *value = kRegistersPerSm;
      return kSuccess;
    case 16:
      *value = config.sm_count;
      return kSuccess;
    case 31:   // concurrent kernels
    case 41:   // unified addressing
    case 115:  // memory pools: cudaMallocAsync
      *value = 1;
      return kSuccess;
    case 20:   // compute mode: default
    case 95:   // cooperative launch: not modelled
    case 120:  // cluster launch: not modelled
      *value = 0;
      return kSuccess;
    case 38:
      *value = static_cast<int>(limits.l2_bytes);
      return kSuccess;
    case 39:
      *value = limits.max_threads_per_sm;
      return kSuccess;
    case 75:
      *value = config.capability / 10;
      return kSuccess;
    case 76:
      *value = config.capability % 10;
      return kSuccess;
    case 81:
      *value = static_cast<int>(limits.shared_bytes_per_sm);
      return kSuccess;
    case 97:
      *value = static_cast<int>(config.shared_optin);
      return kSuccess;
    case 106:
      *value = limits.max_blocks_per_sm;
      return kSuccess;
    case 111:
      *value = Architecture::kReservedSharedBytes;
      return kSuccess;
    default:
      return runtime.fail(kNotSupported,
                          "cudaDeviceGetAttribute: expected an attribute that the stand-in knows, "
                          "got " +
                              std::to_string(number));
  }
}

void fill_properties(Runtime& runtime, DeviceProp* properties) {
  const Architecture& limits = runtime.architecture();
  const Config& config = Device::get().config;
  *properties = {};
  std::snprintf(properties->name, sizeof properties->name, "PTX interpreter (limits of %s)",
                limits.device);
  properties->global_bytes = kGlobalBytes;
  properties->shared_bytes_per_block = kSharedBytesPerBlock;
  properties->registers_per_block = properties->registers_per_sm = kRegistersPerSm;
  properties->warp_size = 32;
  properties->max_threads_per_block = kMaxThreadsPerBlock;
  properties->max_block[0] = properties->max_block[1] = kMaxThreadsPerBlock;
  properties->max_block[2] = 64;
  properties->max_grid[0] = INT32_MAX;
  properties->max_grid[1] = properties->max_grid[2] = UINT16_MAX;
  properties->const_bytes = kConstBytes;
  properties->major = config.capability / 10;
  properties->minor = config.capability % 10;
  properties->sm_count = config.sm_count;
  properties->concurrent_kernels = properties->unified_addressing = 1;
  properties->l2_bytes = static_cast<int>(limits.l2_bytes);
  properties->max_threads_per_sm = limits.max_threads_per_sm;
  properties->shared_bytes_per_sm = limits.shared_bytes_per_sm;
  properties->shared_bytes_optin = config.shared_optin;
  properties->max_blocks_per_sm = limits.max_blocks_per_sm;
  properties->reserved_shared_bytes_per_block = Architecture::kReservedSharedBytes;
}

cudaError_t create_stream(cudaStream_t* stream) {
  return call([&](Runtime&) {
    *stream = new char;
    live_streams().insert(*stream);
    return kSuccess;
  });
}

cudaError_t create_event(cudaEvent_t* event) {
  return call([&](Runtime&) {
    *event = new Event;
    live_events().insert(*event);
    return kSuccess;
  });
}

}  // namespace
}  // namespace ptxsim

using namespace ptxsim;  // the calls below are C functions

PTXSIM_EXPORT cudaError_t cudaGetDeviceCount(int* count) {
  return call([&](Runtime&) {
    *count = 1;
    return kSuccess;
  });
}

PTXSIM_EXPORT cudaError_t cudaGetDevice(int* device) {
  return call([&](Runtime&) {
    *device = 0;
    return kSuccess;
  });
}

PTXSIM_EXPORT cudaError_t cudaSetDevice(int device) {
  return call([&](Runtime&) -> cudaError_t { return device == 0 ? kSuccess : kInvalidDevice; });
}

PTXSIM_EXPORT cudaError_t cudaDeviceGetAttribute(int* value, int number, int device) {
  return call([&](Runtime& runtime) -> cudaError_t {
    return device == 0 ? attribute(runtime, number, value) : kInvalidDevice;
  });
}

PTXSIM_EXPORT cudaError_t cudaGetDeviceProperties(DeviceProp* properties, int device) {
  return call([&](Runtime& runtime) -> cudaError_t {
    if (device != 0) return kInvalidDevice;
    fill_properties(runtime, properties);
    return kSuccess;
  });
}

// Both answer without a device; without a driver its version is 0.
PTXSIM_EXPORT cudaError_t cudaDriverGetVersion(int* version) {
  *version = Runtime::get().pretend == "no-driver" ? 0 : kDriverVersion;
  return kSuccess;
}

PTXSIM_EXPORT cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = kDriverVersion;
  return kSuccess;
}

PTXSIM_EXPORT cudaError_t cudaDeviceSynchronize() {
  return call([](Runtime&) { return kSuccess; });
}

PTXSIM_EXPORT cudaError_t cudaDeviceReset() {
  Runtime::get().reset_errors();
  return cudaDeviceSynchronize();
}

PTXSIM_EXPORT cudaError_t cudaGetLastError() { return Runtime::get().last_error(true); }

PTXSIM_EXPORT cudaError_t cudaPeekAtLastError() { return Runtime::get().last_error(false); }

PTXSIM_EXPORT cudaError_t cudaStreamCreate(cudaStream_t* stream) { return create_stream(stream); }

PTXSIM_EXPORT cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  return create_stream(stream);
}

PTXSIM_EXPORT cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) {
  return create_stream(stream);
}

PTXSIM_EXPORT cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  return call([&](Runtime&) -> cudaError_t {
    if (live_streams().erase(stream) == 0) return kInvalidResourceHandle;
    delete static_cast<char*>(stream);
    return kSuccess;
  });
}

PTXSIM_EXPORT cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  return call([&](Runtime&) { return check_stream(stream); });
}

PTXSIM_EXPORT cudaError_t cudaStreamQuery(cudaStream_t stream) {
  return cudaStreamSynchronize(stream);
}

PTXSIM_EXPORT cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  return call([&](Runtime&) {
    const cudaError_t error = check_stream(stream);
    return error == kSuccess ? check_event(event) : error;
  });
}

PTXSIM_EXPORT cudaError_t cudaStreamIsCapturing(cudaStream_t stream, int* status) {
  return call([&](Runtime&) {
    *status = 0;  // graphs are not modelled
    return check_stream(stream);
  });
}

PTXSIM_EXPORT cudaError_t cudaEventCreate(cudaEvent_t* event) { return create_event(event); }

PTXSIM_EXPORT cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  return create_event(event);
}

PTXSIM_EXPORT cudaError_t cudaEventDestroy(cudaEvent_t event) {
  return call([&](Runtime&) -> cudaError_t {
    if (live_events().erase(event) == 0) return kInvalidResourceHandle;
    delete static_cast<Event*>(event);
    return kSuccess;
  });
}

PTXSIM_EXPORT cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return call([&](Runtime&) -> cudaError_t {
    if (check_event(event) != kSuccess) return kInvalidResourceHandle;
    *static_cast<Event*>(event) = {std::chrono::steady_clock::now(), true};
    return check_stream(stream);
  });
}

PTXSIM_EXPORT cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  return call([&](Runtime&) { return check_event(event); });
}

PTXSIM_EXPORT cudaError_t cudaEventQuery(cudaEvent_t event) { return cudaEventSynchronize(event); }

// The interpreter's time: no CUDA time is claimed from it.
PTXSIM_EXPORT cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t start, cudaEvent_t end) {
  return call([&](Runtime&) -> cudaError_t {
    if (check_event(start) != kSuccess || check_event(end) != kSuccess) {
      return kInvalidResourceHandle;
    }
    const auto& first = *static_cast<Event*>(start);
    const auto& last = *static_cast<Event*>(end);
    if (!first.recorded || !last.recorded) return kInvalidResourceHandle;
    *ms = std::chrono::duration<float, std::milli>(last.time - first.time).count();
    return kSuccess;
  });
}
