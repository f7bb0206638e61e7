// SPDX-License-Identifier: Apache-2.0
// Decoding of mov with packing, loads, stores, atomics and asynchronous copies.

#include <algorithm>
#include <cstring>

#include "alu.h"
#include "decode.h"
#include "lanes.h"
#include "memory_ops.h"
#include "text.h"

namespace ptxsim {
namespace {

// mov.b32 d, {a, b} and mov.b64 d, {a, b[, c, d]}: Instr::a parts of Instr::b bits.
void pack(Warp& w, const Instr& in, uint32_t mask) {
  uint64_t out[kLanes] = {};
  uint32_t undef = 0;
  for (int i = 0; i < in.a; ++i) {
    const uint32_t* from = data<uint32_t>(w, in.ops[1 + i]);
    const uint64_t keep = (1ull << in.b) - 1;
    for (int l = 0; l < kLanes; ++l) out[l] |= (from[l] & keep) << (i * in.b);
    undef |= w.undef[in.ops[1 + i].undef];
  }
  if (in.a * in.b == 64) {
    uint64_t* d = data<uint64_t>(w, in.ops[0]);
    for (int l = 0; l < kLanes; ++l) d[l] = mask >> l & 1 ? out[l] : d[l];
  } else {
    uint32_t* d = data<uint32_t>(w, in.ops[0]);
    for (int l = 0; l < kLanes; ++l) d[l] = mask >> l & 1 ? static_cast<uint32_t>(out[l]) : d[l];
  }
  set_undef(w, in.ops[0], mask, undef);
}

// mov.b32 {a, b}, s and mov.b64 {a, b[, c, d]}, s.
void unpack(Warp& w, const Instr& in, uint32_t mask) {
  uint64_t from[kLanes];
  const Operand& s = in.ops[in.a];
  for (int l = 0; l < kLanes; ++l) {
    from[l] = in.a * in.b == 64 ? data<uint64_t>(w, s)[l] : data<uint32_t>(w, s)[l];
  }
  const uint32_t undef = w.undef[s.undef];
  const uint64_t keep = (1ull << in.b) - 1;
  for (int i = 0; i < in.a; ++i) {
    uint32_t* d = data<uint32_t>(w, in.ops[i]);
    for (int l = 0; l < kLanes; ++l) {
      const auto v = static_cast<uint32_t>(from[l] >> (i * in.b) & keep);
      d[l] = mask >> l & 1 ? v : d[l];
    }
    set_undef(w, in.ops[i], mask, undef);
  }
}

}  // namespace

void Decoder::move() {
  const std::vector<std::string>& o = s_->operands;
  const Type type = take_type();
  need_operands(2, 2);
  if (type == Type::kPred) {
    destination(o[0], 0);
    predicate_source(o[1]);
    set(pred_op("mov"));
    return;
  }
  const int bytes = bytes_of(type);
  const bool into_parts = o[0][0] == '{', from_parts = o[1][0] == '{';
  if (into_parts && from_parts) fail("unsupported form");
  if (into_parts || from_parts) {
    const std::vector<std::string> parts = vector_parts(into_parts ? o[0] : o[1]);
    if (parts.empty() || bytes % static_cast<int>(parts.size()) != 0) fail("unsupported form");
    const int part = bytes / static_cast<int>(parts.size());
    if (part < 2 || part > 4) fail("unsupported form");
    in_.a = static_cast<uint8_t>(parts.size());
    in_.b = static_cast<uint8_t>(8 * part);
    const Type part_type = part == 2 ? Type::kB16 : Type::kB32;
    if (into_parts) {
      for (const std::string& p : parts) destination(p, part);
      source(o[1], type);
      set(unpack);
    } else {
      destination(o[0], bytes);
      for (const std::string& p : parts) source(p, part_type);
      set(pack);
    }
    return;
  }
  destination(o[0], bytes);
  if (o[1] == "%clock" || o[1] == "%clock64" || o[1] == "%globaltimer") {
    fail("unsupported register " + o[1]);
  }
  source(o[1], type);
  set(integer_op("mov", type));
}

bool Decoder::memory() {
  if (base_ == "ld" || base_ == "ldu") {
    load_store(true);
    return true;
  }
  if (base_ == "st") {
    load_store(false);
    return true;
  }
  if (base_ == "atom" || base_ == "red") {
    atomic(base_ == "red");
    return true;
  }
  if (base_ == "cp") {
    async_copy();
    return true;
  }
  if (base_ == "prefetch" || base_ == "prefetchu" || base_ == "discard" ||
      base_ == "applypriority") {
    mods_.clear();  // hints
    return set([](Warp&, const Instr&, uint32_t) {}), true;
  }
  if (base_ == "createpolicy") {
    mods_.clear();
    destination(s_->operands.at(0), 8);
    ops_.push_back(constant(0, 8));
    set(integer_op("mov", Type::kB64));
    return true;
  }
  return false;
}

namespace {

bool is_cache_hint(const std::string& m) {
  return m == "ca" || m == "cg" || m == "cs" || m == "lu" || m == "cv" || m == "wb" || m == "wt" ||
         m.compare(0, 4, "L1::") == 0 || m.compare(0, 4, "L2::") == 0;
}

}  // namespace

void Decoder::load_store(bool load) {
  const std::vector<std::string>& o = s_->operands;
  std::string order, scope;
  take("weak");
  if (take_one_of({"volatile", "relaxed", "acquire", "release", "mmio"}, &order)) {
    in_.d = 1;
    in_.sync = true;
    take_one_of({"cta", "gpu", "sys", "cluster"}, &scope);
  }
  in_.space = take_space();
  take("nc");
  const bool hint = take("L2::cache_hint");
  mods_.erase(std::remove_if(mods_.begin(), mods_.end(), is_cache_hint), mods_.end());
  const int count = take("v4") ? 4 : take("v2") ? 2 : 1;
  const Type type = take_type();
  const size_t extra = hint ? 1 : 0;  // the cache policy
  need_operands(2 + extra, 2 + extra);
  if (in_.space == Space::kParam && !load) fail("unsupported space");
  static const char* const kSpaces[] = {"", ".global", ".shared", ".local", ".param"};
  opcode_ = base_ + kSpaces[static_cast<int>(in_.space)];
  const std::vector<std::string> parts = vector_parts(o[load ? 0 : 1]);
  if (parts.size() != static_cast<size_t>(count)) fail("expected as many registers as elements");
  int width = 4;
  for (const std::string& p : parts) {
    if (register_bytes(p) == 8 || bytes_of(type) == 8) width = 8;
  }
  if (load) {
    for (const std::string& p : parts) destination(p, width);
    address(o[1], &in_.imm);
    set(load_op(bytes_of(type), width, is_signed(type), count));
  } else {
    address(o[0], &in_.imm);
    for (const std::string& p : parts) source(p, width == 8 ? Type::kB64 : type);
    set(store_op(bytes_of(type), width, count));
    const bool sub_word = bytes_of(type) * count < 4;
    if (sub_word && (in_.space == Space::kShared || in_.space == Space::kGeneric)) {
      kernel_.bytewise_races = true;
    }
  }
}

void Decoder::atomic(bool red) {
  const std::vector<std::string>& o = s_->operands;
  std::string part;
  take_one_of({"acq_rel", "relaxed", "acquire", "release"}, &part);
  take_one_of({"cta", "gpu", "sys", "cluster"}, &part);
  in_.space = take_space();
  if (take("async")) fail("unsupported modifier .async");
  take("noftz");
  std::string op;
  static const char* const kOps[] = {"add", "min", "max", "inc",  "dec",
                                     "and", "or",  "xor", "exch", "cas"};
  for (uint8_t i = 0; i < 10; ++i) {
    if (take(kOps[i])) {
      op = kOps[i];
      in_.a = i;
    }
  }
  if (op.empty() || (red && in_.a >= 8)) fail("unsupported operation");
  const Type type = take_type();
  const bool hint = take("L2::cache_hint");
  const size_t n = (red ? 2 : 3) + (op == "cas" ? 1 : 0) + (hint ? 1 : 0);
  need_operands(n, n);
  opcode_ = base_ + (in_.space == Space::kShared ? ".shared" : ".global");
  in_.sync = true;
  size_t at = 0;
  if (!red) destination(o[at++], bytes_of(type));
  address(o[at++], &in_.imm);
  source(o[at++], type);
  if (op == "cas") source(o[at++], type);
  set(atomic_op(op, type, red));
}

void Decoder::async_copy() {
  const std::vector<std::string>& o = s_->operands;
  if (!take("async")) fail("unsupported copy");
  if (take("commit_group")) {
    opcode_ = "cp.async.commit_group";
    need_operands(0, 0);
    set(commit_op());
    return;
  }
  if (take("wait_group")) {
    opcode_ = "cp.async.wait_group";
    need_operands(1, 1);
    in_.imm = immediate(o[0]);
    set(wait_op());
    return;
  }
  if (take("wait_all")) {
    opcode_ = "cp.async.wait_all";
    need_operands(0, 0);
    in_.a = 1;
    set(wait_op());
    return;
  }
  opcode_ = "cp.async";
  if (!take("ca") && !take("cg")) fail("unsupported copy");
  if (!(take("shared") || take("shared::cta")) || !take("global")) fail("unsupported spaces");
  const bool hint = take("L2::cache_hint");
  mods_.erase(std::remove_if(mods_.begin(), mods_.end(), is_cache_hint), mods_.end());
  const size_t n = o.size() - (hint ? 1 : 0);
  if (n != 3 && n != 4) fail("expected 3 or 4 operands");
  const int64_t bytes = immediate(o[2]);
  if (bytes != 4 && bytes != 8 && bytes != 16) fail("expected 4, 8 or 16 bytes");
  in_.c = static_cast<uint8_t>(bytes);
  address(o[0], &in_.imm);
  address(o[1], &in_.imm2);
  if (n == 4) {
    in_.b = 1;
    source(o[3], Type::kU32);
  }
  set(copy_async_op());
}

}  // namespace ptxsim
