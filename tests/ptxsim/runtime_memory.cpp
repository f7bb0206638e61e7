// SPDX-License-Identifier: Apache-2.0
// The stand-in runtime's memory calls. Device memory is host memory, so a copy is a memcpy whose
// device side is checked against the allocations and registered ranges.
#include <cstdlib>
#include <cstring>

#include "runtime.h"

namespace ptxsim {
namespace {

bool is_device(const void* pointer, size_t bytes) { return Device::get().contains(pointer, bytes); }

cudaError_t copy(void* target, const void* source, size_t bytes, int kind) {
  if (kind < kHostToHost || kind > kDefault) return kInvalidMemcpyDirection;
  if (bytes == 0) return kSuccess;
  if (target == nullptr || source == nullptr) return kInvalidValue;
  const bool to_device = kind == kHostToDevice || kind == kDeviceToDevice;
  const bool from_device = kind == kDeviceToHost || kind == kDeviceToDevice;
  if (to_device && !is_device(target, bytes)) return kInvalidValue;
  if (from_device && !is_device(source, bytes)) return kInvalidValue;
  std::memmove(target, source, bytes);
  if (is_device(target, bytes)) Device::get().mark_defined(target, bytes, true);
  return kSuccess;
}

cudaError_t fill(void* target, int value, size_t bytes) {
  if (bytes == 0) return kSuccess;
  if (!is_device(target, bytes)) return kInvalidValue;
  std::memset(target, value, bytes);
  Device::get().mark_defined(target, bytes, true);
  return kSuccess;
}

// Address of a __device__ or __constant__ variable, or the error.
cudaError_t find_symbol(Runtime& runtime, const void* symbol, char** address, size_t* bytes) {
  const auto found = runtime.variables.find(symbol);
  if (found == runtime.variables.end()) return kInvalidSymbol;
  const cudaError_t error = runtime.load(found->second.binary);
  if (error != kSuccess) return error;
  *address = static_cast<char*>(found->second.binary->module->variable(found->second.name, bytes));
  return *address == nullptr ? kInvalidSymbol : kSuccess;
}

// Copies into (or out of) a variable, which lies outside the allocations.
cudaError_t copy_symbol(const void* symbol, void* host, size_t bytes, size_t offset, bool to) {
  return call([&](Runtime& runtime) -> cudaError_t {
    char* address = nullptr;
    size_t size = 0;
    const cudaError_t error = find_symbol(runtime, symbol, &address, &size);
    if (error != kSuccess) return error;
    if (offset > size || bytes > size - offset) return kInvalidValue;
    std::memcpy(to ? address + offset : host, to ? host : address + offset, bytes);
    if (to && is_device(address, size)) Device::get().mark_defined(address + offset, bytes, true);
    return kSuccess;
  });
}

}  // namespace
}  // namespace ptxsim

using namespace ptxsim;  // the calls below are C functions

PTXSIM_EXPORT cudaError_t cudaMalloc(void** pointer, size_t bytes) {
  return call([&](Runtime&) -> cudaError_t {
    if (pointer == nullptr) return kInvalidValue;
    *pointer = nullptr;
    if (bytes == 0) return kSuccess;
    try {
      *pointer = Device::get().allocate(bytes);
    } catch (const std::bad_alloc&) {
      return kMemoryAllocation;
    }
    return *pointer == nullptr ? kMemoryAllocation : kSuccess;
  });
}

PTXSIM_EXPORT cudaError_t cudaFree(void* pointer) {
  return call([&](Runtime&) -> cudaError_t {
    return pointer == nullptr || Device::get().release(pointer) ? kSuccess : kInvalidValue;
  });
}

PTXSIM_EXPORT cudaError_t cudaMallocAsync(void** pointer, size_t bytes, cudaStream_t) {
  return cudaMalloc(pointer, bytes);
}

PTXSIM_EXPORT cudaError_t cudaFreeAsync(void* pointer, cudaStream_t) { return cudaFree(pointer); }

PTXSIM_EXPORT cudaError_t cudaMallocHost(void** pointer, size_t bytes) {
  return call([&](Runtime&) -> cudaError_t {
    *pointer = std::malloc(bytes);
    return *pointer == nullptr && bytes > 0 ? kMemoryAllocation : kSuccess;
  });
}

PTXSIM_EXPORT cudaError_t cudaFreeHost(void* pointer) {
  std::free(pointer);
  return kSuccess;
}

PTXSIM_EXPORT cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total_bytes) {
  return call([&](Runtime&) {
    *free_bytes = *total_bytes = size_t{40} << 30;
    return kSuccess;
  });
}

PTXSIM_EXPORT cudaError_t cudaMemcpy(void* target, const void* source, size_t bytes, int kind) {
  return call([&](Runtime&) { return copy(target, source, bytes, kind); });
}

PTXSIM_EXPORT cudaError_t cudaMemcpyAsync(void* target, const void* source, size_t bytes, int kind,
                                          cudaStream_t) {
  return cudaMemcpy(target, source, bytes, kind);
}

PTXSIM_EXPORT cudaError_t cudaMemset(void* target, int value, size_t bytes) {
  return call([&](Runtime&) { return fill(target, value, bytes); });
}

PTXSIM_EXPORT cudaError_t cudaMemsetAsync(void* target, int value, size_t bytes, cudaStream_t) {
  return cudaMemset(target, value, bytes);
}

PTXSIM_EXPORT cudaError_t cudaMemcpyToSymbol(const void* symbol, const void* source, size_t bytes,
                                             size_t offset, int) {
  return copy_symbol(symbol, const_cast<void*>(source), bytes, offset, true);
}

PTXSIM_EXPORT cudaError_t cudaMemcpyToSymbolAsync(const void* symbol, const void* source,
                                                  size_t bytes, size_t offset, int kind,
                                                  cudaStream_t) {
  return cudaMemcpyToSymbol(symbol, source, bytes, offset, kind);
}

PTXSIM_EXPORT cudaError_t cudaMemcpyFromSymbol(void* target, const void* symbol, size_t bytes,
                                               size_t offset, int) {
  return copy_symbol(symbol, target, bytes, offset, false);
}

PTXSIM_EXPORT cudaError_t cudaGetSymbolAddress(void** pointer, const void* symbol) {
  return call([&](Runtime& runtime) {
    char* address = nullptr;
    size_t bytes = 0;
    const cudaError_t error = find_symbol(runtime, symbol, &address, &bytes);
    *pointer = address;
    return error;
  });
}
