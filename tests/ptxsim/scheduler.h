// SPDX-License-Identifier: Apache-2.0
// Running blocks: who goes next, divergence, barriers.
#pragma once

#include "warp.h"

namespace ptxsim {

// Puts block number `number` of the grid into the slot.
void start_block(Launch& launch, Block& block, int64_t number);
// Runs up to config.slice instructions; returns how many. Clears block.active at its end.
int64_t run_block(Launch& launch, Block& block);
// Reports what the block's warps wait for.
void report_stuck(Block& block);

}  // namespace ptxsim
