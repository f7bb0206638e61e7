// SPDX-License-Identifier: Apache-2.0
// ld, st, atom, red, cp.async, ldmatrix, cvta.

#include "memory_ops.h"

#include <cstring>

#include "counters.h"
#include "lanes.h"

namespace ptxsim {
namespace {

// Instr::d of loads and stores: volatile, relaxed, acquire or release.
template <class T, class R, int kCount>
void load(Warp& w, const Instr& in, uint32_t mask) {
  Access parts[4];
  const int n = resolve(w, in, in.ops[kCount], mask, sizeof(T) * kCount, Use::kLoad, parts);
  uint32_t reached = 0;
  for (int p = 0; p < n; ++p) {
    const Access& a = parts[p];
    reached |= a.mask;
    uint32_t dead = a.mask;
    const bool shared = a.space == Space::kShared;
    const uint32_t flying = shared ? check_in_flight(w, in, a, Use::kLoad) : 0;
    for (int i = 0; i < kCount; ++i) {
      const int at = i * static_cast<int>(sizeof(T));
      const uint32_t undef = undefined_lanes(w, a, at, sizeof(T)) & ~flying;
      dead &= undef;
      R* d = reinterpret_cast<R*>(w.files[0] + in.ops[i].offset);
      if (a.mask == kFull) {
        for (int l = 0; l < kLanes; ++l) {
          T v;
          std::memcpy(&v, a.at(l) + at, sizeof(T));
          d[l] = static_cast<R>(v);
        }
      } else {
        for (uint32_t m = a.mask; m != 0; m &= m - 1) {
          const int l = __builtin_ctz(m);
          T v;
          std::memcpy(&v, a.at(l) + at, sizeof(T));
          d[l] = static_cast<R>(v);
        }
      }
      set_undef(w, in.ops[i], a.mask, undef);
    }
    if (shared) check_races(w, in, a, Use::kLoad, in.d != 0, dead);
  }
  const uint32_t wild = mask & ~reached;  // reported: reads zeros
  if (wild != 0) {
    for (int i = 0; i < kCount; ++i) {
      R* d = reinterpret_cast<R*>(w.files[0] + in.ops[i].offset);
      for (int l = 0; l < kLanes; ++l) d[l] = wild >> l & 1 ? 0 : d[l];
      set_undef(w, in.ops[i], wild, 0);
    }
  }
}

template <class T, class R, int kCount>
void store(Warp& w, const Instr& in, uint32_t mask) {
  Access parts[4];
  const int n = resolve(w, in, in.ops[0], mask, sizeof(T) * kCount, Use::kStore, parts);
  for (int p = 0; p < n; ++p) {
    const Access& a = parts[p];
    if (a.space == Space::kParam) continue;
    if (a.space == Space::kShared) {
      check_in_flight(w, in, a, Use::kStore);
      check_races(w, in, a, Use::kStore, in.d != 0, 0);
    }
    for (int i = 0; i < kCount; ++i) {
      const int at = i * static_cast<int>(sizeof(T));
      const Operand& o = in.ops[1 + i];
      const R* from = reinterpret_cast<const R*>(w.files[o.file] + o.offset);
      const uint32_t undef = w.undef[o.undef] & a.mask;
      for (uint32_t m = a.mask; m != 0; m &= m - 1) {
        const int l = __builtin_ctz(m);
        const T v = static_cast<T>(from[l]);
        std::memcpy(a.at(l) + at, &v, sizeof(T));
      }
      if (undef != 0 && a.space == Space::kGlobal) {
        w.report(in, __builtin_ctz(undef), "uninitialised",
                 "stores an undefined value to global memory" +
                     (a.range != nullptr ? " (" + a.range->name + ")" : std::string()));
      }
      define(w, a, at, sizeof(T), undef);
    }
  }
}

// Counts one copy more or less on every byte of its target, four at once.
void count_flights(uint8_t* bytes, int count, bool more) {
  for (int i = 0; i < count; i += 4) {
    uint32_t four;
    std::memcpy(&four, bytes + i, 4);
    four = more ? four + 0x01010101u : four - 0x01010101u;
    std::memcpy(bytes + i, &four, 4);
  }
}

template <class T>
T atomic_result(int op, T old, T b, T c) {
  switch (op) {
    case 0:
      return static_cast<T>(old + b);
    case 1:
      return b < old ? b : old;
    case 2:
      return b > old ? b : old;
    case 3:
      return old >= b ? T(0) : static_cast<T>(old + 1);
    case 4:
      return old == 0 || old > b ? b : static_cast<T>(old - 1);
    case 5:
      if constexpr (std::is_integral_v<T>) return old & b;
      return old;
    case 6:
      if constexpr (std::is_integral_v<T>) return old | b;
      return old;
    case 7:
      if constexpr (std::is_integral_v<T>) return old ^ b;
      return old;
    case 8:
      return b;
    default:
      return old == b ? c : old;
  }
}

template <class H>
H half_sum(H a, H b) {
  return H{H::narrow(H::widen(a.bits) + H::widen(b.bits))};
}

template <class H>
struct PairOf {
  H low, high;
};

// Instr::a: 0 add, 1 min, 2 max, 3 inc, 4 dec, 5 and, 6 or, 7 xor, 8 exch, 9 cas.
// Ops: destination (none for red), address, b and, for cas, c.
template <class T, bool kRed>
void atomic(Warp& w, const Instr& in, uint32_t mask) {
  constexpr int kAddress = kRed ? 0 : 1;
  Access parts[4];
  const int n = resolve(w, in, in.ops[kAddress], mask, sizeof(T), Use::kAtomic, parts);
  const Operand& second = in.ops[kAddress + 1];
  const Operand& third = in.ops[in.a == 9 ? kAddress + 2 : kAddress + 1];
  const uint32_t bad = (w.undef[second.undef] | w.undef[third.undef]) & mask;
  if (bad != 0) {
    w.report(in, __builtin_ctz(bad), "uninitialised", "an atomic uses an undefined value");
  }
  Store<T> b[kLanes], c[kLanes], old[kLanes] = {};
  std::memcpy(b, data<T>(w, second), sizeof(b));
  std::memcpy(c, data<T>(w, third), sizeof(c));
  uint32_t undef_old = 0;
  for (int p = 0; p < n; ++p) {
    const Access& a = parts[p];
    const uint32_t undef = undefined_lanes(w, a, 0, sizeof(T));
    undef_old |= undef;
    if (undef != 0 && kRed) {
      w.report(in, __builtin_ctz(undef), "uninitialised", "an atomic updates undefined memory");
    }
    if (a.space == Space::kShared) {
      check_in_flight(w, in, a, Use::kAtomic);
      check_races(w, in, a, Use::kAtomic, true, 0);
    }
    for (uint32_t m = a.mask; m != 0; m &= m - 1) {
      const int l = __builtin_ctz(m);
      T value;
      std::memcpy(&value, a.at(l), sizeof(T));
      T next = value;
      if constexpr (std::is_same_v<T, Half> || std::is_same_v<T, Bfloat>) {
        next = half_sum(value, get<T>(b[l]));
        old[l] = value.bits;
      } else {
        next = atomic_result<T>(in.a, value, get<T>(b[l]), get<T>(c[l]));
        old[l] = put<T>(value);
      }
      std::memcpy(a.at(l), &next, sizeof(T));
    }
    define(w, a, 0, sizeof(T), undef);
  }
  if constexpr (!kRed) {
    Store<T>* d = data<T>(w, in.ops[0]);
    for (int l = 0; l < kLanes; ++l) d[l] = mask >> l & 1 ? old[l] : d[l];
    set_undef(w, in.ops[0], mask, undef_old);
  }
}

// add on a pair of halves.
template <class H, bool kRed>
void atomic_pair(Warp& w, const Instr& in, uint32_t mask) {
  constexpr int kAddress = kRed ? 0 : 1;
  Access parts[4];
  const int n = resolve(w, in, in.ops[kAddress], mask, 4, Use::kAtomic, parts);
  const Operand& second = in.ops[kAddress + 1];
  const uint32_t bad = w.undef[second.undef] & mask;
  if (bad != 0) {
    w.report(in, __builtin_ctz(bad), "uninitialised", "an atomic uses an undefined value");
  }
  uint32_t b[kLanes], old[kLanes] = {};
  std::memcpy(b, data<uint32_t>(w, second), sizeof(b));
  for (int p = 0; p < n; ++p) {
    const Access& a = parts[p];
    if (a.space == Space::kShared) {
      check_in_flight(w, in, a, Use::kAtomic);
      check_races(w, in, a, Use::kAtomic, true, 0);
    }
    for (uint32_t m = a.mask; m != 0; m &= m - 1) {
      const int l = __builtin_ctz(m);
      std::memcpy(&old[l], a.at(l), 4);
      PairOf<H> x = bit_cast<PairOf<H>>(old[l]);
      const PairOf<H> y = bit_cast<PairOf<H>>(b[l]);
      x.low = half_sum(x.low, y.low);
      x.high = half_sum(x.high, y.high);
      std::memcpy(a.at(l), &x, 4);
    }
    define(w, a, 0, 4, 0);
  }
  if constexpr (!kRed) {
    uint32_t* d = data<uint32_t>(w, in.ops[0]);
    for (int l = 0; l < kLanes; ++l) d[l] = mask >> l & 1 ? old[l] : d[l];
    set_undef(w, in.ops[0], mask, 0);
  }
}

// Instr::c: bytes; ops: shared address, global address, optional source size. Instr::b is its
// presence. The source is read here; it lands when a wait covers it.
void copy_async(Warp& w, const Instr& in, uint32_t mask) {
  const int bytes = in.c;
  uint32_t target[kLanes];
  {
    const uint32_t undef = w.undef[in.ops[0].undef] & mask;
    if (undef != 0) {
      w.report(in, __builtin_ctz(undef), "uninitialised", "the address is an undefined value");
      mask &= ~undef;
    }
    for (int l = 0; l < kLanes; ++l) {
      const uint64_t base =
          in.ops[0].bytes == 8 ? data<uint64_t>(w, in.ops[0])[l] : data<uint32_t>(w, in.ops[0])[l];
      target[l] = static_cast<uint32_t>(base + static_cast<uint64_t>(in.imm));
      if (!(mask >> l & 1)) continue;
      const char* kind = nullptr;
      if (target[l] % static_cast<uint32_t>(bytes) != 0) kind = "misaligned";
      if (target[l] + static_cast<int64_t>(bytes) > w.launch->shared_bytes) kind = "out-of-bounds";
      if (kind == nullptr) continue;
      w.report(in, l, kind,
               "copies " + std::to_string(bytes) + " bytes to shared offset " +
                   std::to_string(target[l]) + " of " + std::to_string(w.launch->shared_bytes));
      mask &= ~(1u << l);
    }
  }
  uint32_t size[kLanes];
  uint32_t reads = mask;
  for (int l = 0; l < kLanes; ++l) {
    size[l] = static_cast<uint32_t>(bytes);
    if (in.b != 0) {
      const uint32_t asked = data<uint32_t>(w, in.ops[2])[l];
      size[l] = asked < size[l] ? asked : size[l];
    }
    if (size[l] == 0) reads &= ~(1u << l);
  }
  if (in.b != 0 && (w.undef[in.ops[2].undef] & mask) != 0) {
    w.report(in, __builtin_ctz(w.undef[in.ops[2].undef] & mask), "uninitialised",
             "the source size of a copy is an undefined value");
  }
  Access parts[4];
  Instr from = in;
  from.space = Space::kGlobal;
  from.imm = in.imm2;
  const int n = reads != 0 ? resolve(w, from, in.ops[1], reads, bytes, Use::kCopy, parts) : 0;
  SharedMemory& s = w.block->shared;
  // Only whole sources are looked up together; shorter ones lane by lane.
  uint32_t reached = 0, undef = 0;
  for (int p = 0; p < n; ++p) {
    reached |= parts[p].mask;
    if (in.b == 0) {
      undef |= undefined_lanes(w, parts[p], 0, bytes);
      continue;
    }
    Access one = parts[p];
    for (uint32_t m = parts[p].mask; m != 0; m &= m - 1) {
      one.mask = m & (0 - m);
      undef |= undefined_lanes(w, one, 0, static_cast<int>(size[__builtin_ctz(m)]));
    }
  }
  w.open.reserve(w.open.size() + kLanes);
  for (uint32_t m = mask; m != 0; m &= m - 1) {
    const int l = __builtin_ctz(m);
    Copy copy;
    copy.address = target[l];
    copy.bytes = static_cast<uint8_t>(bytes);
    copy.lane = static_cast<uint8_t>(l);
    copy.defined = !(undef >> l & 1);
    // Global addresses are the host's.
    if (reached >> l & 1) std::memcpy(copy.data, parts[0].at(l), size[l]);
    if (w.launch->config->checks && s.in_flight[copy.address] != 0) {
      w.report(in, l, "in-flight",
               "copies to shared offset " + std::to_string(copy.address) +
                   ", the target of another cp.async that was not waited for");
    }
    count_flights(s.in_flight.data() + copy.address, bytes, true);
    s.flying += bytes;
    w.open.push_back(copy);
  }
}

void commit(Warp& w, const Instr&, uint32_t) {
  w.committed.push_back(std::move(w.open));
  w.open.clear();
}

void wait(Warp& w, const Instr& in, uint32_t) {
  if (in.a != 0) {  // wait_all
    w.committed.push_back(std::move(w.open));
    w.open.clear();
  }
  land_copies(w, in, static_cast<size_t>(in.imm));
}

// Instr::a matrices (1, 2, 4), Instr::b transposed.
void ldmatrix(Warp& w, const Instr& in, uint32_t) {
  const int count = in.a;
  const uint32_t lanes = count == 4 ? kFull : (1u << 8 * count) - 1;
  Access parts[4];
  const int n = resolve(w, in, in.ops[count], lanes, 16, Use::kLoad, parts);
  uint32_t out[4][kLanes] = {};
  uint32_t undef[4] = {};
  for (int p = 0; p < n; ++p) {
    const Access& a = parts[p];
    if (a.space != Space::kShared) {
      w.report(in, __builtin_ctz(a.mask), "out-of-bounds", "ldmatrix reads outside shared memory");
      continue;
    }
    uint32_t dead = a.mask;
    const uint32_t flying = check_in_flight(w, in, a, Use::kLoad);
    for (int piece = 0; piece < 4; ++piece) {  // four bytes of each row: two columns
      const uint32_t bad = undefined_lanes(w, a, 4 * piece, 4) & ~flying;
      dead &= bad;
      for (uint32_t m = a.mask; m != 0; m &= m - 1) {
        const int lane = __builtin_ctz(m);
        const int matrix = lane / 8, row = lane % 8;
        uint16_t two[2];
        std::memcpy(two, a.at(lane) + 4 * piece, 4);
        for (int e = 0; e < 2; ++e) {
          const int column = 2 * piece + e;
          const int r = in.b ? column : row, c = in.b ? row : column;
          const int to = 4 * r + c / 2;
          out[matrix][to] |= static_cast<uint32_t>(two[e]) << (16 * (c & 1));
          undef[matrix] |= (bad >> lane & 1) << to;
        }
      }
    }
    check_races(w, in, a, Use::kLoad, false, dead);
  }
  for (int i = 0; i < count; ++i) {
    std::memcpy(data<uint32_t>(w, in.ops[i]), out[i], sizeof(out[i]));
    w.undef[in.ops[i].undef] = undef[i];
  }
}

template <uint64_t kWindow, bool kTo>
struct Cvta {
  static uint64_t apply(uint64_t a) { return kTo ? a - kWindow : a + kWindow; }
};

template <int kWindow>
void isspacep(Warp& w, const Instr& in, uint32_t mask) {
  uint32_t value = 0;
  const uint64_t* a = data<uint64_t>(w, in.ops[1]);
  for (int l = 0; l < kLanes; ++l) value |= static_cast<uint32_t>(a[l] >> 56 == kWindow) << l;
  set_predicate(w, in.ops[0], mask, value, w.undef[in.ops[1].undef]);
}

template <class T, class R>
Fn load_count(int count) {
  return count == 1 ? load<T, R, 1> : count == 2 ? load<T, R, 2> : load<T, R, 4>;
}

template <class T, class R>
Fn store_count(int count) {
  return count == 1 ? store<T, R, 1> : count == 2 ? store<T, R, 2> : store<T, R, 4>;
}

template <bool kRed>
Fn atomic_type(const std::string& op, Type t) {
  switch (t) {
    case Type::kU32:
    case Type::kB32:
      return atomic<uint32_t, kRed>;
    case Type::kS32:
      return atomic<int32_t, kRed>;
    case Type::kU64:
    case Type::kB64:
      return atomic<uint64_t, kRed>;
    case Type::kS64:
      return atomic<int64_t, kRed>;
    case Type::kB16:
      return op == "cas" || op == "exch" ? atomic<uint16_t, kRed> : nullptr;
    case Type::kF32:
      return op == "add" || op == "exch" ? atomic<float, kRed> : nullptr;
    case Type::kF64:
      return op == "add" ? atomic<double, kRed> : nullptr;
    case Type::kF16:
      return op == "add" ? atomic<Half, kRed> : nullptr;
    case Type::kBf16:
      return op == "add" ? atomic<Bfloat, kRed> : nullptr;
    case Type::kF16x2:
      return op == "add" ? atomic_pair<Half, kRed> : nullptr;
    case Type::kBf16x2:
      return op == "add" ? atomic_pair<Bfloat, kRed> : nullptr;
    default:
      return nullptr;
  }
}

}  // namespace

void land_copies(Warp& w, const Instr& in, size_t keep) {
  SharedMemory& s = w.block->shared;
  while (w.committed.size() > keep) {
    for (const Copy& copy : w.committed.front()) {
      const size_t at = copy.address, n = copy.bytes;
      count_flights(s.in_flight.data() + at, copy.bytes, false);
      s.flying -= copy.bytes;
      std::memcpy(s.bytes.data() + at, copy.data, n);
      std::memset(s.defined.data() + at, copy.defined ? 1 : 0, n);
      if (w.launch->config->checks) note_shared(w, in, copy.lane, at, copy.bytes, true, false);
    }
    w.committed.pop_front();
  }
}

Fn load_op(int bytes, int register_bytes, bool sign, int count) {
  const bool wide = register_bytes == 8;
  if (count != 1 && count != 2 && count != 4) return nullptr;
  switch (bytes) {
    case 1:
      if (sign)
        return wide ? load_count<int8_t, uint64_t>(count) : load_count<int8_t, uint32_t>(count);
      return wide ? load_count<uint8_t, uint64_t>(count) : load_count<uint8_t, uint32_t>(count);
    case 2:
      if (sign)
        return wide ? load_count<int16_t, uint64_t>(count) : load_count<int16_t, uint32_t>(count);
      return wide ? load_count<uint16_t, uint64_t>(count) : load_count<uint16_t, uint32_t>(count);
    case 4:
      if (sign)
        return wide ? load_count<int32_t, uint64_t>(count) : load_count<int32_t, uint32_t>(count);
      return wide ? load_count<uint32_t, uint64_t>(count) : load_count<uint32_t, uint32_t>(count);
    case 8:
      return wide ? load_count<uint64_t, uint64_t>(count) : nullptr;
    default:
      return nullptr;
  }
}

Fn store_op(int bytes, int register_bytes, int count) {
  const bool wide = register_bytes == 8;
  if (count != 1 && count != 2 && count != 4) return nullptr;
  switch (bytes) {
    case 1:
      return wide ? store_count<uint8_t, uint64_t>(count) : store_count<uint8_t, uint32_t>(count);
    case 2:
      return wide ? store_count<uint16_t, uint64_t>(count) : store_count<uint16_t, uint32_t>(count);
    case 4:
      return wide ? store_count<uint32_t, uint64_t>(count) : store_count<uint32_t, uint32_t>(count);
    case 8:
      return wide ? store_count<uint64_t, uint64_t>(count) : nullptr;
    default:
      return nullptr;
  }
}

Fn atomic_op(const std::string& op, Type type, bool red) {
  return red ? atomic_type<true>(op, type) : atomic_type<false>(op, type);
}

Fn copy_async_op() { return copy_async; }
Fn commit_op() { return commit; }
Fn wait_op() { return wait; }
Fn ldmatrix_op() { return ldmatrix; }

Fn cvta_op(Space space, bool to) {
  switch (space) {
    case Space::kGlobal:
      return unary<Cvta<0, true>, uint64_t, uint64_t>;
    case Space::kShared:
      return to ? unary<Cvta<kSharedWindow, true>, uint64_t, uint64_t>
                : unary<Cvta<kSharedWindow, false>, uint64_t, uint64_t>;
    case Space::kLocal:
      return to ? unary<Cvta<kLocalWindow, true>, uint64_t, uint64_t>
                : unary<Cvta<kLocalWindow, false>, uint64_t, uint64_t>;
    case Space::kParam:
      return to ? unary<Cvta<kParamWindow, true>, uint64_t, uint64_t>
                : unary<Cvta<kParamWindow, false>, uint64_t, uint64_t>;
    default:
      return nullptr;
  }
}

Fn isspacep_op(Space space) {
  switch (space) {
    case Space::kGlobal:
      return isspacep<0>;
    case Space::kShared:
      return isspacep<1>;
    case Space::kLocal:
      return isspacep<2>;
    default:
      return nullptr;
  }
}

}  // namespace ptxsim
