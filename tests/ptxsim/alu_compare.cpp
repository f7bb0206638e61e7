// SPDX-License-Identifier: Apache-2.0
// setp and the logic of predicates.

#include "alu.h"
#include "lanes.h"

namespace ptxsim {
namespace {

uint32_t combine(Warp& w, const Instr& in, uint32_t value, uint32_t* undef) {
  if (in.a == 0) return value;
  const uint32_t other = predicate(w, in.ops[4]);
  *undef |= w.undef[in.ops[4].undef];
  return in.a == 1 ? value & other : in.a == 2 ? value | other : value ^ other;
}

// PTX: p = compare op c, q = !compare op c.
template <class F, class T>
void setp(Warp& w, const Instr& in, uint32_t mask) {
  const Store<T>* a = data<T>(w, in.ops[2]);
  const Store<T>* b = data<T>(w, in.ops[3]);
  uint32_t value = 0;
  for (int l = 0; l < kLanes; ++l) {
    value |= static_cast<uint32_t>(F::apply(get<T>(a[l]), get<T>(b[l]))) << l;
  }
  uint32_t undef = w.undef[in.ops[2].undef] | w.undef[in.ops[3].undef];
  const uint32_t p = combine(w, in, value, &undef);
  const uint32_t q = combine(w, in, ~value, &undef);
  set_predicate(w, in.ops[0], mask, p, undef);
  set_predicate(w, in.ops[1], mask, q, undef);
}

// On a pair p is the lower half's result and q the upper one's.
template <class F, class H>
void setp_pair(Warp& w, const Instr& in, uint32_t mask) {
  const uint32_t* a = data<uint32_t>(w, in.ops[2]);
  const uint32_t* b = data<uint32_t>(w, in.ops[3]);
  uint32_t low = 0, high = 0;
  for (int l = 0; l < kLanes; ++l) {
    const auto half = [](uint32_t v) { return H::widen(static_cast<uint16_t>(v)); };
    low |= static_cast<uint32_t>(F::apply(half(a[l]), half(b[l]))) << l;
    high |= static_cast<uint32_t>(F::apply(half(a[l] >> 16), half(b[l] >> 16))) << l;
  }
  uint32_t undef = w.undef[in.ops[2].undef] | w.undef[in.ops[3].undef];
  low = combine(w, in, low, &undef);
  high = combine(w, in, high, &undef);
  set_predicate(w, in.ops[0], mask, low, undef);
  set_predicate(w, in.ops[1], mask, high, undef);
}

struct Eq {
  template <class T>
  static bool apply(T a, T b) {
    return a == b;
  }
};
struct Ne {  // ordered
  template <class T>
  static bool apply(T a, T b) {
    return a < b || a > b;
  }
};
struct Lt {
  template <class T>
  static bool apply(T a, T b) {
    return a < b;
  }
};
struct Le {
  template <class T>
  static bool apply(T a, T b) {
    return a <= b;
  }
};
struct Gt {
  template <class T>
  static bool apply(T a, T b) {
    return a > b;
  }
};
struct Ge {
  template <class T>
  static bool apply(T a, T b) {
    return a >= b;
  }
};
struct IntNe {
  template <class T>
  static bool apply(T a, T b) {
    return a != b;
  }
};
struct Num {
  template <class T>
  static bool apply(T a, T b) {
    return a == a && b == b;
  }
};
template <class F>
struct Negated {
  template <class T>
  static bool apply(T a, T b) {
    return !F::apply(a, b);
  }
};
template <class F>
struct Widened {
  template <class H>
  static bool apply(H a, H b) {
    return F::apply(H::widen(a.bits), H::widen(b.bits));
  }
};

template <class F>
Fn on_floats(Type t) {
  switch (t) {
    case Type::kF32:
      return setp<F, float>;
    case Type::kF64:
      return setp<F, double>;
    case Type::kF16:
      return setp<Widened<F>, Half>;
    case Type::kBf16:
      return setp<Widened<F>, Bfloat>;
    case Type::kF16x2:
      return setp_pair<F, Half>;
    case Type::kBf16x2:
      return setp_pair<F, Bfloat>;
    default:
      return nullptr;
  }
}

template <class F>
Fn on_integers(Type t, bool as_unsigned) {
  switch (t) {
    case Type::kB16:
    case Type::kU16:
      return setp<F, uint16_t>;
    case Type::kB32:
    case Type::kU32:
      return setp<F, uint32_t>;
    case Type::kB64:
    case Type::kU64:
      return setp<F, uint64_t>;
    case Type::kS16:
      return as_unsigned ? nullptr : setp<F, int16_t>;
    case Type::kS32:
      return as_unsigned ? nullptr : setp<F, int32_t>;
    case Type::kS64:
      return as_unsigned ? nullptr : setp<F, int64_t>;
    default:
      return nullptr;
  }
}

template <int kOp>
void logic(Warp& w, const Instr& in, uint32_t mask) {
  const uint32_t a = predicate(w, in.ops[1]);
  const uint32_t b = kOp < 3 ? predicate(w, in.ops[2]) : 0;
  const uint32_t undef = w.undef[in.ops[1].undef] | (kOp < 3 ? w.undef[in.ops[2].undef] : 0);
  const uint32_t value = kOp == 0 ? a & b : kOp == 1 ? a | b : kOp == 2 ? a ^ b : kOp == 3 ? ~a : a;
  set_predicate(w, in.ops[0], mask, value, undef);
}

}  // namespace

Fn setp_op(const std::string& c, Type t) {
  if (is_integer(t)) {
    if (c == "eq") return on_integers<Eq>(t, false);
    if (c == "ne") return on_integers<IntNe>(t, false);
    if (c == "lt") return on_integers<Lt>(t, false);
    if (c == "le") return on_integers<Le>(t, false);
    if (c == "gt") return on_integers<Gt>(t, false);
    if (c == "ge") return on_integers<Ge>(t, false);
    if (c == "lo") return on_integers<Lt>(t, true);
    if (c == "ls") return on_integers<Le>(t, true);
    if (c == "hi") return on_integers<Gt>(t, true);
    if (c == "hs") return on_integers<Ge>(t, true);
    return nullptr;
  }
  if (c == "eq") return on_floats<Eq>(t);
  if (c == "ne") return on_floats<Ne>(t);
  if (c == "lt") return on_floats<Lt>(t);
  if (c == "le") return on_floats<Le>(t);
  if (c == "gt") return on_floats<Gt>(t);
  if (c == "ge") return on_floats<Ge>(t);
  if (c == "equ") return on_floats<Negated<Ne>>(t);
  if (c == "neu") return on_floats<Negated<Eq>>(t);
  if (c == "ltu") return on_floats<Negated<Ge>>(t);
  if (c == "leu") return on_floats<Negated<Gt>>(t);
  if (c == "gtu") return on_floats<Negated<Le>>(t);
  if (c == "geu") return on_floats<Negated<Lt>>(t);
  if (c == "num") return on_floats<Num>(t);
  if (c == "nan") return on_floats<Negated<Num>>(t);
  return nullptr;
}

Fn pred_op(const std::string& op) {
  if (op == "and") return logic<0>;
  if (op == "or") return logic<1>;
  if (op == "xor") return logic<2>;
  if (op == "not") return logic<3>;
  return op == "mov" ? logic<4> : nullptr;
}

}  // namespace ptxsim
