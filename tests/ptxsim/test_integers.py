"""Integer and bit instructions on edge values, against Python's integers."""

import itertools

import numpy as np
import pytest

from tests.ptxsim.instruction import execute

TYPES = {"s16": np.int16, "u16": np.uint16, "s32": np.int32, "u32": np.uint32, "s64": np.int64, "u64": np.uint64}
NUMBERS = [
    0,
    1,
    2,
    3,
    7,
    100,
    -1,
    -2,
    -7,
    1 << 7,
    1 << 15,
    (1 << 15) - 1,
    1 << 31,
    (1 << 31) - 1,
    0x12345678,
    1 << 63,
    (1 << 63) - 1,
]


def operands(kind, times):
    dtype = TYPES[kind]
    bits = 8 * np.dtype(dtype).itemsize
    values = sorted({v & ((1 << bits) - 1) for v in NUMBERS})
    unsigned = np.dtype(f"u{bits // 8}")
    return [
        np.array(column, unsigned).view(dtype) for column in zip(*itertools.product(values, repeat=times), strict=True)
    ]


def wrap(value, dtype):
    bits = 8 * np.dtype(dtype).itemsize
    value &= (1 << bits) - 1
    return value - (1 << bits) if np.dtype(dtype).kind == "i" and value >> (bits - 1) else value


def check(code, columns, out, model):
    result = execute(code, *columns, out=out)
    for got, *values in zip(result.tolist(), *(c.tolist() for c in columns), strict=True):
        expected = wrap(model(*values), out)
        assert got == expected, f"{code} of {values} is {got}, expected {expected}"


def quotient(a, b):
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


@pytest.mark.parametrize("kind", TYPES)
def test_arithmetic(kind):
    dtype = TYPES[kind]
    bits = 8 * np.dtype(dtype).itemsize
    pairs = operands(kind, 2)
    check(f"add.{kind} d, a, b;", pairs, dtype, lambda a, b: a + b)
    check(f"sub.{kind} d, a, b;", pairs, dtype, lambda a, b: a - b)
    check(f"mul.lo.{kind} d, a, b;", pairs, dtype, lambda a, b: a * b)
    check(f"mul.hi.{kind} d, a, b;", pairs, dtype, lambda a, b: a * b >> bits)
    check(f"min.{kind} d, a, b;", pairs, dtype, min)
    check(f"max.{kind} d, a, b;", pairs, dtype, max)
    triples = [c[::3] for c in operands(kind, 3)]
    check(f"mad.lo.{kind} d, a, b, c;", triples, dtype, lambda a, b, c: a * b + c)
    if bits == 16:
        return
    nonzero = [c[pairs[1] != 0] for c in pairs]
    check(f"div.{kind} d, a, b;", nonzero, dtype, quotient)
    check(f"rem.{kind} d, a, b;", nonzero, dtype, lambda a, b: a - b * quotient(a, b))


@pytest.mark.parametrize(("kind", "wide"), [("s16", "s32"), ("u16", "u32"), ("s32", "s64"), ("u32", "u64")])
def test_wide_products(kind, wide):
    a, b = operands(kind, 2)
    c = np.resize(operands(wide, 1)[0], len(a))
    check(f"mul.wide.{kind} d, a, b;", [a, b], TYPES[wide], lambda a, b: a * b)
    check(f"mad.wide.{kind} d, a, b, c;", [a, b, c], TYPES[wide], lambda a, b, c: a * b + c)


@pytest.mark.parametrize("kind", ["s16", "s32", "s64"])
def test_negation_and_magnitude(kind):
    check(f"neg.{kind} d, a;", operands(kind, 1), TYPES[kind], lambda a: -a)
    check(f"abs.{kind} d, a;", operands(kind, 1), TYPES[kind], abs)


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_logic_and_shifts(bits):
    kind, dtype, mask = f"u{bits}", TYPES[f"u{bits}"], (1 << bits) - 1
    pairs = operands(kind, 2)
    check(f"and.b{bits} d, a, b;", pairs, dtype, lambda a, b: a & b)
    check(f"or.b{bits} d, a, b;", pairs, dtype, lambda a, b: a | b)
    check(f"xor.b{bits} d, a, b;", pairs, dtype, lambda a, b: a ^ b)
    check(f"not.b{bits} d, a;", pairs[:1], dtype, lambda a: ~a & mask)
    (a,) = operands(kind, 1)
    counts = np.array([0, 1, 5, bits - 1, bits, bits + 1, 255, 0xFFFFFFFF], np.uint32)
    values, counts = np.repeat(a, len(counts)), np.tile(counts, len(a))
    shift = lambda n: min(n, bits)  # noqa: E731
    check(f"shl.b{bits} d, a, b;", [values, counts], dtype, lambda a, n: a << shift(n))
    check(f"shr.u{bits} d, a, b;", [values, counts], dtype, lambda a, n: a >> shift(n))
    signed = TYPES[f"s{bits}"]
    check(f"shr.s{bits} d, a, b;", [values.view(signed), counts], signed, lambda a, n: a >> shift(n))


@pytest.mark.parametrize("bits", [32, 64])
def test_bit_counting(bits):
    a = operands(f"u{bits}", 1)
    check(f"popc.b{bits} d, a;", a, np.uint32, lambda a: a.bit_count())
    check(f"clz.b{bits} d, a;", a, np.uint32, lambda a: bits - a.bit_length())


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_bit_fields(kind):
    bits, dtype = int(kind[1:]), TYPES[kind]
    places = [0, 1, 7, bits - 1, bits, 200, 256 + 3]
    (a,) = operands(kind, 1)
    columns = zip(*itertools.product(a.tolist(), places, places), strict=True)
    a, position, length = (np.array(c, t) for c, t in zip(columns, (dtype, np.uint32, np.uint32), strict=True))

    def extract(a, position, length):
        position, length = position & 255, length & 255
        top = min(position + length - 1, bits - 1)
        sign = kind[0] == "s" and length > 0 and a >> top & 1
        return sum((a >> (position + k) & 1 if k < length and position + k < bits else sign) << k for k in range(bits))

    check(f"bfe.{kind} d, a, b, c;", [a, position, length], dtype, extract)
    if kind[0] == "u":
        into = np.roll(a, 5)

        def insert(a, into, position, length):
            position, length = position & 255, length & 255
            for k in range(length):
                if position + k < bits:
                    into = into & ~(1 << (position + k)) | (a >> k & 1) << (position + k)
            return into

        check(f"bfi.b{bits} d, a, b, c, e;", [a, into, position, length], dtype, insert)


def test_permutation_of_bytes():
    a, b = np.array([0x83020100, 0x80FF7F01], np.uint32), np.array([0x07060504, 0x11223344], np.uint32)
    selectors = np.array([0x3210, 0x7654, 0x5410, 0x7632, 0xBBBB, 0x0B3F, 0x8888], np.uint32)
    columns = [
        np.array(c, np.uint32)
        for c in zip(*((x, y, s) for x, y in zip(a, b, strict=True) for s in selectors), strict=True)
    ]

    def permute(a, b, selector):
        both, result = b << 32 | a, 0
        for k in range(4):
            pick = selector >> 4 * k & 15
            byte = both >> 8 * (pick & 7) & 255
            result |= ((255 if byte & 128 else 0) if pick & 8 else byte) << 8 * k
        return result

    check("prmt.b32 d, a, b, c;", columns, np.uint32, permute)


def test_lop3_is_its_truth_table():
    rows = np.array([0xF0], np.uint32), np.array([0xCC], np.uint32), np.array([0xAA], np.uint32)
    for table in range(256):
        assert execute(f"lop3.b32 d, a, b, c, {table};", *rows, out=np.uint32)[0] & 0xFF == table


@pytest.mark.parametrize("mode", ["wrap", "clamp"])
def test_funnel_shifts(mode):
    a, b = operands("u32", 2)
    a, b, counts = np.repeat(a, 5), np.repeat(b, 5), np.tile(np.array([0, 1, 31, 32, 45], np.uint32), len(a))
    count = (lambda n: n & 31) if mode == "wrap" else (lambda n: min(n, 32))
    check(f"shf.l.{mode}.b32 d, a, b, c;", [a, b, counts], np.uint32, lambda a, b, n: (b << 32 | a) << count(n) >> 32)
    check(f"shf.r.{mode}.b32 d, a, b, c;", [a, b, counts], np.uint32, lambda a, b, n: (b << 32 | a) >> count(n))


def test_selection():
    a, b, c = np.array([1, 2, 3], np.int32), np.array([10, 20, 30], np.int32), np.array([-1, 0, 5], np.int32)
    assert execute("setp.lt.s32 p, c, 0; selp.b32 d, a, b, !p;", a, b, c, out=np.int32).tolist() == [10, 2, 3]


def test_moves_pack_and_unpack():
    a = np.array([0x1122334455667788], np.uint64)
    assert execute("mov.b64 {t0, t1}, a; mov.b64 d, {t1, t0};", a, out=np.uint64)[0] == 0x5566778811223344
    code = (
        ".reg .b16 h<4>; mov.b64 {h0, h1, h2, h3}, a; mov.b32 t0, {h3, h0}; mov.b32 {_, h2}, t0; mov.b32 d, {h2, h3};"
    )
    assert execute(code, a, out=np.uint32)[0] == 0x11227788


def test_predicates():
    a, b = np.array([0, 0, 1, 1], np.uint32), np.array([0, 1, 0, 1], np.uint32)
    setup = "setp.ne.u32 p, a, 0; setp.ne.u32 q, b, 0;"
    run = lambda code: execute(f"{setup} {code} selp.u32 d, 1, 0, r;", a, b, out=np.uint32).tolist()  # noqa: E731
    assert run("and.pred r, p, q;") == [0, 0, 0, 1]
    assert run("or.pred r, p, !q;") == [1, 0, 1, 1]
    assert run("xor.pred r, p, q;") == [0, 1, 1, 0]
    assert run("not.pred r, p;") == [1, 1, 0, 0]
    assert run("mov.pred r, q; @!p mov.pred r, -1;") == [1, 1, 0, 1]
