// SPDX-License-Identifier: Apache-2.0
// Compares the declarations of cuda_api.h with CUDA's own, when its headers are at hand: compiling
// this file is the test. CUDA's names would clash with ours, so that ours come under another name.
#include <cuda_runtime_api.h>

#define cudaError_t StandInError
#define cudaStream_t StandInStream
#define cudaEvent_t StandInEvent
#define cudaKernel_t StandInKernel
#include "../cuda_api.h"
#undef cudaError_t
#undef cudaStream_t
#undef cudaEvent_t
#undef cudaKernel_t

static_assert(CUDART_VERSION / 1000 == 13, "cuda_api.h declares CUDA 13");

#define SAME_SIZE(ours, theirs) static_assert(sizeof(ptxsim::ours) == sizeof(theirs))
#define SAME_PLACE(ours, our_field, theirs, their_field)                              \
  static_assert(offsetof(ptxsim::ours, our_field) == offsetof(theirs, their_field) && \
                sizeof(ptxsim::ours::our_field) == sizeof(theirs::their_field))

SAME_SIZE(Dim3, dim3);
SAME_SIZE(LaunchAttribute, cudaLaunchAttribute);
SAME_SIZE(LaunchConfig, cudaLaunchConfig_t);
SAME_PLACE(LaunchConfig, dynamic_shared_bytes, cudaLaunchConfig_t, dynamicSmemBytes);
SAME_PLACE(LaunchConfig, attribute_count, cudaLaunchConfig_t, numAttrs);

SAME_SIZE(FuncAttributes, cudaFuncAttributes);
SAME_PLACE(FuncAttributes, shared_bytes, cudaFuncAttributes, sharedSizeBytes);
SAME_PLACE(FuncAttributes, local_bytes, cudaFuncAttributes, localSizeBytes);
SAME_PLACE(FuncAttributes, registers, cudaFuncAttributes, numRegs);
SAME_PLACE(FuncAttributes, max_dynamic_shared_bytes, cudaFuncAttributes, maxDynamicSharedSizeBytes);
SAME_PLACE(FuncAttributes, cluster_depth, cudaFuncAttributes, requiredClusterDepth);

SAME_SIZE(DeviceProp, cudaDeviceProp);
SAME_PLACE(DeviceProp, global_bytes, cudaDeviceProp, totalGlobalMem);
SAME_PLACE(DeviceProp, shared_bytes_per_block, cudaDeviceProp, sharedMemPerBlock);
SAME_PLACE(DeviceProp, registers_per_block, cudaDeviceProp, regsPerBlock);
SAME_PLACE(DeviceProp, max_threads_per_block, cudaDeviceProp, maxThreadsPerBlock);
SAME_PLACE(DeviceProp, max_grid, cudaDeviceProp, maxGridSize);
SAME_PLACE(DeviceProp, major, cudaDeviceProp, major);
SAME_PLACE(DeviceProp, sm_count, cudaDeviceProp, multiProcessorCount);
SAME_PLACE(DeviceProp, concurrent_kernels, cudaDeviceProp, concurrentKernels);
SAME_PLACE(DeviceProp, unified_addressing, cudaDeviceProp, unifiedAddressing);
SAME_PLACE(DeviceProp, l2_bytes, cudaDeviceProp, l2CacheSize);
SAME_PLACE(DeviceProp, max_threads_per_sm, cudaDeviceProp, maxThreadsPerMultiProcessor);
SAME_PLACE(DeviceProp, shared_bytes_per_sm, cudaDeviceProp, sharedMemPerMultiprocessor);
SAME_PLACE(DeviceProp, registers_per_sm, cudaDeviceProp, regsPerMultiprocessor);
SAME_PLACE(DeviceProp, shared_bytes_optin, cudaDeviceProp, sharedMemPerBlockOptin);
SAME_PLACE(DeviceProp, max_blocks_per_sm, cudaDeviceProp, maxBlocksPerMultiProcessor);
SAME_PLACE(DeviceProp, reserved_shared_bytes_per_block, cudaDeviceProp, reservedSharedMemPerBlock);

static_assert(+ptxsim::kInvalidValue == cudaErrorInvalidValue);
static_assert(+ptxsim::kInsufficientDriver == cudaErrorInsufficientDriver);
static_assert(+ptxsim::kNoKernelImageForDevice == cudaErrorNoKernelImageForDevice);
static_assert(+ptxsim::kInvalidPtx == cudaErrorInvalidPtx);
static_assert(+ptxsim::kInvalidResourceHandle == cudaErrorInvalidResourceHandle);
static_assert(+ptxsim::kLaunchOutOfResources == cudaErrorLaunchOutOfResources);
static_assert(+ptxsim::kLaunchTimeout == cudaErrorLaunchTimeout);
static_assert(+ptxsim::kLaunchFailure == cudaErrorLaunchFailure);
static_assert(+ptxsim::kNotSupported == cudaErrorNotSupported);
static_assert(+ptxsim::kDefault == cudaMemcpyDefault);
static_assert(+ptxsim::kAttributeCooperative == cudaLaunchAttributeCooperative);
static_assert(+ptxsim::kAttributeClusterDimension == cudaLaunchAttributeClusterDimension);
