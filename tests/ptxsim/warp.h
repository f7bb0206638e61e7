// SPDX-License-Identifier: Apache-2.0
// The state of a launch while it runs: blocks, warps and their groups of lanes.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <string>
#include <tuple>
#include <vector>

#include "memory.h"
#include "module.h"

namespace ptxsim {

struct Block;
struct Launch;

// Lanes of a warp that are at the same instruction.
struct Group {
  int pc = 0;
  uint32_t mask = 0;
  bool parked = false;  // waits at a collective or a barrier
};

// One cp.async of a warp: what will land in shared memory.
struct Copy {
  uint32_t address = 0;
  uint8_t bytes = 0, lane = 0;
  bool defined = true;
  uint8_t data[16] = {};
};

struct Warp {
  uint32_t* files[2] = {nullptr, nullptr};  // registers, constants
  uint32_t* undef = nullptr;
  Block* block = nullptr;
  Launch* launch = nullptr;
  int index = 0;
  uint32_t present = 0, exited = 0;  // lanes of the block, lanes that returned
  std::vector<Group> groups;
  int starved = 0;       // backward jumps in waiting loops since another group ran
  bool waiting = false;  // an atomic or volatile access since the last backward jump
  int prefer = -1;       // pc of the group that runs out of turn, or -1
  int last_preferred = -1;
  std::vector<Copy> open;  // copies not yet in a group
  std::deque<std::vector<Copy>> committed;
  std::vector<uint32_t> storage;

  // Notes a finding at `in` for a lane of this warp.
  void report(const Instr& in, int lane, const char* kind, const std::string& message);
};

struct Block {
  Launch* launch = nullptr;
  Dim3 index;
  bool active = false;
  int threads = 0;
  std::vector<Warp> warps;
  SharedMemory shared;
  std::vector<uint8_t> local, local_defined;
  uint32_t epoch = 1;
  int turn = 0;  // the warp that runs next
};

// Counters of one instruction; summed over lines and kernels when the launch ends.
struct InstrCounts {
  int64_t executed = 0, wavefronts = 0, wavefronts_ideal = 0;
  int64_t load_sectors = 0, load_ideal = 0, store_sectors = 0, store_ideal = 0;
  int64_t load_requests = 0, load_requests_16 = 0;
};

// What the instructions of a source line touched of global memory.
struct Touched {
  SectorSet read, written;
};

struct Launch {
  const Kernel* kernel = nullptr;
  const Config* config = nullptr;
  Ranges* ranges = nullptr;
  int64_t id = 0;
  Dim3 grid, block;
  int64_t shared_bytes = 0;  // static and dynamic
  std::vector<uint8_t> params;
  std::vector<InstrCounts> counts;  // per instruction
  std::vector<Touched> touched;     // per line of the kernel
  std::vector<Range*> recent;       // per instruction: the range of its last access
  int64_t executed = 0;
  bool aborted = false;  // trap, deadlock, endless
  std::vector<Finding>* findings = nullptr;
  std::map<std::tuple<std::string, std::string, int>, size_t> found;  // kind, file, line
};

// Lands the oldest committed copies until no more than `keep` groups are under way.
void land_copies(Warp& w, const Instr& in, size_t keep);

}  // namespace ptxsim
