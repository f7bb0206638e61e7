// SPDX-License-Identifier: Apache-2.0
// Counters of memory requests.
//
// Shared: lanes are served in groups of 32, 16 or 8 for accesses of up to 4, 8 or 16 bytes a lane.
// A group costs the maximum over the 32 banks of distinct 4-byte words; ideal is 1 for each group
// with an active lane. ldmatrix costs so for each of its matrices. Writes of landing cp.async
// copies are not counted: they do not go through a warp's load and store instructions.
// Global: distinct 32-byte sectors of a request; ideal is its distinct bytes / 32, rounded up.
// Requested bytes are sectors * 32 over all requests, distinct ones over the launch.
#pragma once

#include "memory_ops.h"

namespace ptxsim {

void count_shared(InstrCounts& counts, const uint64_t* address, uint32_t mask, int bytes);
void count_global(InstrCounts& counts, const Access& access, Use use, int64_t launch);
// Sums the counters of the launch into a report.
LaunchReport make_report(const Launch& launch);

}  // namespace ptxsim
