"""What the lanes of a warp do together: collectives, tensor-core fragments, divergence; and memory's finer points."""

import numpy as np
import pytest
import torch

from tests import ptxsim
from tests.ptxsim.instruction import execute

LANES = np.arange(32, dtype=np.uint32)


def draw(shape, seed=0):
    return np.random.default_rng(seed).integers(-8, 9, shape)


# Collectives


def shuffle_model(mode, lane, b, c):
    clamp, segment = c & 31, c >> 8 & 31
    last, first = (lane & segment) | (clamp & ~segment), lane & segment
    source = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": first | (b & ~segment)}[mode]
    inside = source >= last if mode == "up" else source <= last
    return (source, 1) if inside else (lane, 0)


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize("c", [0x1F, 0x00, 0x1807, 0x181F, 0x1800])
@pytest.mark.parametrize("b", [0, 1, 5, 16])
def test_shuffles(mode, b, c):
    code = f"shfl.sync.{mode}.b32 d0|p, a, {b}, {c}, -1; selp.u32 d1, 1, 0, p;"
    result = execute(code, LANES + 100, out=np.uint32, outputs=2)
    expected = [shuffle_model(mode, lane, b, c) for lane in range(32)]
    assert result[0].tolist() == [100 + source for source, _ in expected]
    assert result[1].tolist() == [inside for _, inside in expected]


def test_votes_and_reductions_over_members():
    odd = "and.b32 t0, a, 1; setp.eq.u32 p, t0, 1; mov.u32 t2, %laneid; shr.u32 t2, t2, 3; mul.lo.u32 t2, t2, 8; shl.b32 t1, 255, t2;"
    value = (LANES * 7919 % 64).astype(np.uint32)
    groups = value.reshape(4, 8)
    ballot = execute(f"{odd} vote.sync.ballot.b32 d, p, t1;", value, out=np.uint32)
    mask = sum((int(v) & 1) << lane for lane, v in enumerate(value))
    assert ballot.tolist() == [mask & (255 << lane // 8 * 8) for lane in range(32)]
    for name, model in (("all", all), ("any", any)):
        result = execute(f"{odd} vote.sync.{name}.pred q, p, t1; selp.u32 d, 1, 0, q;", value, out=np.uint32)
        assert result.tolist() == [model(groups[lane // 8] % 2 == 1) for lane in range(32)]
    signed = (value.astype(np.int32) - 32).reshape(4, 8)
    for name, model in (("add", np.sum), ("min", np.min), ("max", np.max)):
        result = execute(f"{odd} redux.sync.{name}.s32 d, b, t1;", value, signed.reshape(-1), out=np.int32)
        assert result.tolist() == [model(signed[lane // 8]) for lane in range(32)]
    bits = execute(f"{odd} redux.sync.xor.b32 d, a, t1;", value, out=np.uint32)
    assert bits.tolist() == [int(np.bitwise_xor.reduce(groups[lane // 8])) for lane in range(32)]
    matched = execute("match.any.sync.b32 d, a, -1;", value % 5, out=np.uint32)
    aliased = execute("mov.b32 d, a; match.any.sync.b32 d, d, -1;", value % 5, out=np.uint32)
    assert matched.tolist() == aliased.tolist()
    assert matched.tolist() == [sum(1 << k for k in range(32) if value[k] % 5 == value[lane] % 5) for lane in range(32)]


def test_a_lane_that_is_not_here_shuffles_all_ones():
    assert execute("shfl.sync.bfly.b32 d, a, 16, 31, -1;", LANES[:20], out=np.uint32).tolist() == [
        lane ^ 16 if lane ^ 16 < 20 else 0xFFFFFFFF for lane in range(20)
    ]


def test_active_mask_follows_divergence():
    code = "mov.u32 d, 0; and.b32 t0, a, 1; setp.eq.u32 p, t0, 1; @p bra ODD; activemask.b32 d; ODD: add.u32 d, d, 1;"
    assert execute(code, LANES, out=np.uint32).tolist() == [1 if lane % 2 else 0x55555556 for lane in range(32)]


# Divergence


def test_nested_divergence_meets_again():
    code = """
        mov.u32 d, 0; mov.u32 t0, 0;
        OUTER: mov.u32 t1, 0;
        INNER: add.u32 d, d, 1; add.u32 t1, t1, 1; setp.lt.u32 p, t1, t0; @p bra INNER;
        add.u32 t0, t0, 1; setp.lt.u32 p, t0, a; @p bra OUTER;
        vote.sync.ballot.b32 t2, 1, -1; popc.b32 t2, t2; mad.lo.u32 d, t2, 10000, d;
    """
    trips = lambda n: sum(max(t, 1) for t in range(max(n, 1)))  # noqa: E731
    assert execute(code, LANES, out=np.uint32).tolist() == [320000 + trips(lane) for lane in range(32)]


# Memory


def test_narrow_loads_extend_and_narrow_stores_cut():
    x = np.array([0x80, 0x7F, 0xFF], np.uint8)
    for kind, expected in (("u8", [0x80, 0x7F, 0xFF]), ("s8", [-128, 127, -1])):
        code = f"ld.param.u64 w0, [p0]; cvt.u64.u32 w1, %i; add.u64 w0, w0, w1; ld.global.{kind} d, [w0];"
        assert execute(code, x, out=np.int32).tolist() == expected
    code = "ld.param.u64 w0, [o0]; cvt.u64.u32 w1, %i; shl.b64 w1, w1, 2; add.u64 w0, w0, w1; st.global.u8 [w0+1], a; ld.global.u32 d, [w0];"
    assert execute(code, np.array([0x1FF, 0x102], np.uint32), out=np.uint32).tolist() == [0xFF00, 0x0200]


COPY = """
.version 8.0
.target sm_80
.address_size 64
.visible .entry copy(.param .u64 out, .param .u64 x, .param .u32 bytes)
{
    .reg .b32 %r<9>; .reg .b64 %rd<9>;
    .shared .align 16 .b8 buffer[1024];
    ld.param.u64 %rd1, [x]; ld.param.u64 %rd2, [out]; ld.param.u32 %r1, [bytes];
    mov.u32 %r2, %tid.x; mov.u32 %r3, buffer; mad.lo.u32 %r4, %r2, 16, %r3; mad.wide.u32 %rd3, %r2, 16, %rd1;
    COPIES
    ld.shared.v4.u32 {%r5, %r6, %r7, %r8}, [%r4];
    mad.wide.u32 %rd4, %r2, 16, %rd2; st.global.v4.u32 [%rd4], {%r5, %r6, %r7, %r8};
    ret;
}
"""


def copy(copies, bytes_, x):
    out = torch.zeros(4 * 32, dtype=torch.int32)
    ptxsim.load(COPY.replace("COPIES", copies)).kernel("copy").launch(1, 32, [out, x, bytes_])
    return out.view(32, 4)


@pytest.mark.parametrize("bytes_", [0, 4, 8, 16])
def test_cp_async_fills_with_zeros_and_reads_no_further(bytes_):
    x = torch.arange(1, 4 * 31 + bytes_ // 4 + 1, dtype=torch.int32)  # the last lane's 16 bytes are not all there
    out = copy("cp.async.cg.shared.global [%r4], [%rd3], 16, %r1; cp.async.wait_all;", bytes_, x)
    expected = torch.arange(1, 129, dtype=torch.int32).view(32, 4)
    expected[:, bytes_ // 4 :] = 0
    assert torch.equal(out, expected)


def test_cp_async_of_a_part_is_aligned_by_the_whole():
    x = torch.arange(1, 200, dtype=torch.int32)
    with pytest.raises(ptxsim.Misaligned, match="is 4 past a multiple of 16"):
        copy("cp.async.ca.shared.global [%r4], [%rd3+4], 16, 4; cp.async.wait_all;", 4, x)
    out = copy("cp.async.ca.shared.global [%r4], [%rd3], 16, 6; cp.async.wait_all;", 6, x)
    assert out[:2].tolist() == [[1, 2, 0, 0], [5, 6, 0, 0]]


def test_wait_group_lands_all_but_the_last_groups():
    x = torch.arange(1, 257, dtype=torch.int32)
    two = "cp.async.ca.shared.global [%r4], [%rd3], 16; cp.async.commit_group; cp.async.ca.shared.global [%r4+512], [%rd3+512], 16; cp.async.commit_group; "
    assert torch.equal(copy(two + "cp.async.wait_group 1;", 16, x), x[:128].view(32, 4))
    with pytest.raises(ptxsim.MissingWait):
        copy(two + "cp.async.wait_group 2;", 16, x)
    with pytest.raises(ptxsim.MissingWait):
        copy("cp.async.ca.shared.global [%r4], [%rd3], 16; cp.async.wait_group 0;", 16, x)  # no group was committed
    bypassed = ptxsim.ALL_CHECKS - {"waits", "unwritten"}
    out = torch.zeros(128, dtype=torch.int32)
    kernel = ptxsim.load(COPY.replace("COPIES", two + "cp.async.wait_group 2;")).kernel("copy")
    kernel.launch(1, 32, [out, x, 16], checks=bypassed)
    assert (out == -1).all()  # what the copy has not brought is poison


@pytest.mark.parametrize(
    ("operation", "start", "operands", "end"),
    [
        ("add.u32", 5, [7], 5 + 7 * 32),
        ("add.s32", 5, [-7], 5 - 7 * 32),
        ("min.s32", 5, [-7], -7),
        ("max.u32", 5, [7], 7),
        ("and.b32", 0b1101, [0b0111], 0b0101),
        ("or.b32", 0b1000, [0b0011], 0b1011),
        ("xor.b32", 5, [3], 5),
        ("exch.b32", 5, [9], 9),
        ("inc.u32", 0, [4], 2),
        ("cas.b32", 5, [5, 8], 8),
    ],
)  # fmt: skip
def test_atomics_act_one_lane_after_the_other(operation, start, operands, end):
    memory, old = torch.tensor([start], dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
    ptx = f"""
    .version 8.0
    .target sm_80
    .address_size 64
    .visible .entry atomics(.param .u64 memory, .param .u64 old)
    {{
        .reg .b32 %r<4>; .reg .b64 %rd<4>;
        ld.param.u64 %rd1, [memory]; ld.param.u64 %rd2, [old]; mov.u32 %r1, %tid.x;
        atom.global.{operation} %r2, [%rd1], {", ".join(map(str, operands))};
        mad.wide.u32 %rd2, %r1, 4, %rd2; st.global.u32 [%rd2], %r2;
    }}"""
    ptxsim.load(ptx).kernel("atomics").launch(1, 32, [memory, old])
    assert memory.item() == end
    assert old[0] == start


def test_a_constant_cannot_be_written():
    ptx = """
    .version 8.0
    .target sm_80
    .address_size 64
    .const .align 4 .b8 table[8] = {1, 0, 0, 0, 2};
    .visible .entry constant(.param .u64 out)
    {
        .reg .b32 %r<4>; .reg .b64 %rd<4>;
        ld.param.u64 %rd1, [out]; ld.const.u32 %r1, [table+4]; st.global.u32 [%rd1], %r1;
        mov.u64 %rd2, table;
        st.global.u32 [%rd2], %r1;
    }"""
    out = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ptxsim.OutOfBounds, match="writes 4 bytes at table .*, a constant"):
        ptxsim.load(ptx).kernel("constant").launch(1, 1, [out])
    assert out.item() == 2


# Tensor cores: fragments by the layouts of the PTX ISA

KINDS = {"f16": (torch.float16, 2), "bf16": (torch.bfloat16, 2), "tf32": (torch.float32, 1)}


def fragment(matrix, rows, kind):
    """Registers (register, lane) of A (rows = 16) or B^T (rows = 8): matrix (rows, K) in the kind's bits."""
    dtype, per = KINDS[kind]
    data = torch.tensor(matrix, dtype=torch.float32).to(dtype)
    registers = []
    for r in range(rows * matrix.shape[1] // 32 // per):
        row_half, k_half = (r % 2, r // 2) if rows == 16 else (0, r)
        row, column = LANES // 4 + 8 * row_half, LANES % 4 * per + 4 * per * k_half
        parts = torch.stack([data[row, column + e] for e in range(per)], 1).contiguous()
        registers.append(parts.view(torch.int32).flatten().numpy().view(np.uint32))
    return registers


def accumulator_place(r):
    return LANES // 4 + 8 * (r // 2), LANES % 4 * 2 + r % 2


@pytest.mark.parametrize(("kind", "K"), [("f16", 8), ("f16", 16), ("bf16", 8), ("bf16", 16), ("tf32", 4), ("tf32", 8)])
def test_mma(kind, K):
    A, B, C = draw((16, K)), draw((K, 8), 1), draw((16, 8), 2)
    a, b = fragment(A, 16, kind), fragment(B.T, 8, kind)
    c = [C[accumulator_place(r)].astype(np.float32).view(np.uint32) for r in range(4)]
    result = run_mma(f"mma.sync.aligned.m16n8k{K}.row.col.f32.{kind}.{kind}.f32", a, b, c)
    expected = A @ B + C
    for r in range(4):
        np.testing.assert_array_equal(result[r].view(np.float32), expected[accumulator_place(r)])


def run_mma(opcode, a, b, c):
    """The fragments come as one array each, since a probe has few inputs."""
    names = {"a": a, "b": b, "c": c}
    code, inputs = "", []
    for name, registers in names.items():
        for r, register in enumerate(registers):
            inputs.append(register)
            code += f".reg .b32 {name}{r};"
    table = np.concatenate(inputs).reshape(len(inputs), 32)
    flat = [f"{name}{r}" for name, registers in names.items() for r in range(len(registers))]
    loads = "ld.param.u64 w0, [p1]; mul.wide.u32 w1, %i, 4; add.u64 w0, w0, w1;"
    loads += "".join(f"ld.global.b32 {name}, [w0+{128 * k}];" for k, name in enumerate(flat))
    vector = lambda name, n: "{" + ", ".join(f"{name}{r}" for r in range(n)) + "}"  # noqa: E731
    mma = f"{opcode} {vector('d', 4)}, {vector('a', len(a))}, {vector('b', len(b))}, {vector('c', len(c))};"
    return execute(code + loads + mma, LANES, extra=table, out=np.uint32, outputs=4)


def test_tf32_ignores_the_low_bits_and_sums_run_in_the_order_of_k():
    # 1 + 2^-24 is lost against 1; with the small products first it would not be.
    A, B, C = np.zeros((16, 8)), np.ones((8, 8)), np.ones((16, 8))
    A[:, :2] = 2.0**-24
    result = run_mma(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32",
        [x | 0x1FFF for x in fragment(A, 16, "tf32")],
        fragment(B.T, 8, "tf32"),
        [C[accumulator_place(r)].astype(np.float32).view(np.uint32) for r in range(4)],
    )
    assert (result.view(np.float32) == 1).all()


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(transposed):
    matrices = np.arange(4 * 64, dtype=np.uint16).reshape(4, 8, 8)
    trans = ".trans" if transposed else ""
    code = f"""
        .shared .align 16 .b8 tile[512];
        ld.param.u64 w0, [p1]; mul.wide.u32 w1, %i, 16; add.u64 w0, w0, w1; ld.global.v4.b32 {{t0, t1, t2, t3}}, [w0];
        mov.u32 t4, tile; mad.lo.u32 t4, %i, 16, t4; st.shared.v4.b32 [t4], {{t0, t1, t2, t3}}; bar.warp.sync -1;
        ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{d0, d1, d2, d3}}, [t4];
    """
    result = execute(code, LANES, extra=matrices, out=np.uint32, outputs=4)
    for j in range(4):
        matrix = matrices[j].T if transposed else matrices[j]
        expected = np.ascontiguousarray(matrix).view(np.uint32)
        np.testing.assert_array_equal(result[j], expected[LANES // 4, LANES % 4])


@pytest.mark.parametrize(
    "instruction",
    [
        "ld.global.nc.L1::no_allocate.L2::128B.b32 t0, [w0]; mov.b32 d, t0;",
        "createpolicy.fractional.L2::evict_last.b64 w1, 1.0; ld.global.L1::evict_last.L2::cache_hint.b32 d, [w0], w1;",
        "ld.volatile.global.u32 d, [w0];",
        "ld.acquire.gpu.global.u32 d, [w0];",
        "ld.relaxed.sys.global.u32 d, [w0];",
        "ld.cv.u32 d, [w0];",
        "prefetch.global.L2 [w0]; fence.acq_rel.gpu; membar.gl; ld.global.ca.u32 d, [w0+0];",
        "atom.relaxed.gpu.global.add.u32 d, [w0], 0;",
        "red.release.gpu.global.add.u32 [w0], 0; barrier.sync.aligned 0; ld.global.cg.u32 d, [w0];",
        "st.global.cs.u32 [w0], 77; ld.global.lu.u32 d, [w0];",
        ".shared .align 16 .b8 s[16]; mov.u32 t0, s; cp.async.ca.shared.global.L2::128B [t0], [w0], 4; cp.async.wait_all; ld.shared.u32 d, [t0];",
    ],
)  # fmt: skip
def test_hints_orderings_and_scopes_are_accepted(instruction):
    code = "ld.param.u64 w0, [p1];" + instruction
    assert execute(code, LANES[:1], extra=np.array([77], np.uint32), out=np.uint32).tolist() == [77]
