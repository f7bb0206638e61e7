// SPDX-License-Identifier: Apache-2.0
// Integer, logic and bit-field instructions.

#include "alu.h"
#include "lanes.h"

namespace ptxsim {
namespace {

template <class T>
using U = std::make_unsigned_t<T>;
// Twice the width, for mul.hi and mul.wide.
__extension__ typedef __int128 Int128;
__extension__ typedef unsigned __int128 Uint128;
template <class T>
using Wide = std::conditional_t<
    sizeof(T) == 8, std::conditional_t<std::is_signed_v<T>, Int128, Uint128>,
    std::conditional_t<sizeof(T) == 4, std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>,
                       std::conditional_t<std::is_signed_v<T>, int32_t, uint32_t>>>;
template <class T>
constexpr int kBits = 8 * static_cast<int>(sizeof(T));

// Arithmetic in at least 32 unsigned bits: no signed overflow, no promotion to int.
template <class T>
using Raw = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;

struct Add {
  template <class T>
  static T apply(T a, T b) {
    return static_cast<T>(Raw<T>(a) + Raw<T>(b));
  }
};
struct Sub {
  template <class T>
  static T apply(T a, T b) {
    return static_cast<T>(Raw<T>(a) - Raw<T>(b));
  }
};
struct MulLo {
  template <class T>
  static T apply(T a, T b) {
    return static_cast<T>(Raw<T>(a) * Raw<T>(b));
  }
};
struct MulHi {
  template <class T>
  static T apply(T a, T b) {
    return static_cast<T>((static_cast<Wide<T>>(a) * static_cast<Wide<T>>(b)) >> kBits<T>);
  }
};
struct MulWide {
  template <class T>
  static Wide<T> apply(T a, T b) {
    return static_cast<Wide<T>>(a) * static_cast<Wide<T>>(b);
  }
};
struct MadLo {
  template <class T>
  static T apply(T a, T b, T c) {
    return Add::apply(MulLo::apply(a, b), c);
  }
};
struct MadHi {
  template <class T>
  static T apply(T a, T b, T c) {
    return Add::apply(MulHi::apply(a, b), c);
  }
};
struct MadWide {
  template <class T>
  static Wide<T> apply(T a, T b, Wide<T> c) {
    return Add::apply(MulWide::apply(a, b), c);
  }
};
struct Div {  // by zero: all ones, as devices do
  template <class T>
  static T apply(T a, T b) {
    if (b == 0) return static_cast<T>(~U<T>(0));
    if (std::is_signed_v<T> && b == static_cast<T>(-1)) return Sub::apply(T(0), a);
    return static_cast<T>(a / b);
  }
};
struct Rem {
  template <class T>
  static T apply(T a, T b) {
    if (b == 0) return a;
    if (std::is_signed_v<T> && b == static_cast<T>(-1)) return 0;
    return static_cast<T>(a % b);
  }
};
struct Min {
  template <class T>
  static T apply(T a, T b) {
    return a < b ? a : b;
  }
};
struct Max {
  template <class T>
  static T apply(T a, T b) {
    return a > b ? a : b;
  }
};
struct Sad {
  template <class T>
  static T apply(T a, T b, T c) {
    return Add::apply(c, a > b ? Sub::apply(a, b) : Sub::apply(b, a));
  }
};
struct Neg {
  template <class T>
  static T apply(T a) {
    return Sub::apply(T(0), a);
  }
};
struct Abs {
  template <class T>
  static T apply(T a) {
    return a < 0 ? Sub::apply(T(0), a) : a;
  }
};
struct And {
  template <class T>
  static T apply(T a, T b) {
    return a & b;
  }
};
struct Or {
  template <class T>
  static T apply(T a, T b) {
    return a | b;
  }
};
struct Xor {
  template <class T>
  static T apply(T a, T b) {
    return a ^ b;
  }
};
struct Not {
  template <class T>
  static T apply(T a) {
    return static_cast<T>(~a);
  }
};
struct Cnot {
  template <class T>
  static T apply(T a) {
    return a == 0;
  }
};
struct Mov {
  template <class T>
  static T apply(T a) {
    return a;
  }
};
struct Shl {
  template <class T>
  static T apply(T a, uint32_t n) {
    return n >= kBits<T> ? T(0) : static_cast<T>(Raw<T>(a) << (n & (kBits<T> - 1)));
  }
};
struct Shr {
  template <class T>
  static T apply(T a, uint32_t n) {
    const T shifted = static_cast<T>(a >> (n & (kBits<T> - 1)));
    return n >= kBits<T> ? (a < 0 ? static_cast<T>(-1) : T(0)) : shifted;
  }
};
struct Popc {
  template <class T>
  static uint32_t apply(T a) {
    return static_cast<uint32_t>(__builtin_popcountll(a));
  }
};
struct Clz {
  template <class T>
  static uint32_t apply(T a) {
    if (a == 0) return kBits<T>;
    return static_cast<uint32_t>(__builtin_clzll(a)) - (64 - kBits<T>);
  }
};
struct Brev {
  template <class T>
  static T apply(T a) {
    T r = 0;
    for (int i = 0; i < kBits<T>; ++i) r |= (a >> i & 1) << (kBits<T> - 1 - i);
    return r;
  }
};
template <bool kShift>
struct Bfind {
  template <class T>
  static uint32_t apply(T a) {
    U<T> v = static_cast<U<T>>(a);
    if (std::is_signed_v<T> && a < 0) v = static_cast<U<T>>(~v);
    if (v == 0) return kFull;
    const uint32_t top = kBits<T> - 1 - Clz::apply(v);
    return kShift ? kBits<T> - 1 - top : top;
  }
};
struct Bfe {
  template <class T>
  static T apply(T a, uint32_t position, uint32_t length) {
    const int pos = static_cast<int>(position & 0xff), len = static_cast<int>(length & 0xff);
    constexpr int kTop = kBits<T> - 1;
    bool sign = false;
    if (std::is_signed_v<T> && len != 0) {
      const int at = pos + len - 1 < kTop ? pos + len - 1 : kTop;
      sign = static_cast<U<T>>(a) >> at & 1;
    }
    U<T> out = sign ? ~U<T>(0) : U<T>(0);
    const int count = len < kBits<T> ? len : kBits<T>;
    if (count == 0) return 0;
    U<T> field = pos <= kTop ? static_cast<U<T>>(a) >> pos : 0;
    const int present = pos <= kTop ? kBits<T> - pos : 0;
    if (present < kBits<T> && sign) field |= ~U<T>(0) << present % kBits<T>;
    if (present == 0) field = out;
    const U<T> keep = count == kBits<T> ? ~U<T>(0) : (U<T>(1) << count) - 1;
    return static_cast<T>((field & keep) | (out & ~keep));
  }
};

// d = b with the low bits of a put in at a position: ops d, a, b, position, length.
template <class T>
void bfi(Warp& w, const Instr& in, uint32_t mask) {
  const T* a = data<T>(w, in.ops[1]);
  const T* b = data<T>(w, in.ops[2]);
  const uint32_t* position = data<uint32_t>(w, in.ops[3]);
  const uint32_t* length = data<uint32_t>(w, in.ops[4]);
  T* d = data<T>(w, in.ops[0]);
  uint32_t undef = 0;
  for (int i = 1; i <= 4; ++i) undef |= w.undef[in.ops[i].undef];
  for (int l = 0; l < kLanes; ++l) {
    if (!(mask >> l & 1)) continue;
    const uint32_t pos = position[l] & 0xff, len = length[l] & 0xff;
    T field = len >= kBits<T> ? ~T(0) : (T(1) << len) - 1;
    field = pos >= kBits<T> ? T(0) : field << pos;
    const T moved = pos >= kBits<T> ? T(0) : a[l] << pos;
    d[l] = (b[l] & ~field) | (moved & field);
  }
  set_undef(w, in.ops[0], mask, undef);
}

template <class T>
void selp(Warp& w, const Instr& in, uint32_t mask) {
  const uint32_t p = predicate(w, in.ops[3]);
  const uint32_t undef =
      w.undef[in.ops[3].undef] | (p & w.undef[in.ops[1].undef]) | (~p & w.undef[in.ops[2].undef]);
  const T* a = data<T>(w, in.ops[1]);
  const T* b = data<T>(w, in.ops[2]);
  T* d = data<T>(w, in.ops[0]);
  if (mask == kFull) {
#pragma GCC ivdep
    for (int l = 0; l < kLanes; ++l) d[l] = p >> l & 1 ? a[l] : b[l];
  } else {
    for (int l = 0; l < kLanes; ++l) {
      if (mask >> l & 1) d[l] = p >> l & 1 ? a[l] : b[l];
    }
  }
  set_undef(w, in.ops[0], mask, undef);
}

template <bool kLeft, bool kWrap>
struct Shf {
  static uint32_t apply(uint32_t low, uint32_t high, uint32_t count) {
    const uint32_t n = kWrap ? count & 31 : (count < 32 ? count : 32);
    const uint64_t pair = static_cast<uint64_t>(high) << 32 | low;
    return static_cast<uint32_t>(kLeft ? pair << n >> 32 : pair >> n);
  }
};

void lop3(Warp& w, const Instr& in, uint32_t mask) {
  const uint32_t* a = data<uint32_t>(w, in.ops[1]);
  const uint32_t* b = data<uint32_t>(w, in.ops[2]);
  const uint32_t* c = data<uint32_t>(w, in.ops[3]);
  uint32_t* d = data<uint32_t>(w, in.ops[0]);
  uint32_t undef = w.undef[in.ops[1].undef] | w.undef[in.ops[2].undef] | w.undef[in.ops[3].undef];
  uint32_t out[kLanes];
  uint32_t row[8];  // the table's row as a mask
  for (int i = 0; i < 8; ++i) row[i] = in.imm >> i & 1 ? kFull : 0;
  for (int l = 0; l < kLanes; ++l) {  // a selects between tables of b and c
    const uint32_t x = a[l], y = b[l], z = c[l];
    const uint32_t low =
        (~y & ((~z & row[0]) | (z & row[1]))) | (y & ((~z & row[2]) | (z & row[3])));
    const uint32_t high =
        (~y & ((~z & row[4]) | (z & row[5]))) | (y & ((~z & row[6]) | (z & row[7])));
    out[l] = (~x & low) | (x & high);
  }
  for (int l = 0; l < kLanes; ++l) d[l] = mask >> l & 1 ? out[l] : d[l];
  set_undef(w, in.ops[0], mask, undef);
}

template <int kMode>
struct Prmt {
  static uint32_t apply(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
    uint32_t out = 0;
    for (uint32_t i = 0; i < 4; ++i) {
      const uint32_t s = selector & 3;
      uint32_t from = 0;
      switch (kMode) {
        case 0:
          from = selector >> (4 * i) & 0xf;
          break;
        case 1:  // f4e
          from = s + i;
          break;
        case 2:  // b4e
          from = (s - i) & 7;
          break;
        case 3:  // rc8
          from = s;
          break;
        case 4:  // ecl
          from = i < s ? s : i;
          break;
        case 5:  // ecr
          from = i < s ? i : s;
          break;
        default:  // rc16
          from = (s & 1) * 2 + (i & 1);
          break;
      }
      uint32_t byte = static_cast<uint32_t>(bytes >> (8 * (from & 7))) & 0xff;
      if (kMode == 0 && (from & 8)) byte = byte & 0x80 ? 0xff : 0;
      out |= byte << (8 * i);
    }
    return out;
  }
};

template <bool kA, bool kB>
struct Dp4a {
  static uint32_t apply(uint32_t a, uint32_t b, uint32_t c) {
    for (int i = 0; i < 4; ++i) {
      const int32_t x = kA ? static_cast<int8_t>(a >> 8 * i) : static_cast<uint8_t>(a >> 8 * i);
      const int32_t y = kB ? static_cast<int8_t>(b >> 8 * i) : static_cast<uint8_t>(b >> 8 * i);
      c += static_cast<uint32_t>(x * y);
    }
    return c;
  }
};

template <class F>
Fn by_type(Type t) {
  switch (t) {
    case Type::kU16:
    case Type::kB16:
      return binary<F, uint16_t, uint16_t, uint16_t>;
    case Type::kS16:
      return binary<F, int16_t, int16_t, int16_t>;
    case Type::kU32:
    case Type::kB32:
      return binary<F, uint32_t, uint32_t, uint32_t>;
    case Type::kS32:
      return binary<F, int32_t, int32_t, int32_t>;
    case Type::kU64:
    case Type::kB64:
      return binary<F, uint64_t, uint64_t, uint64_t>;
    case Type::kS64:
      return binary<F, int64_t, int64_t, int64_t>;
    default:
      return nullptr;
  }
}

// The result and a third operand of another width, where the operation has them.
template <class F, class T>
Fn unary_of() {
  return unary<F, T, T>;
}

template <class F>
Fn by_type_unary(Type t) {
  switch (t) {
    case Type::kU16:
    case Type::kB16:
      return unary_of<F, uint16_t>();
    case Type::kS16:
      return unary_of<F, int16_t>();
    case Type::kU32:
    case Type::kB32:
      return unary_of<F, uint32_t>();
    case Type::kS32:
      return unary_of<F, int32_t>();
    case Type::kU64:
    case Type::kB64:
      return unary_of<F, uint64_t>();
    case Type::kS64:
      return unary_of<F, int64_t>();
    default:
      return nullptr;
  }
}

template <class F>
Fn by_type_ternary(Type t) {
  switch (t) {
    case Type::kU16:
      return ternary<F, uint16_t, uint16_t, uint16_t, uint16_t>;
    case Type::kS16:
      return ternary<F, int16_t, int16_t, int16_t, int16_t>;
    case Type::kU32:
      return ternary<F, uint32_t, uint32_t, uint32_t, uint32_t>;
    case Type::kS32:
      return ternary<F, int32_t, int32_t, int32_t, int32_t>;
    case Type::kU64:
      return ternary<F, uint64_t, uint64_t, uint64_t, uint64_t>;
    case Type::kS64:
      return ternary<F, int64_t, int64_t, int64_t, int64_t>;
    default:
      return nullptr;
  }
}

template <class F>
Fn shift(Type t) {
  switch (t) {
    case Type::kU16:
    case Type::kB16:
      return binary<F, uint16_t, uint16_t, uint32_t>;
    case Type::kS16:
      return binary<F, int16_t, int16_t, uint32_t>;
    case Type::kU32:
    case Type::kB32:
      return binary<F, uint32_t, uint32_t, uint32_t>;
    case Type::kS32:
      return binary<F, int32_t, int32_t, uint32_t>;
    case Type::kU64:
    case Type::kB64:
      return binary<F, uint64_t, uint64_t, uint32_t>;
    case Type::kS64:
      return binary<F, int64_t, int64_t, uint32_t>;
    default:
      return nullptr;
  }
}

template <class F>
Fn counting(Type t) {  // a 32-bit result
  switch (t) {
    case Type::kB32:
    case Type::kU32:
      return unary<F, uint32_t, uint32_t>;
    case Type::kB64:
    case Type::kU64:
      return unary<F, uint32_t, uint64_t>;
    default:
      return nullptr;
  }
}

template <class F>
Fn finding(Type t) {
  if (t == Type::kS32) return unary<F, uint32_t, int32_t>;
  if (t == Type::kS64) return unary<F, uint32_t, int64_t>;
  return counting<F>(t);
}

Fn wide(Type t, bool mad) {
  switch (t) {
    case Type::kU16:
      return mad ? ternary<MadWide, uint32_t, uint16_t, uint16_t, uint32_t>
                 : binary<MulWide, uint32_t, uint16_t, uint16_t>;
    case Type::kS16:
      return mad ? ternary<MadWide, int32_t, int16_t, int16_t, int32_t>
                 : binary<MulWide, int32_t, int16_t, int16_t>;
    case Type::kU32:
      return mad ? ternary<MadWide, uint64_t, uint32_t, uint32_t, uint64_t>
                 : binary<MulWide, uint64_t, uint32_t, uint32_t>;
    case Type::kS32:
      return mad ? ternary<MadWide, int64_t, int32_t, int32_t, int64_t>
                 : binary<MulWide, int64_t, int32_t, int32_t>;
    default:
      return nullptr;
  }
}

Fn bfe(Type t) {
  switch (t) {
    case Type::kU32:
      return ternary<Bfe, uint32_t, uint32_t, uint32_t, uint32_t>;
    case Type::kS32:
      return ternary<Bfe, int32_t, int32_t, uint32_t, uint32_t>;
    case Type::kU64:
      return ternary<Bfe, uint64_t, uint64_t, uint32_t, uint32_t>;
    case Type::kS64:
      return ternary<Bfe, int64_t, int64_t, uint32_t, uint32_t>;
    default:
      return nullptr;
  }
}

}  // namespace

Fn integer_op(const std::string& op, Type type) {
  if (op == "add") return by_type<Add>(type);
  if (op == "sub") return by_type<Sub>(type);
  if (op == "mul.lo") return by_type<MulLo>(type);
  if (op == "mul.hi") return by_type<MulHi>(type);
  if (op == "mul.wide") return wide(type, false);
  if (op == "mad.lo") return by_type_ternary<MadLo>(type);
  if (op == "mad.hi") return by_type_ternary<MadHi>(type);
  if (op == "mad.wide") return wide(type, true);
  if (op == "sad") return by_type_ternary<Sad>(type);
  if (op == "div") return by_type<Div>(type);
  if (op == "rem") return by_type<Rem>(type);
  if (op == "min") return by_type<Min>(type);
  if (op == "max") return by_type<Max>(type);
  if (op == "neg") return is_signed(type) ? by_type_unary<Neg>(type) : nullptr;
  if (op == "abs") return is_signed(type) ? by_type_unary<Abs>(type) : nullptr;
  if (op == "and") return by_type<And>(type);
  if (op == "or") return by_type<Or>(type);
  if (op == "xor") return by_type<Xor>(type);
  if (op == "not") return by_type_unary<Not>(type);
  if (op == "cnot") return by_type_unary<Cnot>(type);
  if (op == "mov")
    return bytes_of(type) == 8 ? unary<Mov, uint64_t, uint64_t> : unary<Mov, uint32_t, uint32_t>;
  if (op == "shl") return shift<Shl>(type);
  if (op == "shr") return shift<Shr>(type);
  if (op == "popc") return counting<Popc>(type);
  if (op == "clz") return counting<Clz>(type);
  if (op == "brev") {
    if (type == Type::kB32) return unary<Brev, uint32_t, uint32_t>;
    return type == Type::kB64 ? unary<Brev, uint64_t, uint64_t> : nullptr;
  }
  if (op == "bfind") return finding<Bfind<false>>(type);
  if (op == "bfind.shiftamt") return finding<Bfind<true>>(type);
  if (op == "bfe") return bfe(type);
  if (op == "bfi") {
    if (type == Type::kB32) return bfi<uint32_t>;
    return type == Type::kB64 ? bfi<uint64_t> : nullptr;
  }
  if (op == "selp") return bytes_of(type) == 8 ? selp<uint64_t> : selp<uint32_t>;
  return nullptr;
}

Fn shf_op(bool left, bool wrap) {
  using T = uint32_t;
  if (left)
    return wrap ? ternary<Shf<true, true>, T, T, T, T> : ternary<Shf<true, false>, T, T, T, T>;
  return wrap ? ternary<Shf<false, true>, T, T, T, T> : ternary<Shf<false, false>, T, T, T, T>;
}

Fn lop3_op() { return lop3; }

Fn prmt_op(int mode) {
  using T = uint32_t;
  static const Fn kModes[] = {ternary<Prmt<0>, T, T, T, T>, ternary<Prmt<1>, T, T, T, T>,
                              ternary<Prmt<2>, T, T, T, T>, ternary<Prmt<3>, T, T, T, T>,
                              ternary<Prmt<4>, T, T, T, T>, ternary<Prmt<5>, T, T, T, T>,
                              ternary<Prmt<6>, T, T, T, T>};
  return kModes[mode];
}

Fn dp4a_op(bool a_signed, bool b_signed) {
  using T = uint32_t;
  if (a_signed) {
    return b_signed ? ternary<Dp4a<true, true>, T, T, T, T>
                    : ternary<Dp4a<true, false>, T, T, T, T>;
  }
  return b_signed ? ternary<Dp4a<false, true>, T, T, T, T>
                  : ternary<Dp4a<false, false>, T, T, T, T>;
}

}  // namespace ptxsim
