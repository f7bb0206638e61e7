// SPDX-License-Identifier: Apache-2.0
// awq_errors: || (w - Q(w s) / s) . factor^T ||_F^2 for every candidate s. Contract in launchers.h
// and cpu/kernels.h. Three kernels; nothing of size n x k or n x rows is stored.
//
//   awq_grids    scale and zero of every (candidate, row, group) into the workspace: a whole group
//                is needed before its first column can be quantized
//   awq_products one CTA per (candidate, kTileN rows of w, kTileT rows of the factor): D is made in
//                shared memory, kDepth columns at a time, and multiplied at once; a double per CTA
//   awq_sums     adds those in fixed order: the result does not depend on scheduling
//
//           kTileT = 256 rows of the factor          one thread: 8 x 8 products
//          +---------------------------------+       warp v: rows 8 v .. 8 v + 7 of D (read as
//   kTileN |  warp 0: 8 rows, all 256        |       broadcasts); lane l: factor rows 4 l .. 4 l +
//   3 = 64   |  ...                            |       and 128 + 4 l .. + 3 (16 bytes per lane)
//   rows   |  warp 7                         |
//   of w   +---------------------------------+
//
// A value of D costs two true divisions and about ten other instructions and is used 256 times.
// Both tiles are stored [column][row] with a pitch of 4 modulo 32 words: a warp writes 4 rows x 8
// columns (8 sectors of global memory) to 32 different banks, and reads 16 bytes per lane.
//
// Rounding: one chain of at most kChainCols fused multiply-adds, then at most k / kChainCols
// additions. Compiled with --fmad=false, so that D has the bits of the CPU's; the products' fused
// operations are written out. A NaN in w makes its group's grid, its row of D and the error NaN.
#include <cuda_runtime.h>

#include "cuda/launchers.h"
#include "grid.h"
#include "packing.h"

namespace mmq::cuda {
namespace {

constexpr int kLanes = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kLanes;

constexpr int kTileN = 64;
constexpr int kTileT = 256;
constexpr int kDepth = 16;
constexpr int kPitchN = kTileN + 4;
constexpr int kPitchT = kTileT + 4;
constexpr int kChainCols = 256;
static_assert(kPitchN % 32 == 4 && kPitchT % 32 == 4, "4 rows x 8 columns in 32 banks");
static_assert(kChainCols % kDepth == 0);

// How a warp walks over a tile: lane l is row l % 4, column l / 4 of a 4 x 8 patch.
constexpr int kPatchRows = 4;
constexpr int kPatchCols = 8;
constexpr int kWarpsPerPatchRow = kDepth / kPatchCols;               // 2
constexpr int kRowStep = kPatchRows * (kWarps / kWarpsPerPatchRow);  // 16 rows per pass of a CTA
constexpr int kPassesN = kTileN / kRowStep;
constexpr int kPassesT = kTileT / kRowStep;

constexpr int kRows = 8;     // of D per thread
constexpr int kFactors = 8;  // rows of the factor per thread

constexpr int64_t kMaxBlocks = 0x7fffffff;

struct Problem {
  const float *w, *candidates, *factor;
  GroupGrid* grids;  // [count, groups, n]: 4 rows of a patch share a sector
  double* partial;   // [count, tiles_t, tiles_n]
  int64_t n, rows, count;
  int k, group_size, groups, bits;
  int64_t tiles_n, tiles_t;
  GridKind kind;
  ScaleType scale_type;
};

Problem problem_of(const AwqErrorsArgs& a) {
  Problem p{};
  p.w = a.w;
  p.candidates = a.candidates;
  p.factor = a.factor;
  p.n = a.n;
  p.rows = a.rows;
  p.count = a.count;
  p.k = static_cast<int>(a.k);
  p.group_size = static_cast<int>(a.group_size < a.k ? a.group_size : a.k);
  p.groups = p.group_size > 0 ? static_cast<int>(group_count(a.k, p.group_size)) : 0;
  p.bits = a.bits;
  p.tiles_n = ceil_div(a.n, kTileN);
  p.tiles_t = ceil_div(a.rows, kTileT);
  p.kind = a.kind;
  p.scale_type = a.scale_type;
  return p;
}

int64_t grids_bytes(const Problem& p) {
  return p.count * p.n * p.groups * int64_t{sizeof(GroupGrid)};
}

// `width` neighbouring lanes, a power of two, take a group; their columns in turn.
__global__ void __launch_bounds__(kThreads) awq_grids_kernel(Problem p, int width) {
  const int64_t thread = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t cell = thread / width;  // (group, row)
  const bool inside = cell < p.n * p.groups;
  const int group = inside ? static_cast<int>(cell / p.n) : 0;
  const int64_t row = inside ? cell - group * p.n : 0;
  const int first = group * p.group_size;
  const int last = min(first + p.group_size, p.k);
  const int lane = threadIdx.x & (width - 1);
  const float* w = p.w + row * p.k;
  for (int64_t c = 0; c < p.count; ++c) {
    const float* s = p.candidates + c * p.k;
    float low = w[first] * s[first];
    float high = low;
    bool ordered = true;
    for (int j = first + lane; j < last; j += width) {
      const float value = w[j] * s[j];
      low = smaller(low, value);
      high = larger(high, value);
      ordered &= value == value;
    }
    for (int distance = width / 2; distance > 0; distance /= 2) {
      low = smaller(low, __shfl_xor_sync(kAllLanes, low, distance));
      high = larger(high, __shfl_xor_sync(kAllLanes, high, distance));
      ordered &= __shfl_xor_sync(kAllLanes, static_cast<int>(ordered), distance) != 0;
    }
    if (!ordered) low = high = float_of(kNanBits);
    if (inside && lane == 0)
      p.grids[(c * p.groups + group) * p.n + row] =
          make_grid(low, high, p.bits, p.kind, p.scale_type);
  }
}

// What a thread holds of the next tiles while the CTA multiplies the present ones.
struct Fetched {
  float w[kPassesN];
  GroupGrid grid[kPassesN];
  float s;
  float factor[kPassesT];
};

// Where this thread's patch elements lie, within the tile.
struct Patch {
  int row, col;
};

__device__ Patch patch_of_thread() {
  const int lane = threadIdx.x % kLanes;
  const int warp = threadIdx.x / kLanes;
  return {warp / kWarpsPerPatchRow * kPatchRows + lane % kPatchRows,
          warp % kWarpsPerPatchRow * kPatchCols + lane / kPatchRows};
}

// Where this thread reads next. Addresses are kept and stepped, not recomputed: a multiplication in
// 64 bits per load would cost a fifth of the multiply-adds.
struct Source {
  const float *w, *s, *factor;  // at this thread's first row and column of the tile
  const GroupGrid* grids;       // of the candidate, at this thread's first row
  int col;
  int passes_n, passes_t;  // how many of its rows exist
};

__device__ int passes_of(int64_t rows, int passes) {
  if (rows <= 0) return 0;
  const int64_t needed = ceil_div(rows, kRowStep);
  return needed < passes ? static_cast<int>(needed) : passes;
}

__device__ Source source_of_thread(const Problem& p, int64_t candidate, int64_t row_n,
                                   int64_t row_t) {
  const Patch at = patch_of_thread();
  Source source;
  source.w = p.w + (row_n + at.row) * p.k + at.col;
  source.s = p.candidates + candidate * p.k + at.col;
  source.factor = p.factor + (row_t + at.row) * p.k + at.col;
  source.grids = p.grids + candidate * p.groups * p.n + row_n + at.row;
  source.col = at.col;
  source.passes_n = passes_of(p.n - row_n - at.row, kPassesN);
  source.passes_t = passes_of(p.rows - row_t - at.row, kPassesT);
  return source;
}

// Reads the next kDepth columns of both tiles. Outside of the matrices: w = 0 with the grid (1, 0)
// and factor 0.
__device__ void fetch(const Problem& p, Source& from, Fetched& to) {
  const bool inside = from.col < p.k;
  const int passes_n = inside ? from.passes_n : 0;
  const int passes_t = inside ? from.passes_t : 0;
  const int group = inside ? from.col / p.group_size : 0;
  const int64_t stride = int64_t{kRowStep} * p.k;
  to.s = inside ? *from.s : 1.f;
  const float* w = from.w;
  const GroupGrid* grid = from.grids + group * p.n;
#pragma unroll
  for (int i = 0; i < kPassesN; ++i) {
    to.w[i] = i < passes_n ? *w : 0.f;
    to.grid[i] = i < passes_n ? grid[i * kRowStep] : GroupGrid{1.f, 0.f};
    w += stride;
  }
  const float* factor = from.factor;
#pragma unroll
  for (int i = 0; i < kPassesT; ++i) {
    to.factor[i] = i < passes_t ? *factor : 0.f;
    factor += stride;
  }
  from.w += kDepth;
  from.s += kDepth;
  from.factor += kDepth;
  from.col += kDepth;
}

// Quantizes, and writes both tiles to shared memory. Outside of w the code may be any (1 with a
// restricted grid), hence the explicit zero.
template <bool kFloatZero>
__device__ void stage(const Problem& p, int64_t row_n, int first, const Fetched& from,
                      CodeRule rule, float* smem_d, float* smem_f) {
  const Patch at = patch_of_thread();
  rule.float_zero = kFloatZero;
#pragma unroll
  for (int i = 0; i < kPassesN; ++i) {
    const int row = at.row + i * kRowStep;
    const float code = code_of(from.w[i] * from.s, from.grid[i], rule);
    const float d = from.w[i] - value_of(code, from.grid[i], rule) / from.s;
    const bool valid = first + at.col < p.k && row_n + row < p.n;
    smem_d[at.col * kPitchN + row] = valid ? d : 0.f;
  }
#pragma unroll
  for (int i = 0; i < kPassesT; ++i)
    smem_f[at.col * kPitchT + at.row + i * kRowStep] = from.factor[i];
}

__device__ void load4(const float* from, float* to) {
  const float4 four = *reinterpret_cast<const float4*>(from);
  to[0] = four.x;
  to[1] = four.y;
  to[2] = four.z;
  to[3] = four.w;
}

__device__ void multiply(const float* smem_d, const float* smem_f, float (&sum)[kRows][kFactors]) {
  const int lane = threadIdx.x % kLanes;
  const int warp = threadIdx.x / kLanes;
#pragma unroll
  for (int col = 0; col < kDepth; ++col) {
    float d[kRows], f[kFactors];
    load4(smem_d + col * kPitchN + kRows * warp, d);
    load4(smem_d + col * kPitchN + kRows * warp + 4, d + 4);
    load4(smem_f + col * kPitchT + 4 * lane, f);
    load4(smem_f + col * kPitchT + kTileT / 2 + 4 * lane, f + 4);
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kFactors; ++j) sum[i][j] = __fmaf_rn(d[i], f[j], sum[i][j]);
  }
}

// The sum over the warp, the same in every lane and every run.
__device__ double warp_sum(double value) {
  for (int distance = kLanes / 2; distance > 0; distance /= 2)
    value += __shfl_xor_sync(kAllLanes, value, distance);
  return value;
}

template <bool kFloatZero>
__global__ void __launch_bounds__(kThreads, 1) awq_products_kernel(Problem p) {
  __shared__ __align__(16) float smem_d[2][kDepth * kPitchN];
  __shared__ __align__(16) float smem_f[2][kDepth * kPitchT];
  __shared__ double smem_sum[kWarps];
  // Rows of w run fastest: CTAs that work at the same time share a tile of the factor in L2.
  int64_t block = blockIdx.x;
  const int64_t row_n = block % p.tiles_n * kTileN;
  block /= p.tiles_n;
  const int64_t row_t = block % p.tiles_t * kTileT;
  const int64_t candidate = block / p.tiles_t;
  const CodeRule rule = code_rule(p.bits, p.kind);

  float total[kRows][kFactors] = {};
  float chain[kRows][kFactors] = {};
  Source source = source_of_thread(p, candidate, row_n, row_t);
  Fetched next;
  fetch(p, source, next);
  stage<kFloatZero>(p, row_n, 0, next, rule, smem_d[0], smem_f[0]);
  int buffer = 0;
  int in_chain = 0;
  // One barrier per tile: it ends the writing of the present buffer and the reading of the other,
  // which is written while this one is read.
  for (int first = 0; first < p.k; first += kDepth) {
    __syncthreads();
    const bool more = first + kDepth < p.k;
    if (more) fetch(p, source, next);
    multiply(smem_d[buffer], smem_f[buffer], chain);
    in_chain += kDepth;
    if (in_chain == kChainCols || !more) {
      in_chain = 0;
#pragma unroll
      for (int i = 0; i < kRows; ++i)
#pragma unroll
        for (int j = 0; j < kFactors; ++j) {
          total[i][j] += chain[i][j];
          chain[i][j] = 0.f;
        }
    }
    buffer ^= 1;
    if (more)
      stage<kFloatZero>(p, row_n, first + kDepth, next, rule, smem_d[buffer], smem_f[buffer]);
  }

  double squares = 0;
#pragma unroll
  for (int i = 0; i < kRows; ++i)
#pragma unroll
    for (int j = 0; j < kFactors; ++j) {
      const double y = total[i][j];
      squares += y * y;
    }
  squares = warp_sum(squares);
  if (threadIdx.x % kLanes == 0) smem_sum[threadIdx.x / kLanes] = squares;
  __syncthreads();
  if (threadIdx.x == 0) {
    double sum = 0;
    for (int v = 0; v < kWarps; ++v) sum += smem_sum[v];
    p.partial[blockIdx.x] = sum;
  }
}

// One warp per candidate.
__global__ void __launch_bounds__(kLanes) awq_sums_kernel(Problem p, double* errors) {
  const int64_t tiles = p.tiles_n * p.tiles_t;
  const double* partial = p.partial + blockIdx.x * tiles;
  double sum = 0;
  for (int64_t i = threadIdx.x; i < tiles; i += kLanes) sum += partial[i];
  sum = warp_sum(sum);
  if (threadIdx.x == 0) errors[blockIdx.x] = sum;
}

}  // namespace
}  // namespace mmq::cuda

int64_t mmq_cuda_awq_errors_workspace(const mmq::cuda::AwqErrorsArgs* args) {
  const mmq::cuda::Problem p = mmq::cuda::problem_of(*args);
  return mmq::cuda::grids_bytes(p) + p.count * p.tiles_n * p.tiles_t * int64_t{sizeof(double)};
}

int mmq_cuda_awq_errors(const mmq::cuda::AwqErrorsArgs* args, mmq::cuda::Stream stream) {
  using namespace mmq::cuda;
  if (args->count == 0) return kOk;
  if (args->k > kMaxBlocks || args->bits < mmq::kMinBits || args->bits > mmq::kMaxBits)
    return kUnsupported;
  const auto on = static_cast<cudaStream_t>(stream);
  Problem p = problem_of(*args);
  p.grids = static_cast<mmq::GroupGrid*>(args->workspace);
  p.partial = reinterpret_cast<double*>(static_cast<char*>(args->workspace) + grids_bytes(p));
  if (p.n == 0 || p.k == 0 || p.rows == 0) p.tiles_n = p.tiles_t = 0;  // Sums of nothing.
  const int64_t products = p.count * p.tiles_n * p.tiles_t;
  if (products > 0) {
    int width = 1;
    while (width < kLanes && width < p.group_size) width *= 2;
    const int64_t grid_blocks = mmq::ceil_div(p.n * p.groups * width, kThreads);
    if (products > kMaxBlocks || grid_blocks > kMaxBlocks) return kUnsupported;
    awq_grids_kernel<<<static_cast<unsigned>(grid_blocks), kThreads, 0, on>>>(p, width);
    cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) return error;
    const auto kernel =
        p.kind == mmq::GridKind::kFloat ? awq_products_kernel<true> : awq_products_kernel<false>;
    kernel<<<static_cast<unsigned>(products), kThreads, 0, on>>>(p);
    error = cudaGetLastError();
    if (error != cudaSuccess) return error;
  }
  awq_sums_kernel<<<static_cast<unsigned>(p.count), kLanes, 0, on>>>(p, args->errors);
  return cudaGetLastError();
}
