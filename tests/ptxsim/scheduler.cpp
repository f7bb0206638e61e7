// SPDX-License-Identifier: Apache-2.0
// Warps as groups of lanes at the same instruction. The group with the lowest pc runs; groups that
// meet merge. Collectives and barriers park a group until the lanes it needs have come.

#include "scheduler.h"

#include <algorithm>
#include <climits>

namespace ptxsim {
namespace {

// Backward jumps of one group before another one gets a turn; a jump of a loop with an atomic or
// volatile access, which may be waiting for that other group, counts as many.
constexpr int kPatience = 100000, kWaitingJump = 2000;

uint32_t live(const Warp& w) { return w.present & ~w.exited; }

// Lanes of `mask` for which the collective has everybody it needs.
uint32_t ready_lanes(const Warp& w, const Instr& in, uint32_t mask) {
  if (in.member < 0) return mask == live(w) ? mask : 0;
  const Operand& op = in.ops[in.member];
  const uint32_t* members = w.files[op.file] + op.offset;
  uint32_t ready = 0, rest = mask;
  while (rest != 0) {
    const uint32_t wanted = members[__builtin_ctz(rest)];
    uint32_t same = 0;
    for (int l = 0; l < kLanes; ++l) same |= static_cast<uint32_t>(members[l] == wanted) << l;
    same &= rest;
    rest &= ~same;
    if ((wanted & live(w) & ~same) == 0) ready |= same;
  }
  return ready;
}

// Runs a ready collective once for every distinct member mask.
void run_collective(Warp& w, const Instr& in, uint32_t mask) {
  if (in.member < 0) return in.fn(w, in, mask);
  const Operand& op = in.ops[in.member];
  uint32_t members[kLanes];  // the collective may overwrite the register
  std::copy_n(w.files[op.file] + op.offset, kLanes, members);
  uint32_t rest = mask;
  while (rest != 0) {
    const uint32_t wanted = members[__builtin_ctz(rest)];
    uint32_t same = 0;
    for (int l = 0; l < kLanes; ++l) same |= static_cast<uint32_t>(members[l] == wanted) << l;
    same &= rest;
    rest &= ~same;
    if ((same & ~wanted) != 0) {
      w.report(in, __builtin_ctz(same & ~wanted), "barrier",
               "a lane runs a collective whose member mask leaves it out");
    }
    in.fn(w, in, same);
  }
}

void merge(Warp& w) {
  std::vector<Group>& g = w.groups;
  for (size_t i = 0; i < g.size(); ++i) {
    for (size_t j = i + 1; j < g.size();) {
      if (g[j].pc != g[i].pc) {
        ++j;
        continue;
      }
      g[i].mask |= g[j].mask;
      g[i].parked = false;  // look again
      g.erase(g.begin() + static_cast<std::ptrdiff_t>(j));
    }
  }
}

int choose(Warp& w) {
  int best = -1;
  for (size_t i = 0; i < w.groups.size(); ++i) {
    const Group& g = w.groups[i];
    if (g.parked) continue;
    if (g.pc == w.prefer) {
      best = static_cast<int>(i);
      break;
    }
    if (best < 0 || g.pc < w.groups[static_cast<size_t>(best)].pc) best = static_cast<int>(i);
  }
  w.prefer = -1;
  return best;
}

// After many backward jumps of the group at `pc`: the next runnable one in the order of pc.
void let_another_run(Warp& w, int pc) {
  int next = INT_MAX, first = INT_MAX;
  for (const Group& g : w.groups) {
    if (g.parked || g.pc == pc) continue;
    first = std::min(first, g.pc);
    if (g.pc > w.last_preferred) next = std::min(next, g.pc);
  }
  w.prefer = next != INT_MAX ? next : first;
  w.last_preferred = w.prefer;
  w.starved = 0;
}

void finish(Warp& w, const Instr& in) {
  w.committed.push_back(std::move(w.open));
  w.open.clear();
  land_copies(w, in, 0);
}

// Runs the warp until nothing in it can advance or `budget` instructions are done.
int64_t run_warp(Warp& w, int64_t budget) {
  Launch& launch = *w.launch;
  const Instr* code = launch.kernel->code.data();
  InstrCounts* counts = launch.counts.data();
  int64_t done = 0;
  while (done < budget && !launch.aborted) {
    if (w.groups.size() > 1) merge(w);
    const int chosen = choose(w);
    if (chosen < 0) break;
    Group group = w.groups[static_cast<size_t>(chosen)];
    int limit = INT_MAX;  // where it meets the next group
    for (const Group& g : w.groups) {
      if (g.pc > group.pc) limit = std::min(limit, g.pc);
    }
    const bool alone = w.groups.size() == 1;
    int pc = group.pc;
    uint32_t mask = group.mask;
    bool keep = true;  // the group goes on at pc with mask; else it is gone
    bool again = true;
    bool parked = false;
    while (again) {
      const Instr& in = code[pc];
      uint32_t active = mask;
      if (in.guarded) {
        const uint32_t p = w.files[in.guard.file][in.guard.offset];
        active &= in.guard_negate ? ~p : p;
        const uint32_t undef = w.undef[in.guard.undef] & mask;
        if (undef != 0) {
          w.report(in, __builtin_ctz(undef), "uninitialised",
                   in.step == Step::kBranch ? "branches on an undefined value"
                                            : "the guard is an undefined value");
          w.undef[in.guard.undef] &= ~undef;
        }
      }
      switch (in.step) {
        case Step::kPlain:
          ++counts[pc].executed;
          ++done;
          w.waiting |= in.sync;
          if (active != 0) in.fn(w, in, active);
          ++pc;
          break;
        case Step::kBranch:
          ++counts[pc].executed;
          ++done;
          if (active == 0) {
            ++pc;
          } else if (active == mask) {
            const bool backward = in.target <= pc;
            pc = in.target;
            if (!alone) {
              again = false;
              if (backward) {
                w.starved += w.waiting ? kWaitingJump : 1;
                w.waiting = false;
                if (w.starved >= kPatience) let_another_run(w, pc);
              }
            }
          } else {
            w.groups.push_back({in.target, active, false});
            mask &= ~active;
            ++pc;
            again = false;
            if (in.target < pc) w.starved += w.waiting ? kWaitingJump : 1;
          }
          break;
        case Step::kExit:
          ++counts[pc].executed;
          ++done;
          if (in.a != 0 && active != 0) {
            w.report(in, __builtin_ctz(active), "trap", "the kernel trapped");
            launch.aborted = true;
            again = false;
          }
          w.exited |= active;
          mask &= ~active;
          ++pc;
          if (active != 0) {
            again = mask != 0 && alone;
            keep = mask != 0;
            for (Group& g : w.groups) {
              if (code[g.pc].step == Step::kCollective) g.parked = false;  // one fewer to wait for
            }
          }
          break;
        case Step::kCollective: {
          const uint32_t ready =
              active == kFull && in.member < 0 ? active : ready_lanes(w, in, active);
          if (ready == active) {
            ++counts[pc].executed;
            ++done;
            if (active != 0) run_collective(w, in, active);
            ++pc;
            break;
          }
          if (ready != 0) {
            ++counts[pc].executed;
            ++done;
            run_collective(w, in, ready);
          }
          const uint32_t on = ready | (mask & ~active);
          if (on != 0) w.groups.push_back({pc + 1, on, false});
          mask = active & ~ready;
          parked = true;
          again = false;
          break;
        }
        case Step::kBarrier:
          if (active != mask) w.groups.push_back({pc + 1, mask & ~active, false});
          if (active != 0) {
            mask = active;
            parked = true;
          } else {
            keep = false;
          }
          again = false;
          break;
      }
      if (again && (pc == limit || done >= budget)) again = false;
    }
    const auto at = static_cast<size_t>(chosen);
    if (keep) {
      w.groups[at] = {pc, mask, parked};
    } else {
      w.groups.erase(w.groups.begin() + chosen);
    }
    if (w.groups.empty()) {
      finish(w, code[pc - 1]);
      break;
    }
  }
  return done;
}

// Whether all live lanes of the block wait at a barrier; then lets them go on.
bool pass_barrier(Block& block) {
  Launch& launch = *block.launch;
  const Instr* code = launch.kernel->code.data();
  bool any = false;
  for (const Warp& w : block.warps) {
    for (const Group& g : w.groups) {
      if (!g.parked || code[g.pc].step != Step::kBarrier) return false;
      any = true;
    }
  }
  if (!any) return false;
  uint32_t votes = 0, voters = 0;
  for (Warp& w : block.warps) {
    if (w.groups.empty()) continue;
    const Instr& first = code[w.groups.front().pc];
    const int lane = __builtin_ctz(w.groups.front().mask);
    if (w.groups.size() > 1) {
      const Instr& other = code[w.groups[1].pc];
      const SourceLine& line = launch.kernel->lines[static_cast<size_t>(other.line)];
      w.report(first.index < other.index ? first : other, lane, "barrier",
               "lanes of one warp wait at different barriers; the other one is at line " +
                   std::to_string(std::max(
                       line.line, launch.kernel->lines[static_cast<size_t>(first.line)].line)));
    } else if ((w.present & w.exited) != 0) {
      w.report(first, lane, "barrier",
               "a barrier that lane " + std::to_string(__builtin_ctz(w.present & w.exited)) +
                   " of the same warp cannot reach: it has returned");
    }
    for (const Group& g : w.groups) {
      const Instr& in = code[g.pc];
      if (in.a == 0) continue;
      const Operand& op = in.ops[1];
      const uint32_t p = w.files[op.file][op.offset] ^ (op.negate ? kFull : 0);
      votes += static_cast<uint32_t>(__builtin_popcount(p & g.mask));
      voters += static_cast<uint32_t>(__builtin_popcount(g.mask));
    }
  }
  for (Warp& w : block.warps) {
    for (Group& g : w.groups) {
      const Instr& in = code[g.pc];
      if (in.a != 0) {
        const bool yes = in.a == 2 ? votes == voters : votes != 0;
        uint32_t* d = w.files[0] + in.ops[0].offset;
        if (in.a == 1) {
          for (int l = 0; l < kLanes; ++l) d[l] = g.mask >> l & 1 ? votes : d[l];
        } else {
          *d = (*d & ~g.mask) | (yes ? g.mask : 0);
        }
        w.undef[in.ops[0].undef] &= ~g.mask;
      }
      ++launch.counts[static_cast<size_t>(g.pc)].executed;
      ++g.pc;
      g.parked = false;
    }
  }
  ++block.epoch;
  return true;
}

uint32_t special_value(const Launch& launch, const Block& block, int thread, int lane,
                       const std::string& name) {
  const uint32_t t = static_cast<uint32_t>(thread), l = static_cast<uint32_t>(lane);
  const Dim3& b = launch.block;
  const char axis = name.back();
  const auto of = [axis](const Dim3& d) { return axis == 'x' ? d.x : axis == 'y' ? d.y : d.z; };
  if (name.compare(0, 5, "%tid.") == 0) return of({t % b.x, t / b.x % b.y, t / (b.x * b.y)});
  if (name.compare(0, 6, "%ntid.") == 0) return of(b);
  if (name.compare(0, 7, "%ctaid.") == 0) return of(block.index);
  if (name.compare(0, 8, "%nctaid.") == 0) return of(launch.grid);
  if (name == "%laneid") return l;
  if (name == "%warpid") return t / kLanes;
  if (name == "%nwarpid") return static_cast<uint32_t>(block.warps.size());
  if (name == "%lanemask_eq") return 1u << l;
  if (name == "%lanemask_lt") return (1u << l) - 1;
  if (name == "%lanemask_le") return (2u << l) - 1;
  if (name == "%lanemask_gt") return ~((2u << l) - 1);
  if (name == "%lanemask_ge") return ~((1u << l) - 1);
  if (name == "%nsmid") return static_cast<uint32_t>(launch.config->sm_count);
  if (name == "%total_smem_size") return static_cast<uint32_t>(launch.shared_bytes);
  if (name == "%dynamic_smem_size") {
    return static_cast<uint32_t>(launch.shared_bytes - launch.kernel->info.static_shared_bytes);
  }
  // %smid: blocks in turn
  const uint32_t number =
      block.index.x + launch.grid.x * (block.index.y + launch.grid.y * block.index.z);
  return number % static_cast<uint32_t>(launch.config->sm_count);
}

}  // namespace

void start_block(Launch& launch, Block& block, int64_t number) {
  const Kernel& kernel = *launch.kernel;
  const auto n = static_cast<uint64_t>(number);
  block.launch = &launch;
  block.index = {static_cast<uint32_t>(n % launch.grid.x),
                 static_cast<uint32_t>(n / launch.grid.x % launch.grid.y),
                 static_cast<uint32_t>(n / launch.grid.x / launch.grid.y)};
  block.active = true;
  block.threads = static_cast<int>(launch.block.x * launch.block.y * launch.block.z);
  block.epoch = 1;
  block.turn = 0;
  block.shared.reset(launch.shared_bytes, kernel.bytewise_races);
  const size_t warps = static_cast<size_t>((block.threads + kLanes - 1) / kLanes);
  block.local.assign(warps * kLanes * static_cast<size_t>(kernel.info.local_bytes), 0xff);
  block.local_defined.assign(block.local.size(), 0);
  block.warps.resize(warps);
  for (size_t i = 0; i < warps; ++i) {
    Warp& w = block.warps[i];
    w.block = &block;
    w.launch = &launch;
    w.index = static_cast<int>(i);
    const int lanes = std::min(block.threads - w.index * kLanes, kLanes);
    w.present = lanes == kLanes ? kFull : (1u << lanes) - 1;
    w.exited = 0;
    w.groups.assign(1, {0, w.present, false});
    w.starved = 0;
    w.waiting = false;
    w.prefer = w.last_preferred = -1;
    w.open.clear();
    w.committed.clear();
    if (w.storage.empty()) w.storage.resize(kernel.file_words + kernel.masks + 16);
    uint32_t* start = w.storage.data();
    while (reinterpret_cast<uintptr_t>(start) % 64 != 0) ++start;
    w.files[0] = start;
    w.files[1] = const_cast<uint32_t*>(kernel.constants.data());  // never written
    w.undef = start + kernel.file_words;
    std::fill_n(w.undef, kernel.masks, kFull);
    w.undef[0] = 0;
    for (const SpecialRegister& s : kernel.specials) {
      for (int l = 0; l < kLanes; ++l) {
        w.files[0][s.op.offset + static_cast<uint32_t>(l)] =
            special_value(launch, block, w.index * kLanes + l, l, s.name);
      }
      w.undef[s.op.undef] = 0;
    }
  }
}

int64_t run_block(Launch& launch, Block& block) {
  const int warps = static_cast<int>(block.warps.size());
  const int64_t slice = launch.config->slice;
  int64_t done = 0;
  int idle = 0;
  while (done < slice && !launch.aborted) {
    Warp& w = block.warps[static_cast<size_t>(block.turn)];
    block.turn = (block.turn + 1) % warps;
    const int64_t n = w.groups.empty() ? 0 : run_warp(w, slice - done);
    done += n;
    idle = n == 0 ? idle + 1 : 0;
    if (idle < warps) continue;
    if (!pass_barrier(block)) break;
    ++done;
    idle = 0;
  }
  if (std::all_of(block.warps.begin(), block.warps.end(),
                  [](const Warp& w) { return w.groups.empty(); })) {
    block.active = false;
  }
  return done;
}

void report_stuck(Block& block) {
  const Instr* code = block.launch->kernel->code.data();
  for (Warp& w : block.warps) {
    for (const Group& g : w.groups) {
      const Instr& in = code[g.pc];
      const int lane = __builtin_ctz(g.mask);
      char lanes[16];
      std::snprintf(lanes, sizeof(lanes), "0x%08x", g.mask);
      if (in.step == Step::kBarrier) {
        w.report(in, lane, "deadlock",
                 std::string("lanes ") + lanes + " wait at a barrier that others never reach");
      } else {
        w.report(
            in, lane, "deadlock",
            std::string("lanes ") + lanes + " wait at a collective whose other members never come");
      }
    }
  }
}

}  // namespace ptxsim
