// SPDX-License-Identifier: Apache-2.0
// Decoding of arithmetic, moves, control flow and collectives.

#include <algorithm>

#include "alu.h"
#include "collectives.h"
#include "decode.h"
#include "memory_ops.h"
#include "text.h"

namespace ptxsim {

bool Decoder::arithmetic() {
  const std::vector<std::string>& o = s_->operands;
  std::string op = base_;
  if (op == "setp") {
    set_predicate();
    return true;
  }
  if (op == "lop3") {
    if (take_type() != Type::kB32) fail("unsupported type");
    need_operands(5, 5);
    destination(o[0], 4);
    for (int i = 1; i <= 3; ++i) source(o[static_cast<size_t>(i)], Type::kB32);
    in_.imm = immediate(o[4]);
    set(lop3_op());
    return true;
  }
  if (op == "prmt" || op == "shf" || op == "dp4a") {
    std::string mode;
    if (op == "prmt") {
      int index = 0;
      const char* const kModes[] = {"", "f4e", "b4e", "rc8", "ecl", "ecr", "rc16"};
      for (int i = 1; i < 7; ++i) {
        if (take(kModes[i])) index = i;
      }
      take_type();
      set(prmt_op(index));
    } else if (op == "shf") {
      const bool left = take("l");
      if (!left && !take("r")) fail("expected .l or .r");
      const bool wrap = take("wrap");
      if (!wrap && !take("clamp")) fail("expected .wrap or .clamp");
      take_type();
      set(shf_op(left, wrap));
    } else {
      const bool a = is_signed(take_type()), b = is_signed(take_type());
      set(dp4a_op(a, b));
    }
    need_operands(4, 4);
    destination(o[0], 4);
    for (int i = 1; i <= 3; ++i) source(o[static_cast<size_t>(i)], Type::kB32);
    return true;
  }
  static const std::map<std::string, int> kArity = {
      {"add", 2},   {"sub", 2},   {"mul", 2},  {"mad", 3},  {"fma", 3},      {"div", 2},
      {"rem", 2},   {"neg", 1},   {"abs", 1},  {"min", 2},  {"max", 2},      {"sqrt", 1},
      {"rsqrt", 1}, {"rcp", 1},   {"ex2", 1},  {"lg2", 1},  {"copysign", 2}, {"and", 2},
      {"or", 2},    {"xor", 2},   {"not", 1},  {"shl", 2},  {"shr", 2},      {"bfe", 3},
      {"bfi", 4},   {"bfind", 1}, {"brev", 1}, {"clz", 1},  {"popc", 1},     {"sin", 1},
      {"cos", 1},   {"tanh", 1},  {"sad", 3},  {"cnot", 1}, {"selp", 3}};
  const auto arity = kArity.find(op);
  if (arity == kArity.end()) return false;
  need_operands(static_cast<size_t>(arity->second) + 1, static_cast<size_t>(arity->second) + 1);
  std::string part;
  if ((op == "mul" || op == "mad") && take_one_of({"lo", "hi", "wide"}, &part)) op += "." + part;
  if (op == "bfind" && take("shiftamt")) op += ".shiftamt";
  const Type type = take_type();
  if (type == Type::kPred) {
    destination(o[0], 0);
    for (size_t i = 1; i < o.size(); ++i) predicate_source(o[i]);
    set(pred_op(op));
    return true;
  }
  int result = bytes_of(type);
  if (op.size() > 5 && op.compare(4, 4, "wide") == 0) result *= 2;
  if (op == "popc" || op == "clz" || op.compare(0, 5, "bfind") == 0) result = 4;
  destination(o[0], result);
  if (is_integer(type) || op == "selp") {
    for (int i = 1; i <= arity->second; ++i) {
      Type t = type;
      if (((op == "shl" || op == "shr") && i == 2) || (op == "bfe" && i >= 2) ||
          (op == "bfi" && i >= 3)) {
        t = Type::kU32;
      }
      if (op == "mad.wide" && i == 3) t = bytes_of(type) == 4 ? Type::kU64 : Type::kU32;
      if (op == "selp" && i == 3) {
        predicate_source(o[3]);
      } else {
        source(o[static_cast<size_t>(i)], t);
      }
    }
    set(integer_op(op, type));
    return true;
  }
  if (op == "mad") op = "fma";
  for (int i = 1; i <= arity->second; ++i) source(o[static_cast<size_t>(i)], type);
  if (take("NaN")) op += ".NaN";
  take("ftz");
  take("noftz");
  take("approx");
  if (op == "div") take("full");
  const bool saturate = take("sat");
  const Round round = take_round();
  if (type == Type::kF32 || type == Type::kF64) {
    set(float_op(op, type, round, saturate));
  } else {
    if (round != Round::kNearest) fail("unsupported rounding");
    set(half_op(op, type, saturate));
  }
  return true;
}

void Decoder::set_predicate() {
  const std::vector<std::string>& o = s_->operands;
  std::string compare, boolean;
  if (!take_one_of({"equ", "neu", "ltu", "leu", "gtu", "geu", "eq", "ne", "lt", "le", "gt", "ge",
                    "lo", "ls", "hi", "hs", "num", "nan"},
                   &compare)) {
    fail("expected a comparison");
  }
  if (take_one_of({"and", "or", "xor"}, &boolean)) {
    in_.a = boolean == "and" ? 1 : boolean == "or" ? 2 : 3;
  }
  take("ftz");
  const Type type = take_type();
  need_operands(in_.a != 0 ? 4 : 3, in_.a != 0 ? 4 : 3);
  const size_t bar = o[0].find('|');
  destination(trim(o[0].substr(0, bar)), 0);
  if (bar == std::string::npos) {
    sink(0);
  } else {
    destination(trim(o[0].substr(bar + 1)), 0);
  }
  source(o[1], type);
  source(o[2], type);
  if (in_.a != 0) predicate_source(o[3]);
  set(setp_op(compare, type));
}

bool Decoder::moves() {
  const std::vector<std::string>& o = s_->operands;
  if (base_ == "mov") {
    move();
    return true;
  }
  if (base_ == "cvt") {
    convert();
    return true;
  }
  if (base_ == "cvta") {
    const bool to = take("to");
    const Space space = take_space();
    if (take_type() != Type::kU64) fail("expected .u64");
    need_operands(2, 2);
    destination(o[0], 8);
    source(o[1], Type::kU64);
    set(cvta_op(space, to));
    return true;
  }
  if (base_ == "isspacep") {
    const Space space = take_space();
    need_operands(2, 2);
    destination(o[0], 0);
    source(o[1], Type::kU64);
    set(isspacep_op(space));
    return true;
  }
  return false;
}

void Decoder::convert() {
  const std::vector<std::string>& o = s_->operands;
  std::string integer;
  Round round = Round::kNearest;
  if (take_one_of({"rni", "rzi", "rmi", "rpi"}, &integer)) {
    round = integer == "rni"   ? Round::kNearest
            : integer == "rzi" ? Round::kZero
            : integer == "rmi" ? Round::kDown
                               : Round::kUp;
  } else {
    round = take_round();
  }
  take("ftz");
  const bool saturate = take("sat"), relu = take("relu");
  const Type to = take_type(), from = take_type();
  if (to == Type::kF16x2 || to == Type::kBf16x2) {
    if (from != Type::kF32 || saturate || !integer.empty()) {
      fail("unsupported conversion");
    }
    need_operands(3, 3);
    destination(o[0], 4);
    source(o[1], Type::kF32);
    source(o[2], Type::kF32);
    set(convert_pack_op(to, round, relu));
    return;
  }
  need_operands(2, 2);
  if (from == Type::kF16x2 || from == Type::kBf16x2) fail("unsupported type");
  const bool wide = register_bytes(o[0]) == 8;
  destination(o[0], wide ? 8 : std::min(bytes_of(to), 4));
  // A source register may be wider than its type; up to 32 bits that needs nothing.
  const bool low_bits = register_bytes(o[1]) == 8 && bytes_of(from) < 8;
  source(o[1], low_bits ? Type::kB64 : from);
  in_.a = static_cast<uint8_t>(round);
  in_.b = !integer.empty();
  in_.c = saturate;
  in_.d = relu;
  const bool simple = !saturate && !relu && (round == Round::kNearest && integer.empty());
  Fn fn = nullptr;
  if (low_bits) {
    if (wide != (bytes_of(to) == 8)) fail("unsupported registers");
    set(convert_low_bits_op(to, from));
    return;
  }
  if (simple && wide == (bytes_of(to) == 8)) fn = convert_fast_op(to, from);
  set(fn != nullptr ? fn : convert_op(to, from, wide));
}

bool Decoder::control() {
  const std::vector<std::string>& o = s_->operands;
  if (base_ == "bra") {
    take("uni");
    need_operands(1, 1);
    in_.step = Step::kBranch;
    branch_labels_.emplace_back(static_cast<int>(s_ - body_.statements.data()), o[0]);
    return true;
  }
  if (base_ == "ret" || base_ == "exit") {
    take("uni");
    in_.step = Step::kExit;
    return true;
  }
  if (base_ == "trap") {
    in_.step = Step::kExit;
    in_.a = 1;
    return true;
  }
  if (base_ == "bar" || base_ == "barrier") {
    if (take("warp")) {
      if (!take("sync")) fail("expected .sync");
      need_operands(1, 1);
      opcode_ = "bar.warp.sync";
      in_.step = Step::kCollective;
      in_.member = 0;
      source(o[0], Type::kB32);
      set(warp_barrier_op());
      return true;
    }
    take("cta");
    take("aligned");
    in_.step = Step::kBarrier;
    if (take("sync")) {
      if (o.size() > 1) fail("unsupported: a barrier of some threads only");
      opcode_ = "bar.sync";
    } else if (take("red")) {
      opcode_ = "bar.red";
      std::string op;
      if (!take_one_of({"popc", "and", "or"}, &op)) fail("expected a reduction");
      in_.a = op == "popc" ? 1 : op == "and" ? 2 : 3;
      take_type();
      need_operands(3, 3);
      destination(o[0], in_.a == 1 ? 4 : 0);
      predicate_source(o[2]);
    } else {
      fail("unsupported barrier");
    }
    const std::string& id = opcode_ == "bar.red" ? o[1] : o.empty() ? base_ : o[0];
    uint64_t number = 1;
    if (!literal(id, Type::kU32, &number) || number != 0) {
      fail("unsupported: expected barrier 0, got '" + id + "'");
    }
    return true;
  }
  if (base_ == "membar" || base_ == "fence") {  // memory is sequentially consistent here
    mods_.clear();
    return set([](Warp&, const Instr&, uint32_t) {}), true;
  }
  if (base_ == "nanosleep") {
    take("u32");
    in_.sync = true;
    return set([](Warp&, const Instr&, uint32_t) {}), true;
  }
  return false;
}

bool Decoder::collective() {
  const std::vector<std::string>& o = s_->operands;
  if (base_ == "shfl") {
    if (!take("sync")) fail("expected .sync");
    std::string mode;
    if (!take_one_of({"idx", "up", "down", "bfly"}, &mode)) fail("expected a mode");
    take_type();
    need_operands(5, 5);
    const size_t bar = o[0].find('|');
    destination(trim(o[0].substr(0, bar)), 4);
    if (bar == std::string::npos) {
      sink(0);
    } else {
      destination(trim(o[0].substr(bar + 1)), 0);
    }
    for (size_t i = 1; i <= 4; ++i) source(o[i], Type::kB32);
    in_.step = Step::kCollective;
    in_.member = 5;
    set(shfl_op(mode == "idx" ? 0 : mode == "up" ? 1 : mode == "down" ? 2 : 3));
    return true;
  }
  if (base_ == "vote") {
    if (!take("sync")) fail("expected .sync");
    std::string mode;
    if (!take_one_of({"all", "any", "uni", "ballot"}, &mode)) fail("expected a mode");
    take_type();
    need_operands(3, 3);
    destination(o[0], mode == "ballot" ? 4 : 0);
    predicate_source(o[1]);
    source(o[2], Type::kB32);
    in_.step = Step::kCollective;
    in_.member = 2;
    set(vote_op(mode == "all" ? 0 : mode == "any" ? 1 : mode == "uni" ? 2 : 3));
    return true;
  }
  if (base_ == "activemask") {
    take_type();
    need_operands(1, 1);
    destination(o[0], 4);
    set(activemask_op());
    return true;
  }
  if (base_ == "redux") {
    if (!take("sync")) fail("expected .sync");
    std::string op;
    if (!take_one_of({"add", "min", "max", "and", "or", "xor"}, &op)) fail("expected an operation");
    const Type type = take_type();
    if (bytes_of(type) != 4 || !is_integer(type)) fail("unsupported type");
    need_operands(3, 3);
    destination(o[0], 4);
    source(o[1], type);
    source(o[2], Type::kB32);
    in_.step = Step::kCollective;
    in_.member = 2;
    set(redux_op(op, type));
    return true;
  }
  if (base_ == "match") {
    const bool all = take("all");
    if (!all && !take("any")) fail("expected .all or .any");
    if (!take("sync")) fail("expected .sync");
    const Type type = take_type();
    need_operands(3, 3);
    const size_t bar = o[0].find('|');
    destination(trim(o[0].substr(0, bar)), 4);
    if (bar == std::string::npos) {
      sink(0);
    } else {
      destination(trim(o[0].substr(bar + 1)), 0);
    }
    source(o[1], type);
    source(o[2], Type::kB32);
    in_.step = Step::kCollective;
    in_.member = 3;
    set(match_op(all, type));
    return true;
  }
  if (base_ == "movmatrix") {
    if (!(take("sync") && take("aligned") && take("m8n8") && take("trans")))
      fail("unsupported form");
    take_type();
    need_operands(2, 2);
    destination(o[0], 4);
    source(o[1], Type::kB32);
    in_.step = Step::kCollective;
    set(movmatrix_op());
    return true;
  }
  if (base_ == "ldmatrix") {
    if (!(take("sync") && take("aligned") && take("m8n8"))) fail("unsupported form");
    in_.a = take("x4") ? 4 : take("x2") ? 2 : take("x1") ? 1 : 0;
    if (in_.a == 0) fail("expected .x1, .x2 or .x4");
    in_.b = take("trans");
    in_.space = take_space();
    if (take_type() != Type::kB16) fail("unsupported type");
    need_operands(2, 2);
    const std::vector<std::string> parts = vector_parts(o[0]);
    if (parts.size() != in_.a) fail("expected " + std::to_string(in_.a) + " registers");
    for (const std::string& p : parts) destination(p, 4);
    address(o[1], &in_.imm);
    in_.step = Step::kCollective;
    set(ldmatrix_op());
    return true;
  }
  if (base_ == "mma") {
    mma();
    return true;
  }
  return false;
}

void Decoder::mma() {
  const std::vector<std::string>& o = s_->operands;
  if (!(take("sync") && take("aligned") && take("row") && take("col"))) fail("unsupported form");
  std::string shape;
  if (!take_one_of({"m16n8k16", "m16n8k8", "m16n8k32"}, &shape)) fail("unsupported shape");
  opcode_ = "mma." + shape;
  const Type d = take_type(), a = take_type(), b = take_type(), c = take_type();
  need_operands(4, 4);
  const size_t k = static_cast<size_t>(std::atoi(shape.c_str() + 6));
  size_t na = 4, nb = 2, nc = 4;
  if ((d == Type::kF32 || d == Type::kF16) && c == d && a == b && k != 32) {
    na = k / 4;
    nb = k / 8;
    nc = d == Type::kF16 ? 2 : 4;
    set(mma_float_op(a, static_cast<int>(k), d == Type::kF16));
  } else if (d == Type::kS32 && c == Type::kS32 && k == 32 && bytes_of(a) == 1 &&
             bytes_of(b) == 1) {
    take("satfinite");
    set(mma_integer_op(is_signed(a), is_signed(b)));
  } else {
    fail("unsupported types");
  }
  const size_t counts[] = {nc, na, nb, nc};
  for (size_t i = 0; i < 4; ++i) {
    const std::vector<std::string> parts = vector_parts(o[i]);
    if (parts.size() != counts[i]) fail("expected " + std::to_string(counts[i]) + " registers");
    for (const std::string& p : parts) {
      if (i == 0) {
        destination(p, 4);
      } else {
        source(p, i == 3 && nc == 4 ? c : Type::kB32);
      }
    }
  }
  in_.step = Step::kCollective;
}

}  // namespace ptxsim
