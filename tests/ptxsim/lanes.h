// SPDX-License-Identifier: Apache-2.0
// Elementwise instructions: one small struct with a static apply() per operation becomes a function
// over the 32 lanes. With all lanes active the loop is plain enough for the compiler to vectorise.
#pragma once

#include <type_traits>

#include "half.h"
#include "warp.h"

namespace ptxsim {

// How a value of type T lies in a lane of a register.
template <class T>
using Store = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;

template <class T>
inline T get(Store<T> v) {
  if constexpr (std::is_integral_v<T>) {
    return static_cast<T>(v);
  } else if constexpr (sizeof(T) == 2) {
    return T{static_cast<uint16_t>(v)};
  } else {
    return bit_cast<T>(v);
  }
}

template <class T>
inline Store<T> put(T v) {
  if constexpr (std::is_integral_v<T>) {
    return static_cast<Store<T>>(static_cast<std::make_unsigned_t<T>>(v));
  } else if constexpr (sizeof(T) == 2) {
    return v.bits;
  } else {
    return bit_cast<Store<T>>(v);
  }
}

template <class T>
inline Store<T>* data(Warp& w, const Operand& o) {
  return reinterpret_cast<Store<T>*>(w.files[o.file] + o.offset);
}

inline void set_undef(Warp& w, const Operand& o, uint32_t mask, uint32_t undef) {
  w.undef[o.undef] = (w.undef[o.undef] & ~mask) | (undef & mask);
}

template <class F, class D, class A>
void unary(Warp& w, const Instr& in, uint32_t mask) {
  Store<D>* d = data<D>(w, in.ops[0]);
  const Store<A>* a = data<A>(w, in.ops[1]);
  const uint32_t undef = w.undef[in.ops[1].undef];
  if (mask == kFull) {
#pragma GCC ivdep
    for (int l = 0; l < kLanes; ++l) d[l] = put<D>(F::apply(get<A>(a[l])));
  } else {
    for (int l = 0; l < kLanes; ++l) {
      if (mask >> l & 1) d[l] = put<D>(F::apply(get<A>(a[l])));
    }
  }
  set_undef(w, in.ops[0], mask, undef);
}

template <class F, class D, class A, class B>
void binary(Warp& w, const Instr& in, uint32_t mask) {
  Store<D>* d = data<D>(w, in.ops[0]);
  const Store<A>* a = data<A>(w, in.ops[1]);
  const Store<B>* b = data<B>(w, in.ops[2]);
  const uint32_t undef = w.undef[in.ops[1].undef] | w.undef[in.ops[2].undef];
  if (mask == kFull) {
#pragma GCC ivdep
    for (int l = 0; l < kLanes; ++l) d[l] = put<D>(F::apply(get<A>(a[l]), get<B>(b[l])));
  } else {
    for (int l = 0; l < kLanes; ++l) {
      if (mask >> l & 1) d[l] = put<D>(F::apply(get<A>(a[l]), get<B>(b[l])));
    }
  }
  set_undef(w, in.ops[0], mask, undef);
}

template <class F, class D, class A, class B, class C>
void ternary(Warp& w, const Instr& in, uint32_t mask) {
  Store<D>* d = data<D>(w, in.ops[0]);
  const Store<A>* a = data<A>(w, in.ops[1]);
  const Store<B>* b = data<B>(w, in.ops[2]);
  const Store<C>* c = data<C>(w, in.ops[3]);
  const uint32_t undef =
      w.undef[in.ops[1].undef] | w.undef[in.ops[2].undef] | w.undef[in.ops[3].undef];
  if (mask == kFull) {
#pragma GCC ivdep
    for (int l = 0; l < kLanes; ++l) {
      d[l] = put<D>(F::apply(get<A>(a[l]), get<B>(b[l]), get<C>(c[l])));
    }
  } else {
    for (int l = 0; l < kLanes; ++l) {
      if (mask >> l & 1) d[l] = put<D>(F::apply(get<A>(a[l]), get<B>(b[l]), get<C>(c[l])));
    }
  }
  set_undef(w, in.ops[0], mask, undef);
}

// A predicate operand as a lane mask, its negation applied.
inline uint32_t predicate(const Warp& w, const Operand& o) {
  const uint32_t p = w.files[o.file][o.offset];
  return o.negate ? ~p : p;
}

inline void set_predicate(Warp& w, const Operand& o, uint32_t mask, uint32_t value,
                          uint32_t undef) {
  uint32_t& p = w.files[0][o.offset];
  p = (p & ~mask) | (value & mask);
  set_undef(w, o, mask, undef);
}

}  // namespace ptxsim
