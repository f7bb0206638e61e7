// SPDX-License-Identifier: Apache-2.0
// Kernels and calls for the stand-in runtime's tests (tests/test_ptxsim_runtime.py), compiled there
// by nvcc. Every function returns a cudaError_t, or what its name says.
#include <cuda_runtime.h>

__device__ int offset = 5;
__constant__ float factors[4];

__global__ void reverse_scaled(float* x, int n) {
  extern __shared__ float tile[];
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  tile[threadIdx.x] = i < n ? x[i] : 0.f;
  __syncthreads();
  if (i < n) x[i] = tile[blockDim.x - 1 - threadIdx.x] * factors[i & 3] + offset;
}

__global__ void always_traps() { asm volatile("trap;"); }

__global__ void __launch_bounds__(64) small_blocks(int* x) { x[threadIdx.x] = threadIdx.x; }

__global__ void pads_shared(int* x) {
  __shared__ int tile[1024];
  tile[threadIdx.x] = threadIdx.x;
  __syncthreads();
  x[threadIdx.x] = tile[31 - threadIdx.x];
}

#define PROBE extern "C" __attribute__((visibility("default")))

PROBE int probe_set_factors(const float* values) {
  return cudaMemcpyToSymbol(factors, values, sizeof factors);
}

PROBE int probe_launch(float* x, int n, int shared_bytes) {
  reverse_scaled<<<(n + 63) / 64, 64, shared_bytes>>>(x, n);
  return cudaGetLastError();
}

PROBE int probe_opt_in(int shared_bytes) {
  return cudaFuncSetAttribute(reverse_scaled, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              shared_bytes);
}

PROBE int probe_launch_ex(float* x, int n, int cooperative) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3((n + 63) / 64);
  config.blockDim = dim3(64);
  config.dynamicSmemBytes = 256;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  config.attrs = &attribute;
  config.numAttrs = cooperative;
  return cudaLaunchKernelEx(&config, reverse_scaled, x, n);
}

PROBE int probe_trap() {
  always_traps<<<1, 32>>>();
  return cudaSuccess;
}

PROBE int probe_small_blocks(int* x, int threads) {
  small_blocks<<<1, threads>>>(x);
  return cudaGetLastError();
}

PROBE int probe_blocks_per_sm(int threads, int shared_bytes, int* blocks) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, reverse_scaled, threads,
                                                       shared_bytes);
}

// {registers, static shared bytes, largest block, largest dynamic shared bytes}
PROBE int probe_attributes(int* values) {
  cudaFuncAttributes attributes;
  const int error = cudaFuncGetAttributes(&attributes, pads_shared);
  values[0] = attributes.numRegs;
  values[1] = static_cast<int>(attributes.sharedSizeBytes);
  values[2] = attributes.maxThreadsPerBlock;
  values[3] = attributes.maxDynamicSharedSizeBytes;
  return error;
}

// {capability, multiprocessors, opt-in shared bytes, threads and blocks of a multiprocessor}
PROBE int probe_properties(int* values) {
  cudaDeviceProp properties;
  const int error = cudaGetDeviceProperties(&properties, 0);
  values[0] = 10 * properties.major + properties.minor;
  values[1] = properties.multiProcessorCount;
  values[2] = static_cast<int>(properties.sharedMemPerBlockOptin);
  values[3] = properties.maxThreadsPerMultiProcessor;
  values[4] = properties.maxBlocksPerMultiProcessor;
  return error;
}

PROBE int probe_device_attribute(int number, int* value) {
  return cudaDeviceGetAttribute(value, static_cast<cudaDeviceAttr>(number), 0);
}

// Allocates, fills, copies on a stream and back with an event; frees. Counts wrong words.
PROBE int probe_memory(int* wrong) {
  int host[32];
  for (int i = 0; i < 32; ++i) host[i] = 3 * i;
  int *first = nullptr, *second = nullptr;
  cudaStream_t stream;
  cudaEvent_t start, stop;
  float ms = -1;
  if (cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) || cudaEventCreate(&start) ||
      cudaEventCreateWithFlags(&stop, cudaEventDefault) || cudaEventRecord(start, stream) ||
      cudaMalloc(&first, sizeof host) || cudaMallocAsync(&second, sizeof host, stream) ||
      cudaMemset(first, 0xff, sizeof host) ||
      cudaMemcpyAsync(second, host, sizeof host, cudaMemcpyHostToDevice, stream) ||
      cudaMemcpyAsync(first, second, 64, cudaMemcpyDeviceToDevice, stream) ||
      cudaMemcpy(host, first, sizeof host, cudaMemcpyDeviceToHost) ||
      cudaEventRecord(stop, stream) || cudaStreamWaitEvent(stream, stop, 0) ||
      cudaEventSynchronize(stop) || cudaEventElapsedTime(&ms, start, stop) ||
      cudaStreamSynchronize(stream) || cudaFreeAsync(second, stream) || cudaFree(first) ||
      cudaEventDestroy(start) || cudaEventDestroy(stop) || cudaStreamDestroy(stream)) {
    return cudaGetLastError();
  }
  *wrong = ms < 0;
  for (int i = 0; i < 32; ++i) *wrong += host[i] != (i < 16 ? 3 * i : -1);
  return cudaSuccess;
}

PROBE int probe_copy_to(void* device, const void* host, int bytes) {
  return cudaMemcpy(device, host, bytes, cudaMemcpyHostToDevice);
}

PROBE int probe_bad_stream() { return cudaStreamSynchronize(reinterpret_cast<cudaStream_t>(77)); }
PROBE int probe_set_device(int device) { return cudaSetDevice(device); }
PROBE int probe_count(int* count) { return cudaGetDeviceCount(count); }
PROBE int probe_synchronize() { return cudaDeviceSynchronize(); }
PROBE int probe_last_error() { return cudaGetLastError(); }
PROBE int probe_peek() { return cudaPeekAtLastError(); }
PROBE const char* probe_name(int error) {
  return cudaGetErrorName(static_cast<cudaError_t>(error));
}
PROBE const char* probe_text(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}
