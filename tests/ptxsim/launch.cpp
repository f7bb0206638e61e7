// SPDX-License-Identifier: Apache-2.0
// A launch: its checks, the resident blocks in turn, findings and the report.

#include <algorithm>
#include <cstring>

#include "counters.h"
#include "device_state.h"
#include "scheduler.h"

namespace ptxsim {

void Warp::report(const Instr& in, int lane, const char* kind, const std::string& message) {
  if (!launch->config->checks) return;
  const SourceLine& line = launch->kernel->lines[static_cast<size_t>(in.line)];
  const auto key = std::make_tuple(std::string(kind), line.file, line.line);
  const auto seen = launch->found.find(key);
  if (seen != launch->found.end()) {
    ++(*launch->findings)[seen->second].count;
    return;
  }
  Finding f;
  f.kind = kind;
  f.kernel = launch->kernel->info.name;
  f.file = line.file;
  f.line = line.line;
  f.message = message;
  if (!line.inlined.empty()) f.message += " (" + line.inlined + ")";
  f.block = block->index;
  f.warp = index;
  f.lane = lane;
  launch->found[key] = launch->findings->size();
  launch->findings->push_back(f);
}

void Device::launch(const Kernel& kernel, Dim3 grid, Dim3 block, size_t dynamic_shared_bytes,
                    const void* const* params) {
  const KernelInfo& info = kernel.info;
  const auto refuse = [&](const std::string& what) {
    throw Error("launch of " + info.name + ": " + what);
  };
  const auto number = [](auto v) { return std::to_string(v); };
  const uint64_t threads = static_cast<uint64_t>(block.x) * block.y * block.z;
  const auto most = static_cast<uint64_t>(std::min(info.max_threads, 1024));
  if (threads == 0 || threads > most) {
    refuse("expected 1 to " + number(most) + " threads a block, got " + number(threads));
  }
  if (block.x > 1024 || block.y > 1024 || block.z > 64) refuse("a block dimension is too large");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 ||
      grid.z > 65535) {
    refuse("expected a grid of at most 2147483647 x 65535 x 65535 blocks, got " + number(grid.x) +
           " x " + number(grid.y) + " x " + number(grid.z));
  }
  Launch launch;
  launch.shared_bytes = info.static_shared_bytes + static_cast<int64_t>(dynamic_shared_bytes);
  if (launch.shared_bytes > config.shared_optin) {
    refuse("expected at most " + number(config.shared_optin) + " bytes of shared memory, got " +
           number(launch.shared_bytes));
  }
  DeviceState& state = device_state();
  launch.kernel = &kernel;
  launch.config = &config;
  launch.ranges = &state.ranges;
  launch.id = ++state.launches;
  launch.grid = grid;
  launch.block = block;
  launch.params.resize(static_cast<size_t>(info.param_total_bytes));
  for (size_t i = 0; i < info.param_offsets.size(); ++i) {
    std::memcpy(launch.params.data() + info.param_offsets[i], params[i],
                static_cast<size_t>(info.param_bytes[i]));
  }
  launch.counts.resize(kernel.code.size());
  launch.touched = std::vector<Touched>(kernel.lines.size());
  launch.recent.resize(kernel.code.size());
  launch.findings = &state.findings;

  const int64_t blocks = static_cast<int64_t>(grid.x) * grid.y * grid.z;
  const int64_t resident = std::min<int64_t>(std::max(config.resident_blocks, 1), blocks);
  std::vector<Block> slots(static_cast<size_t>(resident));
  int64_t next = 0, finished = 0;
  while (finished < blocks && !launch.aborted) {
    int64_t done = 0;
    for (Block& slot : slots) {
      if (!slot.active) {
        if (next == blocks) continue;
        start_block(launch, slot, next++);
      }
      const int64_t n = run_block(launch, slot);
      launch.executed += n;
      done += n;
      if (!slot.active) {
        ++finished;
        ++done;
      }
      if (launch.aborted) break;
    }
    if (launch.aborted) break;
    if (done == 0) {
      for (Block& slot : slots) {
        if (slot.active) report_stuck(slot);
      }
      launch.aborted = true;
    } else if (launch.executed > config.max_instructions) {
      for (Block& slot : slots) {
        for (Warp& w : slot.warps) {
          if (!slot.active || w.groups.empty()) continue;
          const Group& g = w.groups.front();
          w.report(kernel.code[static_cast<size_t>(g.pc)], __builtin_ctz(g.mask), "endless",
                   "still runs after " + number(launch.executed) + " instructions");
          launch.aborted = true;
          break;
        }
        if (launch.aborted) break;
      }
      launch.aborted = true;
    }
  }
  state.reports.push_back(make_report(launch));
}

}  // namespace ptxsim
