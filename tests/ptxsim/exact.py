"""Floating-point formats in exact rational arithmetic: the model that instruction semantics are tested against."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Format:
    """IEEE 754 binary formats: ``bits`` in all, of which ``mantissa`` after the leading one."""

    bits: int
    mantissa: int

    @property
    def bias(self) -> int:
        return (1 << (self.bits - self.mantissa - 2)) - 1

    @property
    def sign(self) -> int:
        return 1 << (self.bits - 1)

    @property
    def infinity(self) -> int:
        return (2 * self.bias + 1) << self.mantissa

    @property
    def nan(self) -> int:
        """The canonical one: all ones but for the sign. Doubles have none in PTX; the simulator's is x86's quiet one."""
        return self.infinity | 1 << 51 if self.bits == 64 else self.sign - 1

    def value(self, code: int) -> Fraction | float:
        """A Fraction, or an infinity or NaN as a float; -0.0 is a float too."""
        negative, magnitude = bool(code & self.sign), code & ~self.sign
        if magnitude > self.infinity:
            return math.nan
        if magnitude == self.infinity:
            return -math.inf if negative else math.inf
        if magnitude == 0:
            return -0.0 if negative else Fraction(0)
        exponent, fraction = divmod(magnitude, 1 << self.mantissa)
        if exponent:
            fraction += 1 << self.mantissa
        scaled = Fraction(fraction) * Fraction(2) ** (max(exponent, 1) - self.bias - self.mantissa)
        return -scaled if negative else scaled

    def code(self, value: Fraction | float, rounding: str = "rn") -> int:
        """The bits of the rounded value; rounding: rn, rz, rm (down) or rp (up)."""
        if isinstance(value, float):
            if math.isnan(value):
                return self.nan
            sign = self.sign if math.copysign(1, value) < 0 else 0
            if value == 0 or math.isinf(value):
                return sign | (self.infinity if value else 0)
            value = Fraction(value)
        sign, magnitude = (self.sign if value < 0 else 0), abs(value)
        if magnitude == 0:
            return 0
        # The code of a positive float is its rank: neighbours differ by one, whatever their exponents.
        exponent = max(_floor_log2(magnitude), 1 - self.bias)
        steps = magnitude / Fraction(2) ** (exponent - self.mantissa)
        rank, rest = divmod(steps, 1)
        code = int(rank) + ((exponent + self.bias - 1) << self.mantissa)
        away = {"rn": rest > Fraction(1, 2) or (rest == Fraction(1, 2) and code % 2 == 1), "rz": False}
        away |= {"rm": bool(sign and rest), "rp": bool(not sign and rest)}
        code += away[rounding]
        if code >= self.infinity:
            stays = rounding == "rz" or (rounding == "rm" and not sign) or (rounding == "rp" and sign)
            code = self.infinity - 1 if stays else self.infinity
        return sign | code


def _floor_log2(x: Fraction) -> int:
    guess = x.numerator.bit_length() - x.denominator.bit_length()
    return guess if Fraction(2) ** guess <= x else guess - 1


F16, BF16, F32, F64 = Format(16, 10), Format(16, 7), Format(32, 23), Format(64, 52)
FORMATS = {"f16": F16, "bf16": BF16, "f32": F32, "f64": F64}


def fused(a: Fraction | float, b: Fraction | float, c: Fraction | float, rounding: str = "rn") -> Fraction | float:
    """a * b + c without rounding, with IEEE 754's rules for infinities, NaN and the signs of zeros."""
    product = multiply(a, b)
    return add(product, c, rounding)


def multiply(a: Fraction | float, b: Fraction | float) -> Fraction | float:
    if isinstance(a, Fraction) and isinstance(b, Fraction) and a and b:
        return a * b
    return _size(a) * _size(b)  # inf, NaN or a zero with its sign


def add(a: Fraction | float, b: Fraction | float, rounding: str = "rn") -> Fraction | float:
    a_special, b_special = (isinstance(x, float) and not math.isfinite(x) for x in (a, b))
    if a_special or b_special:
        return _size(a) + _size(b)
    total = Fraction(a) + Fraction(b)
    if total:
        return total
    signs = {math.copysign(1, _size(a)), math.copysign(1, _size(b))}
    negative = signs == {-1} or (len(signs) == 2 and rounding == "rm")
    return -0.0 if negative else Fraction(0)


def _size(x: Fraction | float) -> float:
    """A float of the same sign that is 0, 1, inf or NaN as ``x`` is 0, finite, inf or NaN."""
    if isinstance(x, float):
        return x
    return 0.0 if x == 0 else 1.0 if x > 0 else -1.0
