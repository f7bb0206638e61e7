// SPDX-License-Identifier: Apache-2.0
// Floating point instructions on f32, f64, f16, bf16 and pairs of the last two. Approximate
// functions use the C library; .ftz is ignored.

#include <cfenv>

#include "alu.h"
#include "lanes.h"

namespace ptxsim {
namespace {

struct Add {
  template <class T>
  static T apply(T a, T b) {
    return a + b;
  }
};
struct Sub {
  template <class T>
  static T apply(T a, T b) {
    return a - b;
  }
};
struct Mul {
  template <class T>
  static T apply(T a, T b) {
    return a * b;
  }
};
struct Div {
  template <class T>
  static T apply(T a, T b) {
    return a / b;
  }
};
struct Fma {
  static float apply(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
  static double apply(double a, double b, double c) { return __builtin_fma(a, b, c); }
};
struct Sqrt {
  static float apply(float a) { return __builtin_sqrtf(a); }
  static double apply(double a) { return __builtin_sqrt(a); }
};
struct Rcp {
  template <class T>
  static T apply(T a) {
    return T(1) / a;
  }
};
struct Rsqrt {
  static float apply(float a) { return static_cast<float>(1.0 / std::sqrt(double{a})); }
  static double apply(double a) { return 1.0 / std::sqrt(a); }
};
struct Ex2 {
  template <class T>
  static T apply(T a) {
    return std::exp2(a);
  }
};
struct Lg2 {
  template <class T>
  static T apply(T a) {
    return std::log2(a);
  }
};
struct Sin {
  template <class T>
  static T apply(T a) {
    return std::sin(a);
  }
};
struct Cos {
  template <class T>
  static T apply(T a) {
    return std::cos(a);
  }
};
struct Tanh {
  template <class T>
  static T apply(T a) {
    return std::tanh(a);
  }
};
struct Neg {
  template <class T>
  static T apply(T a) {
    return -a;
  }
};
struct Abs {
  template <class T>
  static T apply(T a) {
    return std::fabs(a);
  }
};
struct Copysign {  // PTX: the sign of a, the magnitude of b
  template <class T>
  static T apply(T a, T b) {
    return std::copysign(b, a);
  }
};
template <bool kNan>
struct Min {  // -0 is below +0; of a number and a NaN the number, unless .NaN
  template <class T>
  static T apply(T a, T b) {
    if (a != a) return kNan ? std::numeric_limits<T>::quiet_NaN() : b;
    if (b != b) return kNan ? std::numeric_limits<T>::quiet_NaN() : a;
    if (a == b) return std::signbit(a) ? a : b;
    return a < b ? a : b;
  }
};
template <bool kNan>
struct Max {
  template <class T>
  static T apply(T a, T b) {
    if (a != a) return kNan ? std::numeric_limits<T>::quiet_NaN() : b;
    if (b != b) return kNan ? std::numeric_limits<T>::quiet_NaN() : a;
    if (a == b) return std::signbit(a) ? b : a;
    return a > b ? a : b;
  }
};

template <class T>
T saturated(T v) {  // to [0, 1], NaN to 0
  return v > T(0) ? (v < T(1) ? v : T(1)) : T(0);
}

template <class F>
struct Saturated {
  template <class... T>
  static auto apply(T... v) {
    return saturated(F::apply(v...));
  }
};

// Under another rounding mode. The volatile copies keep the compiler from moving the operation.
template <class F, int kMode>
struct Directed {
  template <class T>
  static T apply(T a) {
    std::fesetround(kMode);
    volatile T x = a;
    volatile T r = F::apply(static_cast<T>(x));
    std::fesetround(FE_TONEAREST);
    return r;
  }
  template <class T>
  static T apply(T a, T b) {
    std::fesetround(kMode);
    volatile T x = a, y = b;
    volatile T r = F::apply(static_cast<T>(x), static_cast<T>(y));
    std::fesetround(FE_TONEAREST);
    return r;
  }
  template <class T>
  static T apply(T a, T b, T c) {
    std::fesetround(kMode);
    volatile T x = a, y = b, z = c;
    volatile T r = F::apply(static_cast<T>(x), static_cast<T>(y), static_cast<T>(z));
    std::fesetround(FE_TONEAREST);
    return r;
  }
};

template <class F, class T, int kOperands>
Fn of_arity() {
  if constexpr (kOperands == 1) {
    return unary<F, T, T>;
  } else if constexpr (kOperands == 2) {
    return binary<F, T, T, T>;
  } else {
    return ternary<F, T, T, T, T>;
  }
}

template <class F, int kOperands>
Fn plain(Type type) {
  return type == Type::kF32 ? of_arity<F, float, kOperands>() : of_arity<F, double, kOperands>();
}

template <class F, int kOperands>
Fn rounded(Type type, Round round, bool saturate) {
  switch (round) {
    case Round::kZero:
      return saturate ? nullptr : plain<Directed<F, FE_TOWARDZERO>, kOperands>(type);
    case Round::kDown:
      return saturate ? nullptr : plain<Directed<F, FE_DOWNWARD>, kOperands>(type);
    case Round::kUp:
      return saturate ? nullptr : plain<Directed<F, FE_UPWARD>, kOperands>(type);
    default:
      return saturate ? plain<Saturated<F>, kOperands>(type) : plain<F, kOperands>(type);
  }
}

// double to float that never rounds to even on a tie it made itself: a second rounding is exact.
float to_odd(double d) {
  float f = static_cast<float>(d);
  if (static_cast<double>(f) == d || f != f) return f;
  uint32_t bits = bit_cast<uint32_t>(f);
  if (std::fabs(static_cast<double>(f)) > std::fabs(d)) --bits;
  return bit_cast<float>(bits | 1);
}

// a * b + c in double, rounded to odd as well: the product of halves is exact, the sum need not be.
double fma_to_odd(double a, double b, double c) {
  const double product = a * b, sum = product + c;
  if (!std::isfinite(sum)) return sum;
  const double back = sum - product;
  const double error = (product - (sum - back)) + (c - back);
  if (error == 0) return sum;
  uint64_t bits = bit_cast<uint64_t>(sum);
  if ((error > 0) != (sum > 0)) --bits;
  return bit_cast<double>(bits | 1);
}

// The operation F on one half value held in 16 bits.
template <class F, class H>
struct Single {
  static H apply(H a) {
    if constexpr (std::is_same_v<F, Neg>) return H{static_cast<uint16_t>(a.bits ^ 0x8000)};
    if constexpr (std::is_same_v<F, Abs>) return H{static_cast<uint16_t>(a.bits & 0x7fff)};
    return H{H::narrow(F::apply(H::widen(a.bits)))};
  }
  static H apply(H a, H b) { return H{H::narrow(F::apply(H::widen(a.bits), H::widen(b.bits)))}; }
  static H apply(H a, H b, H c) {
    const double x = H::widen(a.bits), y = H::widen(b.bits), z = H::widen(c.bits);
    if constexpr (std::is_same_v<F, Saturated<Fma>>) {
      return H{H::narrow(saturated(to_odd(fma_to_odd(x, y, z))))};
    }
    return H{H::narrow(to_odd(fma_to_odd(x, y, z)))};
  }
};

template <class F, class H>
struct Pair {
  template <class... T>
  static uint32_t apply(T... v) {
    const H low = Single<F, H>::apply(H{static_cast<uint16_t>(v)}...);
    const H high = Single<F, H>::apply(H{static_cast<uint16_t>(v >> 16)}...);
    return static_cast<uint32_t>(high.bits) << 16 | low.bits;
  }
};

template <class F, int kOperands>
Fn halves(Type type) {
  switch (type) {
    case Type::kF16:
      return of_arity<Single<F, Half>, Half, kOperands>();
    case Type::kBf16:
      return of_arity<Single<F, Bfloat>, Bfloat, kOperands>();
    case Type::kF16x2:
      return of_arity<Pair<F, Half>, uint32_t, kOperands>();
    case Type::kBf16x2:
      return of_arity<Pair<F, Bfloat>, uint32_t, kOperands>();
    default:
      return nullptr;
  }
}

}  // namespace

Fn float_op(const std::string& op, Type type, Round round, bool saturate) {
  if (type != Type::kF32 && type != Type::kF64) return nullptr;
  if (op == "add") return rounded<Add, 2>(type, round, saturate);
  if (op == "sub") return rounded<Sub, 2>(type, round, saturate);
  if (op == "mul") return rounded<Mul, 2>(type, round, saturate);
  if (op == "fma") return rounded<Fma, 3>(type, round, saturate);
  if (saturate) return nullptr;
  if (op == "div") return rounded<Div, 2>(type, round, false);
  if (op == "sqrt") return rounded<Sqrt, 1>(type, round, false);
  if (op == "rcp") return rounded<Rcp, 1>(type, round, false);
  if (round != Round::kNearest) return nullptr;
  if (op == "rsqrt") return plain<Rsqrt, 1>(type);
  if (op == "neg") return plain<Neg, 1>(type);
  if (op == "abs") return plain<Abs, 1>(type);
  if (op == "min") return plain<Min<false>, 2>(type);
  if (op == "max") return plain<Max<false>, 2>(type);
  if (op == "min.NaN") return plain<Min<true>, 2>(type);
  if (op == "max.NaN") return plain<Max<true>, 2>(type);
  if (op == "copysign") return plain<Copysign, 2>(type);
  if (op == "ex2") return plain<Ex2, 1>(type);
  if (op == "lg2") return plain<Lg2, 1>(type);
  if (op == "sin") return plain<Sin, 1>(type);
  if (op == "cos") return plain<Cos, 1>(type);
  if (op == "tanh") return plain<Tanh, 1>(type);
  return nullptr;
}

Fn half_op(const std::string& op, Type type, bool saturate) {
  if (saturate) {
    if (op == "add") return halves<Saturated<Add>, 2>(type);
    if (op == "sub") return halves<Saturated<Sub>, 2>(type);
    if (op == "mul") return halves<Saturated<Mul>, 2>(type);
    if (op == "fma") return halves<Saturated<Fma>, 3>(type);
    return nullptr;
  }
  if (op == "add") return halves<Add, 2>(type);
  if (op == "sub") return halves<Sub, 2>(type);
  if (op == "mul") return halves<Mul, 2>(type);
  if (op == "fma") return halves<Fma, 3>(type);
  if (op == "neg") return halves<Neg, 1>(type);
  if (op == "abs") return halves<Abs, 1>(type);
  if (op == "min") return halves<Min<false>, 2>(type);
  if (op == "max") return halves<Max<false>, 2>(type);
  if (op == "min.NaN") return halves<Min<true>, 2>(type);
  if (op == "max.NaN") return halves<Max<true>, 2>(type);
  if (op == "ex2") return halves<Ex2, 1>(type);
  if (op == "tanh") return halves<Tanh, 1>(type);
  return nullptr;
}

}  // namespace ptxsim
