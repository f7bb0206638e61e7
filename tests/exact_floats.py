# SPDX-License-Identifier: Apache-2.0
"""Floating-point formats for the interpreter's tests: exact values, and rounding of exact results.

Written from IEEE 754 on Python's fractions, so that no hardware rounding is trusted. Values are
handled as their bit patterns; bfloat16 has no numpy type.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import floor
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Format:
    """A binary format: significand bits with the hidden one, and the exponent range."""

    name: str
    bits: int
    precision: int
    max_exponent: int

    @property
    def min_exponent(self) -> int:
        return 1 - self.max_exponent

    @property
    def pattern(self) -> Any:
        return {16: np.uint16, 32: np.uint32, 64: np.uint64}[self.bits]

    @property
    def infinity(self) -> int:
        return (2 * self.max_exponent + 1) << (self.precision - 1)

    @property
    def sign(self) -> int:
        return 1 << (self.bits - 1)

    @property
    def nan(self) -> int:
        return self.infinity | 1 << (self.precision - 2)

    def is_nan(self, pattern: int) -> bool:
        return pattern & ~self.sign > self.infinity

    def is_infinite(self, pattern: int) -> bool:
        return pattern & ~self.sign == self.infinity

    def value(self, pattern: int) -> Fraction:
        """The exact value of a finite pattern."""
        fraction_bits = self.precision - 1
        magnitude = pattern & ~self.sign
        exponent, fraction = magnitude >> fraction_bits, magnitude & ((1 << fraction_bits) - 1)
        if exponent > 0:
            fraction |= 1 << fraction_bits
        scale = max(exponent, 1) - self.max_exponent - fraction_bits
        exact = Fraction(fraction) * Fraction(2) ** scale
        return -exact if pattern & self.sign else exact

    def round(self, exact: Fraction, mode: str = "rn", *, negative_zero: bool = False) -> int:
        """The pattern nearest to an exact value: rn (ties to even), rz, rm (down) or rp (up)."""
        if exact == 0:
            return self.sign if negative_zero else 0
        sign = self.sign if exact < 0 else 0
        magnitude = abs(exact)
        exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
        if Fraction(2) ** exponent > magnitude:
            exponent -= 1
        exponent = max(exponent, self.min_exponent)
        scaled = magnitude / Fraction(2) ** (exponent - self.precision + 1)
        significand = floor(scaled)
        rest = scaled - significand
        up = {
            "rn": rest > Fraction(1, 2) or (rest == Fraction(1, 2) and significand % 2 == 1),
            "rz": False,
            "rm": rest > 0 and exact < 0,
            "rp": rest > 0 and exact > 0,
        }[mode]
        significand += up
        # Biased exponent and fraction add up, also where rounding carries into the exponent.
        biased = exponent + self.max_exponent - 1
        pattern = (biased << (self.precision - 1)) + significand
        if pattern >= self.infinity:
            away = mode == "rn" or (mode == "rm" and exact < 0) or (mode == "rp" and exact > 0)
            pattern = self.infinity if away else self.infinity - 1
        return sign | pattern

    def samples(self, count: int, seed: int = 0) -> Array:
        """Zeros, subnormals, one and its neighbours, the largest, infinities, a NaN; then random
        patterns, half of them near one, where sums cancel and products neither over- nor underflow.
        """
        one = self.max_exponent << (self.precision - 1)
        small = self.infinity - 1
        corners = [0, 1, 2, 3, (1 << (self.precision - 1)) - 1, 1 << (self.precision - 1)]
        corners += [one - 1, one, one + 1, small, self.infinity]
        corners += [pattern | self.sign for pattern in corners] + [self.nan]
        rng = np.random.default_rng(seed)
        patterns = rng.integers(0, 1 << self.bits, count, dtype=np.uint64)
        near = rng.integers(-3, 4, count) << (self.precision - 1)
        fraction = patterns & np.uint64((1 << (self.precision - 1)) - 1)
        signs = patterns & np.uint64(self.sign)
        close = signs | (np.uint64(one) + near.astype(np.uint64) + fraction)
        patterns = np.where(np.arange(count) % 2 == 0, patterns, close)
        patterns[: len(corners)] = corners
        rng.shuffle(patterns)
        return np.asarray(patterns).astype(self.pattern)


F16 = Format("f16", 16, 11, 15)
BF16 = Format("bf16", 16, 8, 127)
F32 = Format("f32", 32, 24, 127)
F64 = Format("f64", 64, 53, 1023)
FORMATS = {form.name: form for form in (F16, BF16, F32, F64)}


def canonical(patterns: Array, form: Format) -> Array:
    """Every NaN becomes the same one."""
    magnitude = patterns & form.pattern(form.sign - 1)
    return np.where(magnitude > form.infinity, form.pattern(form.nan), patterns).astype(
        form.pattern
    )


def to_double(patterns: Array, form: Format) -> Array:
    """Patterns as float64, exactly."""
    with np.errstate(invalid="ignore"):  # signalling NaNs
        if form is BF16:
            return (patterns.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
        return np.asarray(patterns.view(f"f{form.bits // 8}"), dtype=np.float64)
