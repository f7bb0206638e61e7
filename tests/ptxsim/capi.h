// SPDX-License-Identifier: Apache-2.0
// The C functions that Python tests call (tests/simulator.py). Those that return int return 0, or
// -1 with the reason in ptxsim_last_error(). Returned texts live until the next call of the same
// function.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda_api.h"

// Parses `ptx` and runs one kernel of it; params[i] points at the i-th parameter's value.
PTXSIM_EXPORT int ptxsim_run_ptx(const char* ptx, const char* kernel, const uint32_t* grid,
                                 const uint32_t* block, uint64_t dynamic_shared_bytes,
                                 const void* const* params, int param_count);
// Parses only: 0 if every instruction is supported.
PTXSIM_EXPORT int ptxsim_check_ptx(const char* ptx);
// The PTX texts of a fat binary (the wrapper's address): how many, or -1.
PTXSIM_EXPORT int ptxsim_fatbin_images(const void* wrapper);

// Memory: exact allocations, host ranges, and ranges that must be zero after every launch.
PTXSIM_EXPORT void* ptxsim_allocate(uint64_t bytes);
PTXSIM_EXPORT int ptxsim_release(void* pointer);
PTXSIM_EXPORT int ptxsim_register(const void* pointer, uint64_t bytes, const char* name,
                                  int defined);
PTXSIM_EXPORT int ptxsim_unregister(const void* pointer);
PTXSIM_EXPORT int ptxsim_mark_defined(const void* pointer, uint64_t bytes, int defined);
PTXSIM_EXPORT int ptxsim_declare_zero(const void* pointer, uint64_t bytes, const char* name);
PTXSIM_EXPORT int ptxsim_forget_zero(const void* pointer);

// Settings by name: see Runtime::configure.
PTXSIM_EXPORT int ptxsim_configure(const char* key, const char* value);
// Settings as when the library was loaded.
PTXSIM_EXPORT void ptxsim_reset_config(void);

// {"findings": [...], "launches": [...]}; the other one leaves the launches out.
PTXSIM_EXPORT const char* ptxsim_report_json(void);
PTXSIM_EXPORT const char* ptxsim_findings_json(void);
PTXSIM_EXPORT const char* ptxsim_report_table(void);
PTXSIM_EXPORT const char* ptxsim_last_error(void);
// Forgets findings, reports and errors, the sticky one too.
PTXSIM_EXPORT void ptxsim_clear(void);
