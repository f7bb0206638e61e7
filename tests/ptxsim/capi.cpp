// SPDX-License-Identifier: Apache-2.0
// The C functions for tests.
#include "capi.h"

#include <exception>

#include "runtime.h"

namespace ptxsim {
namespace {

// Runs body() under the lock; an exception becomes -1 and the last error's text.
template <typename Body>
int guarded(Body body) {
  Runtime& runtime = Runtime::get();
  const std::lock_guard<std::recursive_mutex> lock(runtime.mutex);
  try {
    body(runtime);
    return 0;
  } catch (const std::exception& error) {
    runtime.error_text = error.what();
    return -1;
  }
}

const char* keep(std::string* slot, std::string text) {
  *slot = std::move(text);
  return slot->c_str();
}

}  // namespace
}  // namespace ptxsim

using namespace ptxsim;  // the functions below are C functions

int ptxsim_run_ptx(const char* ptx, const char* kernel, const uint32_t* grid, const uint32_t* block,
                   uint64_t dynamic_shared_bytes, const void* const* params, int param_count) {
  return guarded([&](Runtime&) {
    const Module module = Module::parse(ptx, "run_ptx");
    const Kernel* found = module.find(kernel);
    if (found == nullptr) {
      throw Error(std::string("run_ptx: expected a kernel ") + kernel + " in the PTX, got none");
    }
    const int expected = static_cast<int>(info(*found).param_offsets.size());
    if (param_count != expected) {
      throw Error("run_ptx: expected " + std::to_string(expected) + " parameters, got " +
                  std::to_string(param_count));
    }
    run_and_check(*found, {grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]},
                  dynamic_shared_bytes, params);
  });
}

int ptxsim_check_ptx(const char* ptx) {
  return guarded([&](Runtime&) { Module::parse(ptx, "check_ptx"); });
}

int ptxsim_fatbin_images(const void* wrapper) {
  int count = 0;
  const int status =
      guarded([&](Runtime&) { count = static_cast<int>(ptx_images(wrapper).size()); });
  return status == 0 ? count : status;
}

void* ptxsim_allocate(uint64_t bytes) {
  void* pointer = nullptr;
  guarded([&](Runtime&) { pointer = Device::get().allocate(bytes); });
  return pointer;
}

int ptxsim_release(void* pointer) {
  return guarded([&](Runtime&) {
    if (!Device::get().release(pointer)) {
      throw Error("release: expected the start of an allocation, got another pointer");
    }
  });
}

int ptxsim_register(const void* pointer, uint64_t bytes, const char* name, int defined) {
  return guarded([&](Runtime&) { Device::get().add_range(pointer, bytes, name, defined != 0); });
}

int ptxsim_unregister(const void* pointer) {
  return guarded([&](Runtime& runtime) {
    runtime.zero_ranges.erase(pointer);
    if (!Device::get().remove_range(pointer)) {
      throw Error("unregister: expected the start of a registered range, got another pointer");
    }
  });
}

int ptxsim_mark_defined(const void* pointer, uint64_t bytes, int defined) {
  return guarded([&](Runtime&) { Device::get().mark_defined(pointer, bytes, defined != 0); });
}

int ptxsim_declare_zero(const void* pointer, uint64_t bytes, const char* name) {
  return guarded([&](Runtime& runtime) {
    if (!Device::get().contains(pointer, bytes)) {
      throw Error(std::string("declare_zero: expected ") + name +
                  " to lie in one allocation or registered range, got another pointer");
    }
    runtime.zero_ranges[pointer] = {name, bytes};
  });
}

int ptxsim_forget_zero(const void* pointer) {
  return guarded([&](Runtime& runtime) {
    if (runtime.zero_ranges.erase(pointer) == 0) {
      throw Error("forget_zero: expected the start of a declared range, got another pointer");
    }
  });
}

int ptxsim_configure(const char* key, const char* value) {
  return guarded([&](Runtime& runtime) { runtime.configure(key, value); });
}

void ptxsim_reset_config(void) {
  guarded([](Runtime& runtime) { runtime.reset_config(); });
}

const char* ptxsim_report_json(void) {
  static std::string text;
  return keep(&text, to_json(Device::get().findings(), Device::get().reports()));
}

const char* ptxsim_findings_json(void) {
  static std::string text;
  return keep(&text, to_json(Device::get().findings(), {}));
}

const char* ptxsim_report_table(void) {
  static std::string text;
  return keep(&text, to_table(Device::get().findings(), Device::get().reports()));
}

const char* ptxsim_last_error(void) {
  static std::string text;
  return keep(&text, Runtime::get().error_text);
}

void ptxsim_clear(void) {
  guarded([](Runtime& runtime) {
    Device::get().clear();
    runtime.reset_errors();
  });
}
