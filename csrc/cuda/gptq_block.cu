// SPDX-License-Identifier: Apache-2.0
// gptq_block: the GPTQ recursion inside one block of columns, bit for bit what
// cpu/gptq_block_scalar.cpp gives. The contract is in launchers.h and cpu/kernels.h.
//
// One warp owns a row, so that the recursion needs no block barrier. Lane l holds the columns l,
// l + 32, l + 64, ... (kChunks of them) in registers:
//
//   column    0 .. 31    32 .. 63    64 .. 95    96 .. 127
//   register  chunk 0    chunk 1     chunk 2     chunk 3       lane = column % 32
//
// At pivot i = 32 q + owner every lane quantizes its own chunk q; only the owner's error counts and
// is broadcast by one shuffle. Chunks before q are done, so a pivot touches (kChunks - q)
// registers, 2.5 on average for 128 columns. What the owner read as its u is u_ii: the diagonal
// costs no load.
//
// The factor is staged once per CTA as a packed upper triangle: u_ij lies at base(i) + j with
// base(i + 1) = base(i) + cols - i - 1, 33,024 bytes for 128 columns. A warp reads 32 neighbouring
// words, never a bank conflict. Lanes left of the diagonal read the end of the row before, lanes
// beyond the last column the start of the next one or the padding; both are masked.
//
//   grid.x   as many CTAs as are resident at once, at most ceil(n / kWarps); rows in turn
//   block    kWarps warps
//
// Compiled with --fmad=false: products and differences are rounded one by one.
#include <cuda_runtime.h>

#include "cuda/launchers.h"
#include "grid.h"
#include "packing.h"

namespace mmq::cuda {
namespace {

constexpr int kLanes = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarps = 8;
constexpr int64_t kMaxCols = 256;                  // 8 columns per lane
constexpr int64_t kDefaultSharedBytes = 48 << 10;  // more needs the opt-in attribute
constexpr int64_t kReservedSharedBytes = 1 << 10;  // the driver's own part of every CTA
constexpr int64_t kMaxResident = 8;                // CTAs per multiprocessor: all its 64 warps

// Floats of the packed triangle, and with the padding that lanes beyond the last column read.
constexpr int64_t triangle_floats(int64_t cols) { return cols * (cols + 1) / 2; }
constexpr int64_t staged_floats(int64_t cols, int chunks) {
  return triangle_floats(cols) + kLanes * chunks - cols;
}
static_assert(triangle_floats(128) * sizeof(float) == 33024);

// Copies the upper triangle to shared memory, a row per warp in turn, and fills the padding.
template <int kChunks>
__device__ void stage_factor(const float* __restrict__ u, int cols, float* smem_u) {
  const int lane = threadIdx.x % kLanes;
  for (int i = threadIdx.x / kLanes; i < cols; i += kWarps) {
    const int base = i * cols - i * (i + 1) / 2;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int j = c * kLanes + lane;
      if (j >= i && j < cols) smem_u[base + j] = u[i * cols + j];
    }
  }
  // One, so that no lane divides by zero, which is slow.
  const int end = cols * (cols + 1) / 2;
  for (int j = threadIdx.x; j < kChunks * kLanes - cols; j += kWarps * kLanes) smem_u[end + j] = 1;
#ifdef MMQ_MUTATE_DIVERGENT_BARRIER
  if (lane < kLanes / 2) __syncthreads();
#else
  __syncthreads();
#endif
}

template <int kChunks, bool kFloatZero>
__global__ void __launch_bounds__(kWarps* kLanes) gptq_block_kernel(GptqBlockArgs a) {
  extern __shared__ float smem_u[];
  const int cols = static_cast<int>(a.cols);
  const int lane = threadIdx.x % kLanes;
  const CodeRule rule{static_cast<float>(a.min_code), static_cast<float>(max_code(a.bits)),
                      kFloatZero};
  stage_factor<kChunks>(a.u, cols, smem_u);

  int group[kChunks];
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const int col = c * kLanes + lane;
    group[c] = col < cols ? a.group_of[col] : 0;
  }

  const int64_t stride = int64_t{gridDim.x} * kWarps;
  for (int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / kLanes; row < a.n;
       row += stride) {
    float w[kChunks];
    GroupGrid grid[kChunks];
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int col = c * kLanes + lane;
      w[c] = col < cols ? a.w[row * cols + col] : 0.f;
      const int64_t g = row * a.groups + group[c];
      grid[c] = {a.scales[g], a.zeros[g]};
    }

    const float* u_row = smem_u + lane;  // u_row[32 c] is u of the pivot's row, chunk c
    int step = cols - 1;                 // to the next row of the triangle
#pragma unroll
    for (int q = 0; q < kChunks; ++q) {
      const int pivots = min(kLanes, cols - q * kLanes);
      if (pivots <= 0) break;
      float error = 0.f;  // of this lane's column in chunk q
      for (int owner = 0; owner < pivots; ++owner) {
        float u[kChunks];
#pragma unroll
        for (int c = q; c < kChunks; ++c) u[c] = u_row[c * kLanes];
        u_row += step--;

        const float code = code_of(w[q], grid[q], rule);
        const float own = (w[q] - value_of(code, grid[q], rule)) / u[q];
        const float pivot_error = __shfl_sync(kAllLanes, own, owner);
        error = lane == owner ? own : error;
        const float updated = w[q] - pivot_error * u[q];
        w[q] = lane > owner ? updated : w[q];
#pragma unroll
        for (int c = q + 1; c < kChunks; ++c) w[c] -= pivot_error * u[c];
      }
      // w[q] is what each lane's column was when it was the pivot: the same code again.
      if (lane < pivots) {
        const int64_t at = row * cols + q * kLanes + lane;
        a.codes[at] = static_cast<uint8_t>(code_of(w[q], grid[q], rule));
        a.errors[at] = error;
      }
    }
  }
}

template <int kChunks, bool kFloatZero>
int launch(const GptqBlockArgs& a, cudaStream_t stream) {
  int device = 0, multiprocessors = 0, shared_limit = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&shared_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;

  const int64_t shared_bytes = staged_floats(a.cols, kChunks) * int64_t{sizeof(float)};
  if (shared_bytes > shared_limit) return kUnsupported;
  const auto kernel = gptq_block_kernel<kChunks, kFloatZero>;
  if (shared_bytes > kDefaultSharedBytes) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  // A multiprocessor has the opt-in limit plus one CTA's reserve.
  const int64_t fit = (shared_limit + kReservedSharedBytes) / (shared_bytes + kReservedSharedBytes);
  const int64_t resident = multiprocessors * (fit < kMaxResident ? fit : kMaxResident);
  const int64_t wanted = ceil_div(a.n, kWarps);
  kernel<<<static_cast<unsigned>(wanted < resident ? wanted : resident), kWarps * kLanes,
           static_cast<size_t>(shared_bytes), stream>>>(a);
  return cudaGetLastError();
}

template <int kChunks>
int launch(const GptqBlockArgs& a, cudaStream_t stream) {
  return a.float_zero ? launch<kChunks, true>(a, stream) : launch<kChunks, false>(a, stream);
}

}  // namespace
}  // namespace mmq::cuda

int mmq_cuda_gptq_block(const mmq::cuda::GptqBlockArgs* args, mmq::cuda::Stream stream) {
  using namespace mmq::cuda;
  if (args->n == 0 || args->cols == 0) return kOk;
  if (args->cols > kMaxCols) return kUnsupported;
  const auto on = static_cast<cudaStream_t>(stream);
  const int64_t chunks = mmq::ceil_div(args->cols, kLanes);
  if (chunks <= 1) return launch<1>(*args, on);
  if (chunks <= 2) return launch<2>(*args, on);
  if (chunks <= 4) return launch<4>(*args, on);
  return launch<8>(*args, on);
}
