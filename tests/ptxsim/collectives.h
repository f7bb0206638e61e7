// SPDX-License-Identifier: Apache-2.0
// Instructions that look at several lanes of a warp.
#pragma once

#include <string>

#include "module.h"

namespace ptxsim {

// Ops: d, p (or a sink), a, b, c, member mask. Mode 0 idx, 1 up, 2 down, 3 bfly.
Fn shfl_op(int mode);
// 0 all, 1 any, 2 uni (ops: p, a, member mask), 3 ballot (d, a, member mask).
Fn vote_op(int mode);
Fn activemask_op();
Fn redux_op(const std::string& op, Type type);  // d, a, member mask
Fn match_op(bool all, Type type);               // d, p (or a sink), a, member mask
Fn warp_barrier_op();                           // bar.warp.sync
Fn movmatrix_op();
// Ops: 4 d, 4 (2) a, 2 (1) b, 4 c; 2 d and 2 c if accumulators are f16.
Fn mma_float_op(Type type, int k, bool half_accumulators);  // f16, bf16; k 16 or 8
Fn mma_integer_op(bool a_signed, bool b_signed);            // m16n8k32

}  // namespace ptxsim
