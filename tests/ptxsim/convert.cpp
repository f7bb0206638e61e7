// SPDX-License-Identifier: Apache-2.0
// cvt: between all integer and floating types, with rounding modes and saturation.

#include <algorithm>

#include "alu.h"
#include "lanes.h"

namespace ptxsim {
namespace {

template <class T>
constexpr bool kIsHalf = std::is_same_v<T, Half> || std::is_same_v<T, Bfloat>;
template <class T>
constexpr bool kIsFloat = std::is_floating_point_v<T> || kIsHalf<T>;

template <class T>
T round_to_integer(T v, Round mode) {
  switch (mode) {
    case Round::kZero:
      return std::trunc(v);
    case Round::kDown:
      return std::floor(v);
    case Round::kUp:
      return std::ceil(v);
    default:
      return std::nearbyint(v);
  }
}

// Clamped; NaN to 0, or to the top bit alone if one side has 64 bits, as devices do.
template <class D, class S>
D float_to_integer(S v, Round mode) {
  if (v != v) {
    constexpr bool kTopBit = sizeof(D) == 8 || sizeof(S) == 8;
    return kTopBit ? static_cast<D>(1ull << (8 * sizeof(D) - 1)) : D(0);
  }
  v = round_to_integer(v, mode);
  constexpr int kDigits = std::numeric_limits<D>::digits;
  const S limit = std::ldexp(S(1), kDigits);
  if (v >= limit) return std::numeric_limits<D>::max();
  if (std::is_signed_v<D> ? v < -limit : v < 0) return std::numeric_limits<D>::min();
  return static_cast<D>(v);
}

template <class D, class S>
D integer_to_integer(S v, bool saturate) {
  if (saturate) {
    if constexpr (std::is_signed_v<S>) {
      if (v < 0 &&
          (!std::is_signed_v<D> ||
           static_cast<int64_t>(v) < static_cast<int64_t>(std::numeric_limits<D>::min()))) {
        return std::numeric_limits<D>::min();
      }
    }
    if (v > 0 && static_cast<uint64_t>(v) > static_cast<uint64_t>(std::numeric_limits<D>::max())) {
      return std::numeric_limits<D>::max();
    }
  }
  return static_cast<D>(v);
}

// A 64-bit integer's nearest doubles are not exact: step towards the asked side.
template <class D, class S>
D integer_to_float(S v, Round mode) {
  D f = static_cast<D>(v);
  if (mode == Round::kNearest) return f;
  const auto exact = static_cast<long double>(v);
  const auto got = static_cast<long double>(f);
  const D up = std::numeric_limits<D>::infinity();
  const bool down = mode == Round::kDown || (mode == Round::kZero && v > 0);
  if (down && got > exact) return std::nextafter(f, -up);
  if (!down && got < exact) return std::nextafter(f, up);
  return f;
}

template <class D>
D narrow(double v, Round mode, bool saturate) {
  if (saturate) v = v > 0 ? (v < 1 ? v : 1.0) : 0.0;
  if constexpr (kIsHalf<D>) {
    return D{D::narrow(v, mode)};
  } else if constexpr (std::is_same_v<D, float>) {
    return double_to_float(v, mode);
  } else {
    return v;
  }
}

template <class D, class S>
D convert_lane(S v, Round mode, bool to_integer, bool saturate, bool relu) {
  if constexpr (!kIsFloat<D> && !kIsFloat<S>) {
    return integer_to_integer<D>(v, saturate);
  } else if constexpr (!kIsFloat<D>) {
    if constexpr (kIsHalf<S>) {
      return float_to_integer<D>(S::widen(v.bits), mode);
    } else {
      return float_to_integer<D>(v, mode);
    }
  } else if constexpr (!kIsFloat<S>) {
    if constexpr (kIsHalf<D>) {
      // Beyond 53 bits a half is infinite or saturated whatever the last digits are, and bf16
      // keeps 8: round to odd through double would be needed only for 64-bit ties.
      return narrow<D>(integer_to_float<double>(v, Round::kZero), mode, saturate);
    } else {
      const D f = integer_to_float<D>(v, mode);
      return saturate ? narrow<D>(f, mode, true) : f;
    }
  } else {
    double wide = 0;
    if constexpr (kIsHalf<S>) {
      wide = S::widen(v.bits);
    } else {
      wide = v;
    }
    if (to_integer) wide = round_to_integer(wide, mode);
    if (relu) wide = wide > 0 ? wide : wide != wide ? wide : 0.0;
    return narrow<D>(wide, to_integer ? Round::kNearest : mode, saturate);
  }
}

// `R` is how the destination's register is stored: integers are extended to its width.
// A source's register may be wider than its type, too.
template <class D, class S, class R, class From = Store<S>>
void convert(Warp& w, const Instr& in, uint32_t mask) {
  const From* a = reinterpret_cast<const From*>(w.files[in.ops[1].file] + in.ops[1].offset);
  R* d = reinterpret_cast<R*>(w.files[in.ops[0].file] + in.ops[0].offset);
  const Round mode = static_cast<Round>(in.a);
  const uint32_t undef = w.undef[in.ops[1].undef];
  for (int l = 0; l < kLanes; ++l) {
    if (!(mask >> l & 1)) continue;
    const D v = convert_lane<D, S>(get<S>(static_cast<Store<S>>(a[l])), mode, in.b != 0, in.c != 0,
                                   in.d != 0);
    if constexpr (std::is_integral_v<D>) {
      d[l] = static_cast<R>(v);
    } else {
      d[l] = put<D>(v);
    }
  }
  set_undef(w, in.ops[0], mask, undef);
}

// The frequent ones, without modes, as loops that vectorise.
struct Plain {
  template <class D, class S>
  struct To {
    static D apply(S v) { return static_cast<D>(v); }
  };
};
template <class H>
struct Widen {
  static float apply(H v) { return H::widen(v.bits); }
};
template <class H>
struct Narrow {
  static H apply(float v) { return H{H::narrow(v)}; }
};

template <class D, class R>
Fn from_type(Type from) {
  switch (from) {
    case Type::kB8:
    case Type::kU8:
      return convert<D, uint8_t, R>;
    case Type::kS8:
      return convert<D, int8_t, R>;
    case Type::kU16:
      return convert<D, uint16_t, R>;
    case Type::kS16:
      return convert<D, int16_t, R>;
    case Type::kU32:
      return convert<D, uint32_t, R>;
    case Type::kS32:
      return convert<D, int32_t, R>;
    case Type::kU64:
      return convert<D, uint64_t, R>;
    case Type::kS64:
      return convert<D, int64_t, R>;
    case Type::kF16:
      return convert<D, Half, R>;
    case Type::kBf16:
      return convert<D, Bfloat, R>;
    case Type::kF32:
      return convert<D, float, R>;
    case Type::kF64:
      return convert<D, double, R>;
    default:
      return nullptr;
  }
}

// Integers from the low bits of a 64-bit register.
template <class D, class R>
Fn from_low_bits(Type from) {
  switch (from) {
    case Type::kU8:
      return convert<D, uint8_t, R, uint64_t>;
    case Type::kS8:
      return convert<D, int8_t, R, uint64_t>;
    case Type::kU16:
      return convert<D, uint16_t, R, uint64_t>;
    case Type::kS16:
      return convert<D, int16_t, R, uint64_t>;
    case Type::kU32:
      return convert<D, uint32_t, R, uint64_t>;
    case Type::kS32:
      return convert<D, int32_t, R, uint64_t>;
    default:
      return nullptr;
  }
}

template <class D>
Fn either(Type from, bool wide) {
  return wide ? from_type<D, uint64_t>(from) : from_type<D, uint32_t>(from);
}

template <class H, bool kRelu, bool kZero>
struct PackPair {
  static uint32_t one(float v) {
    if (kRelu) v = v > 0 || v != v ? v : 0;
    return kZero ? H::narrow(v, Round::kZero) : H::narrow(v);
  }
  static uint32_t apply(float high, float low) { return one(high) << 16 | one(low); }
};

template <class H>
Fn pack_pair(bool relu, bool zero) {
  using T = uint32_t;
  if (zero) {
    return relu ? binary<PackPair<H, true, true>, T, float, float>
                : binary<PackPair<H, false, true>, T, float, float>;
  }
  return relu ? binary<PackPair<H, true, false>, T, float, float>
              : binary<PackPair<H, false, false>, T, float, float>;
}

}  // namespace

Fn convert_op(Type to, Type from, bool wide) {
  switch (to) {
    case Type::kU8:
      return either<uint8_t>(from, wide);
    case Type::kS8:
      return either<int8_t>(from, wide);
    case Type::kU16:
      return either<uint16_t>(from, wide);
    case Type::kS16:
      return either<int16_t>(from, wide);
    case Type::kU32:
      return either<uint32_t>(from, wide);
    case Type::kS32:
      return either<int32_t>(from, wide);
    case Type::kU64:
      return from_type<uint64_t, uint64_t>(from);
    case Type::kS64:
      return from_type<int64_t, uint64_t>(from);
    case Type::kF16:
      return from_type<Half, uint32_t>(from);
    case Type::kBf16:
      return from_type<Bfloat, uint32_t>(from);
    case Type::kF32:
      return from_type<float, uint32_t>(from);
    case Type::kF64:
      return from_type<double, uint64_t>(from);
    default:
      return nullptr;
  }
}

Fn convert_low_bits_op(Type to, Type from) {
  switch (to) {
    case Type::kU16:
      return from_low_bits<uint16_t, uint32_t>(from);
    case Type::kS16:
      return from_low_bits<int16_t, uint32_t>(from);
    case Type::kU32:
      return from_low_bits<uint32_t, uint32_t>(from);
    case Type::kS32:
      return from_low_bits<int32_t, uint32_t>(from);
    case Type::kU64:
      return from_low_bits<uint64_t, uint64_t>(from);
    case Type::kS64:
      return from_low_bits<int64_t, uint64_t>(from);
    case Type::kF32:
      return from_low_bits<float, uint32_t>(from);
    default:
      return nullptr;
  }
}

Fn convert_fast_op(Type to, Type from) {
  if (to == Type::kF32 && from == Type::kF16) return unary<Widen<Half>, float, Half>;
  if (to == Type::kF32 && from == Type::kBf16) return unary<Widen<Bfloat>, float, Bfloat>;
  if (to == Type::kF32 && from == Type::kS32)
    return unary<Plain::To<float, int32_t>, float, int32_t>;
  if (to == Type::kF32 && from == Type::kU32) {
    return unary<Plain::To<float, uint32_t>, float, uint32_t>;
  }
  if (to == Type::kF16 && from == Type::kF32) return unary<Narrow<Half>, Half, float>;
  if (to == Type::kBf16 && from == Type::kF32) return unary<Narrow<Bfloat>, Bfloat, float>;
  if (to == Type::kS64 && from == Type::kS32)
    return unary<Plain::To<int64_t, int32_t>, int64_t, int32_t>;
  if (to == Type::kU64 && from == Type::kU32) {
    return unary<Plain::To<uint64_t, uint32_t>, uint64_t, uint32_t>;
  }
  if (bytes_of(to) == 4 && bytes_of(from) == 8 && is_integer(to) && is_integer(from)) {
    return unary<Plain::To<uint32_t, uint64_t>, uint32_t, uint64_t>;
  }
  return nullptr;
}

Fn convert_pack_op(Type to, Round round, bool relu) {
  if (round != Round::kNearest && round != Round::kZero) return nullptr;
  const bool zero = round == Round::kZero;
  if (to == Type::kF16x2) return pack_pair<Half>(relu, zero);
  return to == Type::kBf16x2 ? pack_pair<Bfloat>(relu, zero) : nullptr;
}

}  // namespace ptxsim
