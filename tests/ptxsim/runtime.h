// SPDX-License-Identifier: Apache-2.0
// The state of the stand-in CUDA runtime, shared by its files: registered fat binaries and kernels,
// errors, settings. Every stream is in order with every other: a call has done its work when it
// returns.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "architectures.h"
#include "cuda_api.h"
#include "ptxsim.h"

namespace ptxsim {

// One fat binary. Parsed on first use, as CUDA loads lazily.
struct Binary {
  const void* wrapper = nullptr;
  int loaded_capability = 0;  // for which `module` was chosen; 0 before the first use
  int loads = 0;              // how often `module` was chosen anew
  cudaError_t load_error = kSuccess;
  std::optional<Module> module;
};

struct Function {
  Binary* binary = nullptr;
  std::string name;
  const Kernel* kernel = nullptr;
  int loads = 0;                          // of the binary, when `kernel` was looked up
  int64_t max_dynamic_shared_bytes = -1;  // -1: what is left of 48 KiB
};

struct Variable {
  Binary* binary = nullptr;
  std::string name;
  size_t bytes = 0;
};

// A range that must hold zeros after every launch: locks, workspaces.
struct ZeroRange {
  std::string name;
  size_t bytes = 0;
};

class Runtime {
 public:
  static Runtime& get();

  std::recursive_mutex mutex;
  std::map<void**, std::unique_ptr<Binary>> binaries;
  std::map<const void*, Function> functions;  // by the host stub's address
  std::map<const void*, Variable> variables;  // by the host variable's address
  std::map<const void*, ZeroRange> zero_ranges;
  std::string pretend;     // "", "no-driver" or "no-device"
  std::string error_text;  // the reason of the last refused launch or load

  // Sets a setting by its name; throws Error for an unknown name or value. Settings are also read
  // from the environment, PTXSIM_CAPABILITY and so on, when the library is loaded.
  void configure(const std::string& key, const std::string& value);
  void reset_config();  // to what it was when the library was loaded

  const Architecture& architecture() const;

  // Fails with what `pretend` asks for, then with the sticky error of a broken context.
  cudaError_t ready();
  // Remembers a failure as the calling thread's last error; returns it.
  cudaError_t fail(cudaError_t error);
  cudaError_t fail(cudaError_t error, const std::string& text);
  cudaError_t last_error(bool reset);
  void reset_errors();

  cudaError_t load(Binary* binary);
  cudaError_t load(Function* function);
  cudaError_t launch(Function* function, Dim3 grid, Dim3 block, size_t dynamic_shared_bytes,
                     void** args);
  int64_t max_dynamic_shared_bytes(const Function& function) const;
  int registers(const Function& function) const;

 private:
  Runtime();
  cudaError_t sticky_ = kSuccess;  // a kernel broke the context; only a reset helps
};

// Device::launch, then the zero ranges. Throws Error like it.
void run_and_check(const Kernel& kernel, Dim3 grid, Dim3 block, size_t dynamic_shared_bytes,
                   const void* const* params);

// Runs `body`, a callable that returns cudaError_t, under the lock in a usable context; remembers
// its failure.
template <typename Body>
cudaError_t call(Body body) {
  Runtime& runtime = Runtime::get();
  const std::lock_guard<std::recursive_mutex> lock(runtime.mutex);
  cudaError_t error = runtime.ready();
  if (error == kSuccess) error = body(runtime);
  return error == kSuccess ? error : runtime.fail(error);
}

}  // namespace ptxsim
