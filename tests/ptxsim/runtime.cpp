// SPDX-License-Identifier: Apache-2.0
// The stand-in runtime's core: settings, errors, loading of modules, launches.
#include "runtime.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "fatbin.h"

namespace ptxsim {
namespace {

thread_local cudaError_t thread_error = kSuccess;

constexpr const char* kSettings[] = {"capability",   "sm_count", "resident_blocks",
                                     "slice",        "checks",   "mma_truncate",
                                     "shared_optin", "pretend",  "max_instructions"};

int64_t to_number(const std::string& key, const std::string& value) {
  char* end = nullptr;
  const int64_t number = std::strtoll(value.c_str(), &end, 10);
  if (value.empty() || *end != '\0' || number < 0) {
    throw Error("configure: expected a number for " + key + ", got '" + value + "'");
  }
  return number;
}

// How often kernels trapped, and how often they did not come to an end.
struct Faults {
  int64_t traps = 0, endless = 0;

  static Faults now() {
    Faults faults;
    for (const Finding& finding : Device::get().findings()) {
      if (finding.kind == "trap") faults.traps += finding.count;
      if (finding.kind == "endless" || finding.kind == "deadlock") faults.endless += finding.count;
    }
    return faults;
  }
};

void check_zero_range(const std::string& kernel, const void* pointer, const ZeroRange& range) {
  const auto* bytes = static_cast<const unsigned char*>(pointer);
  const auto is_set = [](unsigned char byte) { return byte != 0; };
  const auto* first = std::find_if(bytes, bytes + range.bytes, is_set);
  if (first == bytes + range.bytes) return;
  Finding finding;
  finding.kind = "leftover";
  finding.kernel = kernel;
  finding.block = {0, 0, 0};
  finding.message =
      range.name + ": " + std::to_string(std::count_if(first, bytes + range.bytes, is_set)) +
      " of " + std::to_string(range.bytes) + " bytes are not zero at exit, the first is byte " +
      std::to_string(first - bytes);
  for (Finding& other : Device::get().findings()) {
    if (other.kind == finding.kind && other.kernel == kernel && other.message == finding.message) {
      ++other.count;
      return;
    }
  }
  Device::get().findings().push_back(finding);
}

}  // namespace

void run_and_check(const Kernel& kernel, Dim3 grid, Dim3 block, size_t dynamic_shared_bytes,
                   const void* const* params) {
  Device::get().launch(kernel, grid, block, dynamic_shared_bytes, params);
  if (!Device::get().config.checks) return;
  for (const auto& [pointer, range] : Runtime::get().zero_ranges) {
    check_zero_range(info(kernel).name, pointer, range);
  }
}

Runtime& Runtime::get() {
  static Runtime& runtime = *new Runtime;  // never destroyed: libraries unregister at exit
  return runtime;
}

Runtime::Runtime() { reset_config(); }

void Runtime::reset_config() {
  Device::get().config = Config();
  pretend.clear();
  for (const std::string key : kSettings) {
    std::string variable = "PTXSIM_" + key;
    std::transform(variable.begin(), variable.end(), variable.begin(),
                   [](unsigned char letter) { return std::toupper(letter); });
    const char* value = std::getenv(variable.c_str());
    if (value != nullptr) configure(key, value);
  }
}

void Runtime::configure(const std::string& key, const std::string& value) {
  Config& config = Device::get().config;
  if (key == "pretend") {
    if (!value.empty() && value != "no-driver" && value != "no-device") {
      throw Error("configure: expected pretend to be no-driver, no-device or empty, got '" + value +
                  "'");
    }
    pretend = value;
    return;
  }
  if (std::find(std::begin(kSettings), std::end(kSettings), key) == std::end(kSettings)) {
    std::string names;
    for (const char* name : kSettings) names += std::string(names.empty() ? "" : ", ") + name;
    throw Error("configure: expected one of " + names + ", got " + key);
  }
  const int64_t number = to_number(key, value);
  const int small = static_cast<int>(std::min<int64_t>(number, INT32_MAX));
  if (key == "capability") {
    const Architecture* found = find_architecture(small);
    if (found == nullptr) {
      throw Error("configure: expected a capability of 75, 80, 86, 89, 90, 100 or 120, got " +
                  value);
    }
    config.capability = small;
    config.sm_count = found->sm_count;
    config.shared_optin = found->shared_optin();
  } else if (key == "sm_count") {
    config.sm_count = small;
  } else if (key == "resident_blocks") {
    config.resident_blocks = std::max(small, 1);
  } else if (key == "slice") {
    config.slice = std::max(small, 1);
  } else if (key == "checks") {
    config.checks = number != 0;
  } else if (key == "mma_truncate") {
    config.mma_truncate = number != 0;
  } else if (key == "shared_optin") {
    config.shared_optin = number;
  } else {
    config.max_instructions = number;
  }
}

const Architecture& Runtime::architecture() const {
  const Architecture* found = find_architecture(Device::get().config.capability);
  return found != nullptr ? *found : kArchitectures[1];
}

cudaError_t Runtime::ready() {
  if (pretend == "no-driver") return kInsufficientDriver;
  if (pretend == "no-device") return kNoDevice;
  return sticky_;
}

cudaError_t Runtime::fail(cudaError_t error) {
  if (error != kNotReady) thread_error = error;
  return error;
}

cudaError_t Runtime::fail(cudaError_t error, const std::string& text) {
  error_text = text;
  return fail(error);
}

cudaError_t Runtime::last_error(bool reset) {
  if (ready() != kSuccess) return ready();
  const cudaError_t error = thread_error;
  if (reset) thread_error = kSuccess;
  return error;
}

void Runtime::reset_errors() {
  sticky_ = thread_error = kSuccess;
  error_text.clear();
}

// The newest PTX that the pretended architecture can compile.
cudaError_t Runtime::load(Binary* binary) {
  const int capability = Device::get().config.capability;
  if (binary->loaded_capability == capability) return binary->load_error;
  binary->module.reset();
  binary->loaded_capability = capability;
  ++binary->loads;
  binary->load_error = kNoKernelImageForDevice;
  try {
    const std::vector<PtxImage> images = ptx_images(binary->wrapper);
    const PtxImage* best = nullptr;
    for (const PtxImage& image : images) {
      const bool runs =
          image.specific ? image.capability == capability : image.capability <= capability;
      if (runs && (best == nullptr || image.capability > best->capability)) best = &image;
    }
    if (best == nullptr) {
      error_text = "load: expected PTX for compute_" + std::to_string(capability) +
                   " or lower in the fat binary, got none";
      return binary->load_error;
    }
    binary->module.emplace(
        Module::parse(best->text, "compute_" + std::to_string(best->capability)));
    binary->load_error = kSuccess;
  } catch (const Error& error) {
    error_text = error.what();
    binary->load_error = kInvalidPtx;
  }
  return binary->load_error;
}

cudaError_t Runtime::load(Function* function) {
  const cudaError_t error = load(function->binary);
  if (error != kSuccess) return error;
  if (function->loads != function->binary->loads) {
    function->kernel = function->binary->module->find(function->name);
    function->loads = function->binary->loads;
  }
  if (function->kernel != nullptr) return kSuccess;
  error_text = "load: expected a kernel " + function->name + " in the PTX, got none";
  return kInvalidDeviceFunction;
}

int64_t Runtime::max_dynamic_shared_bytes(const Function& function) const {
  if (function.max_dynamic_shared_bytes >= 0) return function.max_dynamic_shared_bytes;
  return kSharedBytesPerBlock - info(*function.kernel).static_shared_bytes;
}

int Runtime::registers(const Function& function) const {
  return registers_per_thread(function.binary->wrapper, Device::get().config.capability,
                              function.name);
}

cudaError_t Runtime::launch(Function* function, Dim3 grid, Dim3 block, size_t dynamic_shared_bytes,
                            void** args) {
  const cudaError_t error = load(function);
  if (error != kSuccess) return error;
  const KernelInfo& kernel = info(*function->kernel);
  const auto refuse = [&](cudaError_t code, const std::string& expected, int64_t got) {
    return fail(code, kernel.name + ": expected " + expected + ", got " + std::to_string(got));
  };
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > kMaxThreadsPerBlock || block.z > 64) {
    return refuse(kInvalidConfiguration, "1 to 1024 threads in a block, 64 along z", threads);
  }
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > INT32_MAX || grid.y > UINT16_MAX ||
      grid.z > UINT16_MAX) {
    return refuse(kInvalidConfiguration,
                  "a grid of 1 to 2^31 - 1 blocks along x, 65535 along y and z",
                  std::min({grid.x, grid.y, grid.z}) == 0 ? 0 : std::max({grid.x, grid.y, grid.z}));
  }
  if (static_cast<int64_t>(dynamic_shared_bytes) > max_dynamic_shared_bytes(*function)) {
    return refuse(kInvalidValue,
                  "at most " + std::to_string(max_dynamic_shared_bytes(*function)) +
                      " bytes of dynamic shared memory (see cudaFuncSetAttribute)",
                  dynamic_shared_bytes);
  }
  if (threads > static_cast<uint64_t>(kernel.max_threads)) {
    return refuse(kLaunchOutOfResources,
                  "at most " + std::to_string(kernel.max_threads) + " threads (launch bounds)",
                  threads);
  }
  // A register file serves whole warps in units of 256 registers.
  const int64_t warps = (threads + 31) / 32;
  if (warps * ((registers(*function) * 32 + 255) / 256 * 256) > kRegistersPerSm) {
    return refuse(kLaunchOutOfResources, "at most 65536 registers in a block",
                  warps * 32 * registers(*function));
  }
  const Faults before = Faults::now();
  try {
    run_and_check(*function->kernel, grid, block, dynamic_shared_bytes, args);
  } catch (const Error& refused) {
    return fail(kInvalidValue, refused.what());
  }
  // As on a device, a launch itself succeeds; the fault shows at the next call that asks.
  const Faults after = Faults::now();
  if (after.endless > before.endless) sticky_ = kLaunchTimeout;
  if (after.traps > before.traps) sticky_ = kLaunchFailure;
  return kSuccess;
}

}  // namespace ptxsim
