// SPDX-License-Identifier: Apache-2.0
// The functions behind arithmetic opcodes, chosen once at decode. Null: there is none.
#pragma once

#include <string>

#include "half.h"
#include "module.h"

namespace ptxsim {

// add sub mul.lo mul.hi mul.wide mad.lo mad.hi mad.wide div rem min max neg abs and or xor not
// cnot shl shr popc clz brev bfind bfind.shiftamt bfe bfi sad selp mov; types in their own width.
Fn integer_op(const std::string& op, Type type);
Fn shf_op(bool left, bool wrap);
Fn lop3_op();          // the table in Instr::imm
Fn prmt_op(int mode);  // 0 none, 1 f4e, 2 b4e, 3 rc8, 4 ecl, 5 ecr, 6 rc16
Fn dp4a_op(bool a_signed, bool b_signed);
Fn pred_op(const std::string& op);  // and or xor not mov on predicates
// setp: ops are p, q (or a sink), a, b and, with a combining op, c. 'a': 0 none, 1 and, 2 or, 3
// xor.
Fn setp_op(const std::string& compare, Type type);

// add sub mul fma div min max min.NaN max.NaN neg abs sqrt rsqrt rcp ex2 lg2 sin cos tanh copysign
// on f32 and f64; `round` for the first four, div, sqrt and rcp.
Fn float_op(const std::string& op, Type type, Round round, bool saturate);
// The same on f16, bf16 and their pairs, rounded to nearest.
Fn half_op(const std::string& op, Type type, bool saturate);

// cvt. Rounding in Instr::a (a Round), Instr::b: round to an integer, Instr::c: saturate, Instr::d:
// relu. The fast one is for rounding to nearest and none of the others; it may be null.
Fn convert_op(Type to, Type from, bool to_wide_register);
Fn convert_fast_op(Type to, Type from);
Fn convert_low_bits_op(Type to, Type from);  // a narrow integer in a 64-bit register
// cvt.rn.f16x2.f32 d, a, b: a is the upper half. To nearest or to zero.
Fn convert_pack_op(Type to, Round round, bool relu);

}  // namespace ptxsim
