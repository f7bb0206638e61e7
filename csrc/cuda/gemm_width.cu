// SPDX-License-Identifier: Apache-2.0
// The GEMM kernels of one width, MMQ_BITS, and their launches: compiled once per width, so that
// widths build in parallel. The code is the same for all.
#include "gemm_mma.cuh"
#include "gemv.cuh"

#ifndef MMQ_BITS
#error "gemm_width.cu is compiled with -DMMQ_BITS=2 to -DMMQ_BITS=8"
#endif

namespace mmq::cuda {

namespace {

// Dynamic shared memory above 48 KiB must be asked for, on every device anew; it costs little.
template <class Kernel>
cudaError_t launch(Kernel kernel, dim3 grid, int threads, int shared_bytes, cudaStream_t stream,
                   const GemmParams& params) {
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error != cudaSuccess) return error;
  kernel<<<grid, threads, shared_bytes, stream>>>(params);
  return cudaGetLastError();
}

template <class Activation>
cudaError_t launch_mma(const GemmParams& params, int tile_m, int blocks, cudaStream_t stream) {
  constexpr int kSmall = gemm_shared_bytes(MMQ_BITS, kGemmSmallTileM);
  constexpr int kLarge = gemm_shared_bytes(MMQ_BITS, kGemmTileM);
  if (tile_m == kGemmSmallTileM) {
    return launch(packed_gemm_mma<MMQ_BITS, Activation, kGemmSmallTileM>, dim3(blocks),
                  kGemmThreads, kSmall, stream, params);
  }
  return launch(packed_gemm_mma<MMQ_BITS, Activation, kGemmTileM>, dim3(blocks), kGemmThreads,
                kLarge, stream, params);
}

}  // namespace

template <>
cudaError_t launch_gemm<MMQ_BITS>(const GemmParams& params, ActivationType activation, int tile_m,
                                  int blocks, cudaStream_t stream) {
  return activation == ActivationType::kFloat16
             ? launch_mma<Float16>(params, tile_m, blocks, stream)
             : launch_mma<Bfloat16>(params, tile_m, blocks, stream);
}

template <>
cudaError_t launch_gemv<MMQ_BITS>(const GemmParams& params, ActivationType activation,
                                  cudaStream_t stream) {
  const dim3 grid(params.strips, params.slices);
  const int shared_bytes = gemv_shared_bytes(params.m, params.slice_blocks);
  return activation == ActivationType::kFloat16
             ? launch(packed_gemv<MMQ_BITS, Float16>, grid, kGemvThreads, shared_bytes, stream,
                      params)
             : launch(packed_gemv<MMQ_BITS, Bfloat16>, grid, kGemvThreads, shared_bytes, stream,
                      params);
}

}  // namespace mmq::cuda
