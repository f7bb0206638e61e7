// SPDX-License-Identifier: Apache-2.0
// packed_gemm on the host: which kernel, which partition, where things lie in the workspace.
#include <algorithm>
#include <limits>

#include "gemm.h"
#include "prepare.cuh"

namespace mmq::cuda {

namespace {

// The workspace begins with the counters, whatever the shape: they are zero between calls, so that
// calls of any shapes can share one workspace. All else in it is written before it is read.
constexpr int kGemmCounters = 16384;
// Parts of the workspace start at multiples of this.
constexpr int64_t kAlign = 256;

int64_t aligned(int64_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }
int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Everything a call needs to know before anything is launched.
struct Plan {
  GemmParams params = {};
  PrepareParams prepare = {};
  bool stages_x = false, sums_rows = false, is_gemv = false;
  int tile_m = 0, blocks = 0;
  int64_t partials_at = 0, staged_at = 0, row_sums_at = 0, bytes = 0;
};

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

bool supported(const PackedGemmArgs& args) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  const bool per_channel = args.group_size >= args.k;
  return args.bits >= 2 && args.bits <= 8 && args.m >= 0 && args.n >= 1 && args.k >= 1 &&
         args.group_size >= 1 && (per_channel || args.group_size % kStepCols == 0) &&
         // 32-bit offsets in the kernels: 16-byte units of x and of the weights, tile numbers.
         args.m <= kMost / 64 && args.n <= kMost / 64 && args.k <= kMost / 64 &&
         args.m * k_blocks(args.k) <= kMost / kBlockK &&
         strips(args.n) * k_blocks(args.k) <= kMost / (args.bits * kLanes) &&
         ceil_div(args.m, kGemmSmallTileM) * strips(args.n) <= kMost / k_blocks(args.k) &&
         // group_of_step() multiplies instead of dividing: (k / 16)^2 < 2^31.
         (per_channel || args.k <= int64_t{1} << 19);
}

// Few thread blocks read activations repeatedly and leave multiprocessors idle, many short ones
// spend their time on sums: the longest slices that still give two blocks to a multiprocessor,
// at least one block of weights for each warp.
int slice_blocks(const GemmParams& params, int multiprocessors) {
  int blocks = kGemvMaxSliceBlocks;
  while (blocks > kGemvWarps &&
         ceil_div(params.k_blocks, blocks) * params.strips < 2 * multiprocessors) {
    blocks /= 2;
  }
  return std::min(blocks, params.k_blocks);
}

void partition(const PackedGemmArgs& args, int multiprocessors, Plan& plan) {
  GemmParams& params = plan.params;
  plan.is_gemv = args.m <= kGemvMaxRows && params.strips <= kGemmCounters;
  if (plan.is_gemv) {
    params.slice_blocks = slice_blocks(params, multiprocessors);
    params.slices = static_cast<int>(ceil_div(params.k_blocks, params.slice_blocks));
    const int64_t outputs = params.slices > 1 ? int64_t{params.strips} * params.slices : 0;
    plan.bytes = aligned(plan.partials_at + outputs * kGemvMaxRows * kBlockN * 4);
    return;
  }
  plan.tile_m = args.m <= kGemmSmallTileM ? kGemmSmallTileM : kGemmTileM;
  params.k_tiles = static_cast<int>(ceil_div(args.k, kGemmTileK));
  params.m_tiles = static_cast<int>(ceil_div(args.m, plan.tile_m));
  params.columns = static_cast<int>(ceil_div(args.n, kGemmTileN)) * params.m_tiles;
  const int64_t tiles = int64_t{params.columns} * params.k_tiles;
  const int64_t most = std::min<int64_t>(multiprocessors, kGemmCounters);
  params.tiles_per_block = static_cast<int>(ceil_div(tiles, most));
  plan.blocks = static_cast<int>(ceil_div(tiles, params.tiles_per_block));
  const bool shares = params.tiles_per_block % params.k_tiles != 0;
  const int64_t slots = shares ? 2 * int64_t{plan.blocks} : 0;
  plan.bytes = aligned(plan.partials_at + slots * plan.tile_m * kGemmTileN * 4);
}

cudaError_t make_plan(const PackedGemmArgs& args, Plan& plan) {
  int device = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;

  GemmParams& params = plan.params;
  params.x = args.x;
  params.tiles = reinterpret_cast<const uint4*>(args.tiles);
  params.affine = args.affine;
  params.bias = args.bias;
  params.y = args.y;
  params.counters = static_cast<int*>(args.workspace);
  params.m = static_cast<int>(args.m);
  params.n = static_cast<int>(args.n);
  params.strips = static_cast<int>(strips(args.n));
  params.k_blocks = static_cast<int>(k_blocks(args.k));
  params.x_stride = args.k;
  params.x_cols = static_cast<int>(args.k);
  const int64_t group_size = std::min(args.group_size, args.k);
  const int64_t groups = ceil_div(args.k, group_size);
  const int64_t steps = group_size / kStepCols;
  params.last_group = static_cast<int>(groups - 1);
  params.group_magic = groups == 1 ? 0 : static_cast<uint32_t>(ceil_div(int64_t{1} << 31, steps));
  params.run_steps = groups == 1 || steps % 4 == 0 ? 4 : steps % 2 == 0 ? 2 : 1;
  params.affine_kind = args.affine_kind;
  params.scale_is_bfloat = args.scale_type == ScaleType::kBfloat16;
  params.plain_runs = params.run_steps == kSteps && !params.scale_is_bfloat &&
                      args.affine_kind == AffineKind::kScale16;
  params.wide_stores = args.n % 8 == 0 && is_aligned(args.y) && is_aligned(args.bias);

  plan.partials_at = kGemmCounters * 4;
  partition(args, multiprocessors, plan);
  plan.sums_rows = args.affine_kind != AffineKind::kScale16;
  plan.stages_x =
      args.perm != nullptr || args.in_scale != nullptr || args.k % 8 != 0 || !is_aligned(args.x);
  const int64_t staged_cols = k_blocks(args.k) * kBlockK;
  // The size of the workspace depends on sizes alone: room for staged activations is always there.
  plan.staged_at = plan.bytes;
  plan.bytes = aligned(plan.bytes + args.m * staged_cols * 2);
  if (plan.stages_x) {
    params.x_stride = staged_cols;
    params.x_cols = static_cast<int>(staged_cols);
  }
  if (plan.sums_rows) {
    // Kernels read the sums of whole row tiles; results of rows that do not exist are not stored.
    params.row_sum_stride = static_cast<int>(ceil_div(args.m, kGemmTileM) * kGemmTileM);
    plan.row_sums_at = plan.bytes;
    plan.bytes = aligned(plan.bytes +
                         staged_cols / (params.run_steps * kStepCols) * params.row_sum_stride * 4);
  }
  char* base = static_cast<char*>(args.workspace);
  params.partials = reinterpret_cast<float*>(base + plan.partials_at);
  plan.prepare = {args.x,
                  args.perm,
                  args.in_scale,
                  nullptr,
                  nullptr,
                  params.m,
                  static_cast<int>(args.k),
                  static_cast<int>(staged_cols),
                  params.row_sum_stride,
                  plan.is_gemv ? kGemvMaxRows : params.m_tiles * plan.tile_m,
                  params.run_steps * kStepCols};
  if (plan.stages_x) params.x = plan.prepare.staged = base + plan.staged_at;
  if (plan.sums_rows) {
    plan.prepare.row_sums = reinterpret_cast<float*>(base + plan.row_sums_at);
    params.row_sums = plan.prepare.row_sums;
  }
  return cudaSuccess;
}

cudaError_t launch_prepare(const PrepareParams& params, ActivationType activation,
                           cudaStream_t stream) {
  // Rows lie along y, of which a grid has at most 65,535: longer inputs in several launches.
  constexpr int kMostRows = 65535;
  const int blocks = static_cast<int>(ceil_div(params.staged_cols, kPrepareThreads * kPrepareCols));
  for (int first = 0; first < params.m; first += kMostRows) {
    PrepareParams part = params;
    part.m = std::min(params.m - first, kMostRows);
    const bool is_last = first + part.m == params.m;
    part.sum_rows = is_last ? params.sum_rows - first : part.m;
    part.x = static_cast<const uint16_t*>(params.x) + int64_t{first} * params.k;
    if (part.staged != nullptr) {
      part.staged = static_cast<uint16_t*>(params.staged) + int64_t{first} * params.staged_cols;
    }
    if (part.row_sums != nullptr) part.row_sums = params.row_sums + first;
    const dim3 grid(blocks, part.m);
    if (activation == ActivationType::kFloat16) {
      prepare_activations<Float16><<<grid, kPrepareThreads, 0, stream>>>(part);
    } else {
      prepare_activations<Bfloat16><<<grid, kPrepareThreads, 0, stream>>>(part);
    }
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

template <int kBits>
cudaError_t launch_width(const Plan& plan, ActivationType activation, cudaStream_t stream) {
  return plan.is_gemv
             ? launch_gemv<kBits>(plan.params, activation, stream)
             : launch_gemm<kBits>(plan.params, activation, plan.tile_m, plan.blocks, stream);
}

}  // namespace

}  // namespace mmq::cuda

int64_t mmq_cuda_packed_gemm_workspace(const mmq::cuda::PackedGemmArgs* args) {
  using namespace mmq::cuda;
  if (!supported(*args)) return kUnsupported;
  Plan plan;
  const cudaError_t error = make_plan(*args, plan);
  return error == cudaSuccess ? plan.bytes : 0;  // the launcher meets the same error and says so
}

int mmq_cuda_packed_gemm(const mmq::cuda::PackedGemmArgs* args, mmq::cuda::Stream stream_pointer) {
  using namespace mmq::cuda;
  if (args->m == 0 || args->n == 0) return kOk;
  if (!supported(*args)) return kUnsupported;
  Plan plan;
  cudaError_t error = make_plan(*args, plan);
  if (error != cudaSuccess) return error;
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  if (plan.stages_x || plan.sums_rows) {
    error = launch_prepare(plan.prepare, args->activation, stream);
    if (error != cudaSuccess) return error;
  }
  switch (args->bits) {
    case 2:
      return launch_width<2>(plan, args->activation, stream);
    case 3:
      return launch_width<3>(plan, args->activation, stream);
    case 4:
      return launch_width<4>(plan, args->activation, stream);
    case 5:
      return launch_width<5>(plan, args->activation, stream);
    case 6:
      return launch_width<6>(plan, args->activation, stream);
    case 7:
      return launch_width<7>(plan, args->activation, stream);
    case 8:
      return launch_width<8>(plan, args->activation, stream);
  }
  return kUnsupported;
}
