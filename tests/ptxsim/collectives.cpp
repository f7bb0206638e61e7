// SPDX-License-Identifier: Apache-2.0
// Shuffles, votes and reductions over a warp.

#include "collectives.h"

#include <cstring>

#include "lanes.h"

namespace ptxsim {
namespace {

template <int kMode>
void shfl(Warp& w, const Instr& in, uint32_t mask) {
  uint32_t from[kLanes];
  std::memcpy(from, data<uint32_t>(w, in.ops[2]), sizeof(from));
  const uint32_t undef = w.undef[in.ops[2].undef];
  const uint32_t* b = data<uint32_t>(w, in.ops[3]);
  const uint32_t* c = data<uint32_t>(w, in.ops[4]);
  const uint32_t bad = (w.undef[in.ops[3].undef] | w.undef[in.ops[4].undef]) & mask;
  if (bad != 0) {
    w.report(in, __builtin_ctz(bad), "uninitialised",
             "the lane of a shuffle is an undefined value");
  }
  const uint32_t* members = data<uint32_t>(w, in.ops[5]);
  uint32_t* d = data<uint32_t>(w, in.ops[0]);
  uint32_t out[kLanes];
  uint32_t valid = 0, undef_out = 0;
  for (int l = 0; l < kLanes; ++l) {
    if (!(mask >> l & 1)) continue;
    const int clamp = static_cast<int>(c[l] & 31), segment = static_cast<int>(c[l] >> 8 & 31);
    const int value = static_cast<int>(b[l] & 31);
    const int most = (l & segment) | (clamp & ~segment), least = l & segment;
    int j = l;
    bool p = false;
    switch (kMode) {
      case 0:
        j = least | (value & ~segment);
        p = j <= most;
        break;
      case 1:
        j = l - value;
        p = j >= most;
        break;
      case 2:
        j = l + value;
        p = j <= most;
        break;
      default:
        j = l ^ value;
        p = j <= most;
        break;
    }
    if (!p) j = l;
    valid |= static_cast<uint32_t>(p) << l;
    // A source that takes no part, because it is not a member or has returned, has no value.
    if (!(mask >> j & 1) || !(members[l] >> j & 1)) {
      w.report(in, l, "uninitialised",
               "a shuffle reads lane " + std::to_string(j) + ", which takes no part in it");
      undef_out |= 1u << l;
      out[l] = from[l];
      continue;
    }
    out[l] = from[j];
    undef_out |= (undef >> j & 1) << l;
  }
  for (int l = 0; l < kLanes; ++l) d[l] = mask >> l & 1 ? out[l] : d[l];
  set_undef(w, in.ops[0], mask, undef_out);
  set_predicate(w, in.ops[1], mask, valid, 0);
}

template <int kMode>
void vote(Warp& w, const Instr& in, uint32_t mask) {
  const uint32_t p = predicate(w, in.ops[1]) & mask;
  const uint32_t undef = (w.undef[in.ops[1].undef] & mask) != 0 ? kFull : 0;
  if (kMode == 3) {
    uint32_t* d = data<uint32_t>(w, in.ops[0]);
    for (int l = 0; l < kLanes; ++l) d[l] = mask >> l & 1 ? p : d[l];
    set_undef(w, in.ops[0], mask, undef);
    return;
  }
  const bool value = kMode == 0 ? p == mask : kMode == 1 ? p != 0 : p == 0 || p == mask;
  set_predicate(w, in.ops[0], mask, value ? kFull : 0, undef);
}

void activemask(Warp& w, const Instr& in, uint32_t mask) {
  uint32_t* d = data<uint32_t>(w, in.ops[0]);
  for (int l = 0; l < kLanes; ++l) d[l] = mask >> l & 1 ? mask : d[l];
  set_undef(w, in.ops[0], mask, 0);
}

enum class Reduce { kAdd, kMin, kMax, kAnd, kOr, kXor };

template <Reduce kOp, class T>
void redux(Warp& w, const Instr& in, uint32_t mask) {
  const uint32_t* a = data<uint32_t>(w, in.ops[1]);
  uint32_t total = 0;
  bool first = true;
  for (uint32_t m = mask; m != 0; m &= m - 1) {
    const uint32_t v = a[__builtin_ctz(m)];
    if (first) {
      total = v;
      first = false;
      continue;
    }
    const T x = static_cast<T>(total), y = static_cast<T>(v);
    switch (kOp) {
      case Reduce::kAdd:
        total += v;
        break;
      case Reduce::kMin:
        total = static_cast<uint32_t>(x < y ? x : y);
        break;
      case Reduce::kMax:
        total = static_cast<uint32_t>(x > y ? x : y);
        break;
      case Reduce::kAnd:
        total &= v;
        break;
      case Reduce::kOr:
        total |= v;
        break;
      case Reduce::kXor:
        total ^= v;
        break;
    }
  }
  const uint32_t undef = (w.undef[in.ops[1].undef] & mask) != 0 ? kFull : 0;
  uint32_t* d = data<uint32_t>(w, in.ops[0]);
  for (int l = 0; l < kLanes; ++l) d[l] = mask >> l & 1 ? total : d[l];
  set_undef(w, in.ops[0], mask, undef);
}

template <class T, bool kAll>
void match(Warp& w, const Instr& in, uint32_t mask) {
  T a[kLanes];
  std::memcpy(a, data<T>(w, in.ops[2]), sizeof(a));
  const uint32_t undef = (w.undef[in.ops[2].undef] & mask) != 0 ? kFull : 0;
  uint32_t* d = data<uint32_t>(w, in.ops[0]);
  uint32_t agreed = 0;
  for (int l = 0; l < kLanes; ++l) {
    if (!(mask >> l & 1)) continue;
    uint32_t same = 0;
    for (int j = 0; j < kLanes; ++j) same |= static_cast<uint32_t>(a[j] == a[l]) << j;
    same &= mask;
    if (kAll) same = same == mask ? mask : 0;
    d[l] = same;
    agreed |= static_cast<uint32_t>(same != 0) << l;
  }
  set_undef(w, in.ops[0], mask, undef);
  set_predicate(w, in.ops[1], mask, agreed, undef);
}

void warp_barrier(Warp&, const Instr&, uint32_t) {}

void movmatrix(Warp& w, const Instr& in, uint32_t) {
  uint32_t from[kLanes], out[kLanes] = {};
  std::memcpy(from, data<uint32_t>(w, in.ops[1]), sizeof(from));
  const uint32_t undef = w.undef[in.ops[1].undef];
  uint32_t undef_out = 0;
  for (int row = 0; row < 8; ++row) {
    for (int column = 0; column < 8; ++column) {
      const int at = 4 * row + column / 2, to = 4 * column + row / 2;
      const uint32_t v = from[at] >> (16 * (column & 1)) & 0xffff;
      out[to] |= v << (16 * (row & 1));
      undef_out |= (undef >> at & 1) << to;
    }
  }
  std::memcpy(data<uint32_t>(w, in.ops[0]), out, sizeof(out));
  w.undef[in.ops[0].undef] = undef_out;
}

}  // namespace

Fn shfl_op(int mode) {
  static const Fn kModes[] = {shfl<0>, shfl<1>, shfl<2>, shfl<3>};
  return kModes[mode];
}

Fn vote_op(int mode) {
  static const Fn kModes[] = {vote<0>, vote<1>, vote<2>, vote<3>};
  return kModes[mode];
}

Fn activemask_op() { return activemask; }

Fn redux_op(const std::string& op, Type type) {
  const bool sign = type == Type::kS32;
  if (op == "add") return redux<Reduce::kAdd, uint32_t>;
  if (op == "min") return sign ? redux<Reduce::kMin, int32_t> : redux<Reduce::kMin, uint32_t>;
  if (op == "max") return sign ? redux<Reduce::kMax, int32_t> : redux<Reduce::kMax, uint32_t>;
  if (op == "and") return redux<Reduce::kAnd, uint32_t>;
  if (op == "or") return redux<Reduce::kOr, uint32_t>;
  return op == "xor" ? redux<Reduce::kXor, uint32_t> : nullptr;
}

Fn match_op(bool all, Type type) {
  if (bytes_of(type) == 8) return all ? match<uint64_t, true> : match<uint64_t, false>;
  return all ? match<uint32_t, true> : match<uint32_t, false>;
}

Fn warp_barrier_op() { return warp_barrier; }
Fn movmatrix_op() { return movmatrix; }

}  // namespace ptxsim
