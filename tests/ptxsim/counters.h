// SPDX-License-Identifier: Apache-2.0
// Counters of memory requests.
//
// Shared: lanes are served in groups of 32, 16 or 8 for accesses of up to 4, 8 or 16 bytes a lane.
// A group costs the maximum over the 32 banks of distinct 4-byte words; ideal is 1 for each group
// with an active lane. ldmatrix costs so for each of its matrices. Writes of landing cp.async
// copies are not counted: they do not go through a warp's load and store instructions.
// Global: distinct 32-byte sectors of a request; ideal is its distinct bytes / 32, rounded up.
// Bytes are sectors * 32: requested ones over all requests, distinct ones those of different
// sectors that a source line, or the whole launch, touched. A line's are the compulsory traffic of
// its own instructions; what two lines share counts for both, and once for the launch.
#pragma once

#include "memory_ops.h"

namespace ptxsim {

void count_shared(InstrCounts& counts, const uint64_t* address, uint32_t mask, int bytes);
void count_global(Launch& launch, const Instr& in, const Access& access, Use use);
// Sums the counters of the launch into a report.
LaunchReport make_report(const Launch& launch);

}  // namespace ptxsim
