"""Arithmetic and conversions on edge values, against exact rational arithmetic and Python's integers."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

from tests.ptxsim import exact
from tests.ptxsim.exact import F16, F32, FORMATS
from tests.ptxsim.instruction import execute

UINT = {16: np.uint16, 32: np.uint32, 64: np.uint64}


def edges(fmt):
    """Codes of one sign: 0, the subnormals' ends, the least normal, around 1, halves, the largest, infinity, NaN."""
    one = fmt.bias << fmt.mantissa
    least = 1 << fmt.mantissa
    finite = [
        0,
        1,
        2,
        least - 1,
        least,
        least + 1,
        one - 1,
        one,
        one + 1,
        fmt.code(Fraction(5, 2)),
        fmt.code(Fraction(1, 3)),
    ]
    finite += [
        fmt.code(Fraction(2) ** (fmt.mantissa + 1) + 2),
        fmt.code(Fraction(2) ** -(fmt.mantissa + 1)),
        fmt.infinity - 1,
    ]
    both = [code | sign for code in [*finite, fmt.infinity] for sign in (0, fmt.sign)]
    return [*both, fmt.infinity + 1, fmt.nan]


def product(fmt, times, step=1):
    codes = edges(fmt)[::step]
    return [np.array(column, UINT[fmt.bits]) for column in zip(*itertools.product(codes, repeat=times), strict=True)]


def flush(fmt, code):
    return code if code & fmt.infinity else code & fmt.sign


def check(fmt, instruction, columns, model, *, ftz=False, finish=lambda code: code):
    """model takes exact values and gives an exact value or a code (an int that is no bool)."""
    result = execute(instruction, *columns, out=UINT[fmt.bits])
    for got, *codes in zip(result.tolist(), *(c.tolist() for c in columns), strict=True):
        values = [fmt.value(flush(fmt, code) if ftz else code) for code in codes]
        expected = model(*values)
        if not isinstance(expected, int):
            expected = fmt.code(expected)
        expected = finish(flush(fmt, expected) if ftz else expected)
        assert got == expected, f"{instruction} of {[hex(c) for c in codes]} is {got:#x}, expected {expected:#x}"


@pytest.mark.parametrize("rounding", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_rounding_modes(kind, rounding):
    fmt = FORMATS[kind]
    pairs, triples = product(fmt, 2), product(fmt, 3, step=3)
    add, multiply, fused = exact.add, exact.multiply, exact.fused
    check(fmt, f"add.{rounding}.{kind} d, a, b;", pairs, lambda a, b: fmt.code(add(a, b, rounding), rounding))
    check(
        fmt,
        f"sub.{rounding}.{kind} d, a, b;",
        pairs,
        lambda a, b: fmt.code(add(a, exact.multiply(b, Fraction(-1)), rounding), rounding),
    )
    check(fmt, f"mul.{rounding}.{kind} d, a, b;", pairs, lambda a, b: fmt.code(multiply(a, b), rounding))
    check(
        fmt, f"fma.{rounding}.{kind} d, a, b, c;", triples, lambda a, b, c: fmt.code(fused(a, b, c, rounding), rounding)
    )


def test_division_and_roots_round_to_nearest():
    a, b = (x.view(np.float32) for x in product(F32, 2))
    with np.errstate(all="ignore"):
        cases = [("div.rn.f32 d, a, b;", a / b), ("rcp.rn.f32 d, a;", 1 / a), ("sqrt.rn.f32 d, a;", np.sqrt(a))]
    for code, expected in cases:
        np.testing.assert_array_equal(execute(code, a, b, out=np.float32), expected)


def test_f32_flushes_subnormals_of_operands_and_results():
    pairs, triples = product(F32, 2), product(F32, 3, step=3)
    check(F32, "add.ftz.f32 d, a, b;", pairs, exact.add, ftz=True)
    check(F32, "mul.ftz.f32 d, a, b;", pairs, exact.multiply, ftz=True)
    check(F32, "fma.rn.ftz.f32 d, a, b, c;", triples, exact.fused, ftz=True)


def clamp(fmt):
    one = fmt.code(Fraction(1))
    return lambda code: 0 if code & fmt.sign or code > fmt.infinity else min(code, one)


def test_saturation_clamps_to_one_and_takes_nan_to_zero():
    check(F32, "add.sat.f32 d, a, b;", product(F32, 2), exact.add, finish=clamp(F32))
    check(F32, "fma.rn.sat.f32 d, a, b, c;", product(F32, 3, step=3), exact.fused, finish=clamp(F32))
    check(F16, "mul.sat.f16 d, a, b;", product(F16, 2), exact.multiply, finish=clamp(F16))


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_16_bit_arithmetic_rounds_once(kind):
    fmt = FORMATS[kind]
    check(fmt, f"add.{kind} d, a, b;", product(fmt, 2), exact.add)
    check(fmt, f"sub.{kind} d, a, b;", product(fmt, 2), lambda a, b: exact.add(a, exact.multiply(b, Fraction(-1))))
    check(fmt, f"mul.{kind} d, a, b;", product(fmt, 2), exact.multiply)
    check(fmt, f"fma.rn.{kind} d, a, b, c;", product(fmt, 3, step=2), exact.fused)
    relu = lambda code: code if not code & fmt.sign else 0  # noqa: E731
    check(fmt, f"fma.rn.relu.{kind} d, a, b, c;", product(fmt, 3, step=3), exact.fused, finish=relu)


def test_f16_fma_is_not_fooled_by_a_tie_that_double_would_make():
    # The product is one half unit in the last place of c, plus or minus 2^-48 of it: beyond double's 53 bits.
    a, b = np.array([0x1001], np.uint16), np.array([0x0FFF], np.uint16)
    check(F16, "fma.rn.f16 d, a, b, c;", [a, b, np.array([0x7800], np.uint16)], exact.fused)
    tiny = np.array([0x0001, 0x8001], np.uint16)
    one = np.array([0x1001, 0x1001], np.uint16)
    check(F16, "fma.rn.f16 d, a, b, c;", [tiny, one, np.array([0x0001, 0x0001], np.uint16)], exact.fused)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("operation", ["add", "mul", "fma.rn", "max", "min.NaN"])
def test_packed_arithmetic_is_two_of_the_single_one(kind, operation):
    columns = product(FORMATS[kind], 3 if operation == "fma.rn" else 2, step=2)
    operands = "d, a, b, c" if operation == "fma.rn" else "d, a, b"
    single = execute(f"{operation}.{kind} {operands};", *columns, out=np.uint16)
    packed = [c.astype(np.uint32) | np.roll(c, 1).astype(np.uint32) << 16 for c in columns]
    both = execute(f"{operation}.{kind}x2 {operands};", *packed, out=np.uint32)
    np.testing.assert_array_equal(both & 0xFFFF, single)
    np.testing.assert_array_equal(both >> 16, np.roll(single, 1))


@pytest.mark.parametrize("kind", ["f16", "bf16", "f32"])
def test_extrema(kind):
    fmt = FORMATS[kind]

    def extremum(largest, nan_wins):
        def model(a, b):
            if math.isnan(a) or math.isnan(b):
                return fmt.nan if nan_wins or (math.isnan(a) and math.isnan(b)) else (b if math.isnan(a) else a)
            key = lambda x: (x, math.copysign(1, float(exact._size(x))))  # noqa: E731
            return (max if largest else min)(a, b, key=key)

        return model

    for name, largest in (("max", True), ("min", False)):
        check(fmt, f"{name}.{kind} d, a, b;", product(fmt, 2), extremum(largest, False))
        check(fmt, f"{name}.NaN.{kind} d, a, b;", product(fmt, 2), extremum(largest, True))


@pytest.mark.parametrize("kind", ["f16", "bf16", "f32"])
def test_negation_and_magnitude_touch_the_sign_alone(kind):
    fmt = FORMATS[kind]
    (a,) = product(fmt, 1)
    np.testing.assert_array_equal(execute(f"neg.{kind} d, a;", a, out=a.dtype), a ^ a.dtype.type(fmt.sign))
    np.testing.assert_array_equal(execute(f"abs.{kind} d, a;", a, out=a.dtype), a & a.dtype.type(fmt.sign - 1))


APPROXIMATIONS = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": lambda x: 1 / x,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "sqrt": np.sqrt,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
}


@pytest.mark.parametrize("name", APPROXIMATIONS)
def test_approximations_are_rounded_once(name):
    x = np.concatenate([product(F32, 1)[0].view(np.float32), np.linspace(-150, 130, 301, dtype=np.float32)])
    with np.errstate(all="ignore"):
        expected = APPROXIMATIONS[name](x.astype(np.float64)).astype(np.float32)
        flushed = np.where(np.abs(x) < 2**-126, np.copysign(0, x), x).astype(np.float64)
        expected_ftz = APPROXIMATIONS[name](flushed).astype(np.float32)
        expected_ftz = np.where(np.abs(expected_ftz) < 2**-126, np.copysign(np.float32(0), expected_ftz), expected_ftz)
    np.testing.assert_array_almost_equal_nulp(
        *both_finite(execute(f"{name}.approx.f32 d, a;", x, out=np.float32), expected), 1
    )
    if name != "tanh":
        np.testing.assert_array_almost_equal_nulp(
            *both_finite(execute(f"{name}.approx.ftz.f32 d, a;", x, out=np.float32), expected_ftz), 1
        )


def both_finite(result, expected):
    """Both where the expectation is finite; elsewhere they must be equal, zeros by their sign too."""
    special = ~np.isfinite(expected) | (expected == 0)
    np.testing.assert_array_equal(result[special], expected[special])
    assert (np.signbit(result) == np.signbit(expected))[~np.isnan(expected)].all()
    return result[~special], expected[~special]


# Conversions


@pytest.mark.parametrize("target", ["f16", "bf16"])
@pytest.mark.parametrize("rounding", ["rn", "rz"])
def test_narrowing(target, rounding):
    fmt = FORMATS[target]
    between = []  # around each edge of the target: itself, the ties with its neighbours, and a little beside them
    for code in edges(fmt):
        value = fmt.value(code)
        if math.isfinite(value):
            step = Fraction(2) ** (max((code & ~fmt.sign) >> fmt.mantissa, 1) - fmt.bias - fmt.mantissa)
            between += [F32.code(Fraction(value) + k * step / 4) for k in range(-4, 5)]
            between += [F32.code(Fraction(value) + step / 2) + 1, F32.code(Fraction(value) + step / 2) - 1]
    codes = np.array(between + edges(F32), np.uint32)
    result = execute(f"cvt.{rounding}.{target}.f32 d, a;", codes, out=np.uint16)
    expected = [fmt.code(F32.value(code), rounding) for code in codes.tolist()]
    assert result.tolist() == expected
    other = np.roll(codes, 1)
    packed = execute(f"cvt.{rounding}.{target}x2.f32 d, a, b;", other, codes, out=np.uint32)
    assert (packed & 0xFFFF).tolist() == expected
    assert (packed >> 16).tolist() == np.roll(expected, 1).tolist()
    relu = execute(f"cvt.{rounding}.relu.{target}x2.f32 d, a, b;", other, codes, out=np.uint32) & 0xFFFF
    assert relu.tolist() == [0 if code & fmt.sign else code for code in expected]


def test_widening_is_exact():
    for kind in ("f16", "bf16"):
        codes = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
        result = execute(f"cvt.f32.{kind} d, a;", codes, out=np.uint32)
        fmt = FORMATS[kind]
        step = 37  # every 37th value in exact arithmetic
        assert result[::step].tolist() == [F32.code(fmt.value(code)) for code in codes[::step].tolist()]
    halves = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
    np.testing.assert_array_equal(
        execute("cvt.f32.f16 d, a;", halves, out=np.float32), halves.view(np.float16).astype(np.float32)
    )


def test_double_to_float():
    codes = np.array([F64 for x in edges(F32) for F64 in near_double(x)], np.uint64)
    for rounding in ("rn", "rz", "rm", "rp"):
        result = execute(f"cvt.{rounding}.f32.f64 d, a;", codes, out=np.uint32)
        assert result.tolist() == [F32.code(exact.F64.value(code), rounding) for code in codes.tolist()]


def near_double(code):
    value = F32.value(code)
    if not math.isfinite(value):
        return [exact.F64.code(value)]
    centre = exact.F64.code(value)
    return [centre, centre + 1, centre + (1 << 28), centre + (1 << 28) + 1, centre + (1 << 28) - 1]


def test_tf32_rounds_halves_away_and_keeps_ten_bits():
    codes = np.array(
        [
            0x3F800000,
            0x3F800FFF,
            0x3F801000,
            0x3F801001,
            0xBF801000,
            0x3F803000,
            0x7F7FFFFF,
            0x7F800000,
            0x00000FFF,
            0x00001000,
        ],
        np.uint32,
    )
    expected = [
        0x3F800000,
        0x3F800000,
        0x3F802000,
        0x3F802000,
        0xBF802000,
        0x3F804000,
        0x7F800000,
        0x7F800000,
        0,
        0x2000,
    ]
    assert execute("cvt.rna.tf32.f32 d, a;", codes, out=np.uint32).tolist() == expected


INTEGRAL = {"rni": lambda x: round(x), "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}


@pytest.mark.parametrize("source", ["f32", "f64", "f16"])
@pytest.mark.parametrize("target", ["s32", "u32", "s64", "u64", "s16", "u8"])
def test_float_to_integer_saturates(source, target):
    fmt, bits, signed = FORMATS[source], int(target[1:]), target[0] == "s"
    values = [Fraction(k, 4) for k in range(-10, 11)]
    values += [s * (Fraction(2) ** k + d) for k in (7, 8, 15, 16, 31, 32, 63, 64) for d in (-1, 0, 1) for s in (1, -1)]
    codes = np.array([fmt.code(v) for v in values] + edges(fmt), UINT[fmt.bits])
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)
    out = np.uint64 if bits == 64 else np.uint32 if bits == 32 else np.uint16
    mask = (1 << (8 * np.dtype(out).itemsize)) - 1
    nan = 1 << (bits - 1) if bits == 64 or source == "f64" else 0
    for rounding, integral in INTEGRAL.items():
        result = execute(f"cvt.{rounding}.{target}.{source} d, a;", codes, out=out)
        for got, code in zip(result.tolist(), codes.tolist(), strict=True):
            value = fmt.value(code)
            if math.isnan(value):
                expected = nan - (1 << bits) if signed and nan else nan
            else:
                expected = (
                    low if value < low else high if value > high else max(low, min(high, integral(Fraction(value))))
                )
            assert got == expected & mask, (
                f"cvt.{rounding}.{target}.{source} of {code:#x} is {got:#x}, expected {expected & mask:#x}"
            )


@pytest.mark.parametrize("target", ["f32", "f16", "bf16", "f64"])
@pytest.mark.parametrize("source", ["s64", "u64", "s32", "u32"])
def test_integer_to_float(source, target):
    bits, fmt = int(source[1:]), FORMATS[target]
    values = {
        s * ((1 << k) + d)
        for k in range(bits + 1)
        for d in (-1, 0, 1, (1 << k) >> 12, ((1 << k) >> 24) + 1)
        for s in (1, -1)
    }
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if source[0] == "s" else (0, (1 << bits) - 1)
    values = sorted(v for v in values if low <= v <= high)
    codes = np.array([v & ((1 << bits) - 1) for v in values], UINT[bits])
    for rounding in ("rn", "rz", "rm", "rp"):
        result = execute(f"cvt.{rounding}.{target}.{source} d, a;", codes, out=UINT[fmt.bits])
        assert result.tolist() == [fmt.code(Fraction(v), rounding) for v in values], rounding


def test_integer_conversions_extend_truncate_and_saturate():
    a = np.array([0, 1, 127, 128, 255, 256, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFFFF80, 0xFFFFFF7F], np.uint32)
    signed = a.view(np.int32).astype(np.int64)
    run = lambda name, out: execute(f"cvt.{name} d, a;", a, out=out)  # noqa: E731
    np.testing.assert_array_equal(run("s64.s32", np.int64), signed)
    np.testing.assert_array_equal(run("u64.u32", np.int64), a.astype(np.int64))
    np.testing.assert_array_equal(run("s32.s8", np.int32), a.astype(np.uint8).view(np.int8).astype(np.int32))
    np.testing.assert_array_equal(run("u32.u8", np.uint32), a & 255)
    np.testing.assert_array_equal(run("u16.u32", np.uint16), a.astype(np.uint16))
    np.testing.assert_array_equal(run("sat.s8.s32", np.int16), signed.clip(-128, 127))
    np.testing.assert_array_equal(run("sat.u8.s32", np.int16), signed.clip(0, 255))
    np.testing.assert_array_equal(run("sat.u32.s32", np.uint32), signed.clip(0, None).astype(np.uint32))


def test_float_to_integral_float():
    x = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 0.4, -0.4, 1e9, np.inf, -np.inf, np.nan, 0.0], np.float32)
    for rounding, expected in (("rni", np.rint(x)), ("rzi", np.trunc(x)), ("rmi", np.floor(x)), ("rpi", np.ceil(x))):
        np.testing.assert_array_equal(execute(f"cvt.{rounding}.f32.f32 d, a;", x, out=np.float32), expected)
    clamped = np.where(np.isnan(x), 0, x.clip(0, 1))
    np.testing.assert_array_equal(execute("cvt.sat.f32.f32 d, a;", x, out=np.float32), clamped)


# Comparisons

ORDERED = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
def test_float_comparisons(kind):
    fmt = FORMATS[kind]
    a, b = product(fmt, 2)
    values = [(fmt.value(x), fmt.value(y)) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    unordered = [math.isnan(x) or math.isnan(y) for x, y in values]
    outcomes = {name: [eval(f"x {sign} y", {"x": x, "y": y}) for x, y in values] for name, sign in ORDERED.items()}
    for name, holds in outcomes.items():
        ordered = execute(f"setp.{name}.{kind} p, a, b; selp.u32 d, 1, 0, p;", a, b, out=np.uint32)
        assert ordered.tolist() == [h and not u for h, u in zip(holds, unordered, strict=True)], name
        either = execute(f"setp.{name}u.{kind} p, a, b; selp.u32 d, 1, 0, p;", a, b, out=np.uint32)
        assert either.tolist() == [h or u for h, u in zip(holds, unordered, strict=True)], name
    assert execute(f"setp.nan.{kind} p, a, b; selp.u32 d, 1, 0, p;", a, b, out=np.uint32).tolist() == unordered
    assert execute(f"setp.num.{kind} p, a, b; selp.u32 d, 0, 1, p;", a, b, out=np.uint32).tolist() == unordered


def test_comparisons_flush_where_they_are_told():
    a, b = np.array([1, 1], np.uint32), np.array([0, 0x80000000], np.uint32)
    assert execute("setp.eq.f32 p, a, b; selp.u32 d, 1, 0, p;", a, b, out=np.uint32).tolist() == [0, 0]
    assert execute("setp.eq.ftz.f32 p, a, b; selp.u32 d, 1, 0, p;", a, b, out=np.uint32).tolist() == [1, 1]


def test_comparisons_combine_and_give_both_sides():
    a, b = np.array([1, 1, 2, 2], np.int32), np.array([1, 2, 1, 0], np.int32)
    less, odd = a < b, b % 2 == 1
    setup = "and.b32 t0, b, 1; setp.eq.b32 r, t0, 1; "
    for name, combine in (("and", np.logical_and), ("or", np.logical_or), ("xor", np.logical_xor)):
        for flip, third in (("", odd), ("!", ~odd)):
            code = f"{setup} setp.lt.{name}.s32 p|q, a, b, {flip}r; selp.u32 d0, 1, 0, p; selp.u32 d1, 1, 0, q;"
            result = execute(code, a, b, out=np.uint32, outputs=2)
            np.testing.assert_array_equal(result[0], combine(less, third))
            np.testing.assert_array_equal(result[1], combine(~less, third))


def test_signed_and_unsigned_comparisons_differ():
    a, b = np.array([-1], np.int32), np.array([1], np.int32)
    assert execute("setp.lt.s32 p, a, b; selp.u32 d, 1, 0, p;", a, b, out=np.uint32)[0] == 1
    assert execute("setp.lo.u32 p, a, b; selp.u32 d, 1, 0, p;", a, b, out=np.uint32)[0] == 0
