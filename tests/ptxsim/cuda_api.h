// SPDX-License-Identifier: Apache-2.0
// The part of CUDA 13's C interface that the stand-in runtime supplies, declared anew so that it
// builds without a toolkit. Layouts and numbers are those of CUDA's headers; abi_check.cpp compares
// them where the headers are at hand.
#pragma once

#include <cstddef>
#include <cstdint>

#include "ptxsim.h"

#define PTXSIM_EXPORT extern "C" __attribute__((visibility("default")))

using cudaError_t = int;
using cudaStream_t = void*;
using cudaEvent_t = void*;
using cudaKernel_t = void*;

namespace ptxsim {

enum CudaError : int {
  kSuccess = 0,
  kInvalidValue = 1,
  kMemoryAllocation = 2,
  kInvalidConfiguration = 9,
  kInvalidSymbol = 13,
  kInvalidMemcpyDirection = 21,
  kInsufficientDriver = 35,
  kMissingConfiguration = 52,
  kInvalidDeviceFunction = 98,
  kNoDevice = 100,
  kInvalidDevice = 101,
  kNoKernelImageForDevice = 209,
  kInvalidPtx = 218,
  kInvalidResourceHandle = 400,
  kNotReady = 600,
  kLaunchOutOfResources = 701,
  kLaunchTimeout = 702,
  kLaunchFailure = 719,
  kNotSupported = 801,
};

enum MemcpyKind : int {
  kHostToHost = 0,
  kHostToDevice = 1,
  kDeviceToHost = 2,
  kDeviceToDevice = 3,
  kDefault = 4
};

struct FuncAttributes {
  size_t shared_bytes, const_bytes, local_bytes;
  int max_threads, registers, ptx_version, binary_version, cache_mode, max_dynamic_shared_bytes;
  int shared_carveout, cluster_must_be_set, cluster_width, cluster_height, cluster_depth;
  int rest[19];
};

struct DeviceProp {
  char name[256];
  char uuid[16], luid[8];
  unsigned luid_mask;
  size_t global_bytes, shared_bytes_per_block;
  int registers_per_block, warp_size;
  size_t memory_pitch;
  int max_threads_per_block, max_block[3], max_grid[3];
  size_t const_bytes;
  int major, minor;
  size_t texture_alignment, texture_pitch_alignment;
  int sm_count, integrated, maps_host_memory;
  int textures[41];  // limits of textures and surfaces: zero
  int concurrent_kernels, ecc, pci[3], tcc, async_engines, unified_addressing;
  int memory_bus_bits, l2_bytes, persisting_l2_bytes, max_threads_per_sm;
  int stream_priorities, l1_global, l1_local;
  size_t shared_bytes_per_sm;
  int registers_per_sm;
  int flags[9];
  size_t shared_bytes_optin;
  int host_page_tables, direct_host_access, max_blocks_per_sm, access_window;
  size_t reserved_shared_bytes_per_block;
  int rest[76];
};

struct LaunchAttribute {
  int id;
  int padding;
  char value[64];
};

struct LaunchConfig {
  Dim3 grid, block;
  size_t dynamic_shared_bytes;
  cudaStream_t stream;
  LaunchAttribute* attributes;
  unsigned attribute_count;
};

// cudaLaunchAttributeID of what a launch may ask for and the stand-in does not model.
constexpr int kAttributeCooperative = 2, kAttributeClusterDimension = 4;

}  // namespace ptxsim
