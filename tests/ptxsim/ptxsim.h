// SPDX-License-Identifier: Apache-2.0
// The PTX interpreter's interface: parse a module, run a kernel over host memory, read what the
// checks found and what the counters counted. The stand-in CUDA runtime (runtime.cpp) and the C
// functions for tests (capi.cpp) are written on this header alone.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace ptxsim {

// Thrown for PTX that cannot be parsed or holds an unsupported instruction (at parse, naming
// kernel and line), and for launches that a device would refuse.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Dim3 {
  uint32_t x = 1, y = 1, z = 1;
};

// What tests vary. Defaults are an sm_80 with 108 multiprocessors.
struct Config {
  int capability = 80;            // the PTX chosen from a fat binary, and the attributes
  int sm_count = 108;             // as told to launchers
  int resident_blocks = 4;        // blocks that are time-sliced at once
  int slice = 2000;               // instructions of a block before the next one's turn
  int64_t shared_optin = 166912;  // largest dynamic shared memory with the opt-in attribute
  bool mma_truncate = false;      // accumulate like hardware that aligns and truncates
  bool checks = true;             // findings; counters are always on
  int64_t max_instructions = 4'000'000'000;  // of one launch, then it counts as endless
};

// One distinct finding of a check. `kind` is one of: out-of-bounds, misaligned, uninitialised,
// race, in-flight, barrier, deadlock, endless, trap, leftover.
struct Finding {
  std::string kind, kernel, file, message;  // file: the .cu or .cuh of the source line
  int line = 0;
  Dim3 block;
  int warp = 0, lane = 0;
  int64_t count = 1;  // how often it happened
};

// Counts of one source line, or of a whole launch.
struct Counts {
  int64_t instructions = 0;                         // executed warp instructions
  int64_t shared_wavefronts = 0, shared_ideal = 0;  // see rules in counters.h
  // Global, 32 bytes each: over all requests, the fewest these need, and different ones.
  int64_t load_sectors = 0, load_sectors_ideal = 0, load_sectors_distinct = 0;
  int64_t store_sectors = 0, store_sectors_ideal = 0, store_sectors_distinct = 0;
  int64_t load_requests = 0, load_requests_16_bytes = 0;  // warp instructions; of 16 bytes a lane
};

struct LaunchReport {
  std::string kernel;
  Dim3 grid, block;
  int64_t shared_bytes = 0;
  Counts total;
  std::map<std::string, int64_t> by_opcode;               // "mma.m16n8k16" -> count
  std::map<std::pair<std::string, int>, Counts> by_line;  // (file, line)
  // Per registered or allocated range: distinct and requested bytes read, so that a test can ask
  // for the weights alone.
  struct Range {
    std::string name;
    int64_t requested = 0, distinct = 0, bytes = 0;
  };
  std::vector<Range> reads;
};

struct Kernel;  // parsed; see module.h

struct KernelInfo {
  std::string name;
  std::vector<int> param_offsets, param_bytes;
  int param_total_bytes = 0;
  int64_t static_shared_bytes = 0, local_bytes = 0;
  int max_threads = 1024;  // .maxntid, or 1024
};

class Module {
 public:
  Module();
  ~Module();
  Module(Module&&) noexcept;
  // Throws Error. `origin` names the module in messages.
  static Module parse(const std::string& ptx, const std::string& origin);
  const Kernel* find(const std::string& name) const;  // null if there is none
  std::vector<KernelInfo> kernels() const;
  // Address and size of a module-scope .global or .const variable; null if there is none.
  void* variable(const std::string& name, size_t* bytes) const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

const KernelInfo& info(const Kernel& kernel);

// The one simulated device: memory with exact bounds and shadows, findings, reports.
class Device {
 public:
  static Device& get();
  Config config;

  void* allocate(size_t bytes);  // exact bounds, undefined contents (NaN bytes)
  bool release(void* pointer);   // false if it is not the start of an allocation
  // Host memory handed in, e.g. a CPU tensor. `defined` false: reading before writing is a finding.
  void add_range(const void* pointer, size_t bytes, const std::string& name, bool defined);
  bool remove_range(const void* pointer);
  void mark_defined(const void* pointer, size_t bytes, bool defined);  // memcpy and memset do this
  // Whether [pointer, pointer + bytes) lies in one allocation or range.
  bool contains(const void* pointer, size_t bytes) const;

  // Runs a whole grid to its end. params[i] points at the i-th parameter's value. Throws Error for
  // a launch a device would refuse; what checks find is appended to findings() and the launch goes
  // on where that is possible (a wild access reads zeros and writes nothing).
  void launch(const Kernel& kernel, Dim3 grid, Dim3 block, size_t dynamic_shared_bytes,
              const void* const* params);

  std::vector<Finding>& findings();
  std::vector<LaunchReport>& reports();  // one per launch since the last clear
  void clear();                          // findings and reports

 private:
  Device();
};

// {"findings": [...], "launches": [...]} and the same as a table for people.
std::string to_json(const std::vector<Finding>& findings, const std::vector<LaunchReport>& reports);
std::string to_table(const std::vector<Finding>& findings,
                     const std::vector<LaunchReport>& reports);

// The PTX texts in a fat binary (the payload that __cudaRegisterFatBinary is given), with their
// compute capability (80 for compute_80). Throws Error that names the flag for compressed PTX.
struct PtxImage {
  int capability = 0;
  bool specific = false;  // compute_90a, compute_120f: not for later architectures
  std::string text;
};
std::vector<PtxImage> ptx_images(const void* fatbin_wrapper);

}  // namespace ptxsim
