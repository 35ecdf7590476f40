"""Planted faults: each is found and named, and goes unreported when its detector is off."""

import pickle
import re
import struct

import numpy as np
import pytest
import torch

from tests import ptxsim
from tests.ptxsim import ALL_CHECKS, Named, Out, core
from tests.ptxsim.probes import FOLDER, NEEDS_NVCC, cuda_kernel

pytestmark = NEEDS_NVCC

LINES = (FOLDER / "faults.cu").read_text().splitlines()


def line_of(code, after):
    """The line of faults.cu with this code, in the kernel ``after``."""
    start = next(i for i, line in enumerate(LINES) if re.search(rf"__global__ void {after}\(", line))
    return next(i for i in range(start, len(LINES)) if code in LINES[i]) + 1


def launch(name, checks=ALL_CHECKS, *, grid=1, block=64, extra=(), shared=0, wrap=lambda x: x, seed=0, steps=100_000):
    x = torch.arange(1, 65 * grid, dtype=torch.float32)[: 64 * grid]
    out = torch.zeros(64)
    kernel = cuda_kernel(name, "faults.cu")
    return kernel.launch(
        grid, block, [wrap(out), x, *extra], shared=shared, checks=checks, seed=seed, max_instructions=steps
    )


# kernel, launch options, detector, what it raises, its sentence, the guilty code, thread (None: any)
FAULTS = [
    ("off_by_one", {}, "bounds", ptxsim.OutOfBounds, r"reads 4 bytes at 1 \+ 256 \(of 256 bytes\)", "x[threadIdx.x + 1]", 63),
    ("before_the_start", {}, "bounds", ptxsim.OutOfBounds, r"reads 4 bytes at 1 - 4", "x[int(", 0),
    ("store_past_the_end", {}, "bounds", ptxsim.OutOfBounds, r"writes 4 bytes at 0 \+ 256", "out[2 * ", 32),
    ("misaligned", {}, "alignment", ptxsim.Misaligned, r"reads 16 bytes at an address that is 4 past a multiple of 16", "float4 v", 0),
    ("shared_overrun", {"shared": 256}, "bounds", ptxsim.OutOfBounds, r"writes 4 bytes at shared memory \+ 256 \(of 256", "s[threadIdx.x + 1] = ", 63),
    ("local_overrun", {"extra": [5]}, "bounds", ptxsim.OutOfBounds, r"local memory \+ 16 \(of 16 bytes\)", "last[k] = x[k]", 0),
    ("missing_syncthreads", {}, "races", ptxsim.SharedRace, r"shared memory \+ \d+, which thread \d+ (wrote|read), without a barrier between", None, None),
    ("missing_syncthreads_before_reuse", {}, "races", ptxsim.SharedRace, r"which thread \d+ (wrote|read), without a barrier", None, None),
    ("two_writers", {}, "races", ptxsim.SharedRace, r"writes shared memory \+ 0, which thread", "s[0] = x", None),
    ("reads_a_counter", {"extra": [0]}, "races", ptxsim.SharedRace, r"shared memory \+ 0, which thread \d+ (read|updated), without a barrier", None, None),
    ("weak_handshake", {"seed": 2}, "races", ptxsim.SharedRace, r"reads shared memory \+ 0, which thread 32 wrote", "volatile int*)&ready", 0),
    ("missing_syncwarp", {}, "races", ptxsim.SharedRace, r"without bar.warp.sync between", "s[threadIdx.x ^ 1]", None),
    ("missing_wait", {}, "waits", ptxsim.MissingWait, r"reads shared memory \+ \d+ while a cp.async to it is in flight", "= reinterpret_cast", None),
    ("wait_for_one_group_too_few", {}, "waits", ptxsim.MissingWait, r"in flight", "= reinterpret_cast", None),
    ("wait_without_barrier", {"seed": 1}, None, ptxsim.Fault, r"shared memory", "= reinterpret_cast", None),
    ("unwritten_shared", {}, "unwritten", ptxsim.UnwrittenShared, r"reads shared memory \+ 28, which nobody wrote", "= s[threadIdx.x]", 7),
    ("divergent_barrier", {}, "barriers", ptxsim.DivergentBarrier, r"is not at the barrier", "__syncthreads()", None),
    ("divergent_shuffle", {}, "barriers", ptxsim.DivergentBarrier, r"with lanes that are elsewhere", None, None),
    ("ldmatrix", {"extra": [8]}, "alignment", ptxsim.Misaligned, r"reads 16 bytes at an address that is 8 past", "shared_address(s) +", 0),
    ("ldmatrix", {"extra": [32]}, "bounds", ptxsim.OutOfBounds, r"reads 16 bytes at shared memory \+ 144 \(of 144 bytes\)", "shared_address(s) +", None),
    ("two_blocks_one_address", {"grid": 2}, "blocks", ptxsim.BlockConflict, r"writes 0 \+ \d+ \(of 256 bytes\), which block \d wrote", "out[threadIdx.x] =", None),
    ("reads_another_block", {"grid": 2}, "blocks", ptxsim.BlockConflict, r"which block \d (wrote|read) in the same launch", None, None),
    ("reads_what_others_add", {"grid": 2}, "blocks", ptxsim.BlockConflict, r"which block \d (read|updated) in the same launch", None, None),
    ("stores_what_others_add", {"grid": 2}, "blocks", ptxsim.BlockConflict, r"which block \d (wrote|updated) in the same launch", None, None),
    ("reads_its_output", {"wrap": Out}, "poison", ptxsim.PoisonRead, r"reads 0 \+ \d+ \(of 256 bytes\), an output that nobody has written", "+=", None),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "check", "kind", "sentence", "code", "thread"), FAULTS)
def test_fault_is_found_and_named(name, options, check, kind, sentence, code, thread):
    with pytest.raises(kind) as caught:
        launch(name, **options)
    fault = caught.value
    assert re.search(sentence, fault.what), fault.what
    assert name in fault.kernel
    assert fault.ptx_line > 0
    assert fault.block in [(b, 0, 0) for b in range(options.get("grid", 1))]
    if code is not None:
        assert fault.source.endswith(f"faults.cu:{line_of(code, name)}"), str(fault)
    if thread is not None:
        assert fault.thread == (thread, 0, 0)


@pytest.mark.parametrize(("name", "options", "check"), [fault[:3] for fault in FAULTS if fault[2]])
def test_fault_is_not_found_without_its_detector(name, options, check):
    launch(name, ALL_CHECKS - {check}, **options)


def test_wait_without_barrier_is_found_whatever_the_order_of_warps():
    kinds = set()
    for seed in range(8):
        with pytest.raises((ptxsim.SharedRace, ptxsim.UnwrittenShared)) as caught:
            launch("wait_without_barrier", seed=seed)
        kinds.add(type(caught.value))
    assert kinds == {ptxsim.SharedRace, ptxsim.UnwrittenShared}  # after the copy has landed, or before it was begun


def test_missing_barrier_before_reuse_is_found_whatever_the_order_of_warps():
    for seed in range(8):
        with pytest.raises(ptxsim.SharedRace):
            launch("missing_syncthreads_before_reuse", seed=seed)


def test_arriving_orders_what_came_before_it_alone():
    for seed in range(8):
        with pytest.raises(ptxsim.Fault) as caught:
            launch("writes_after_arriving", seed=seed)
        assert caught.type in (ptxsim.SharedRace, ptxsim.UnwrittenShared)  # the reader came second, or first


@pytest.mark.parametrize("seed", range(4))
def test_reading_a_counter_is_ordered_with_every_update(seed):
    with pytest.raises(ptxsim.SharedRace):
        launch("reads_a_counter", extra=[0], seed=seed)
    launch("reads_a_counter", extra=[1], seed=seed)
    with pytest.raises(ptxsim.SharedRace):
        launch("reads_after_one_of_two", block=96, seed=seed)


@pytest.mark.parametrize("seed", range(4))
def test_strong_accesses_do_not_conflict(seed):
    launch("handshake", seed=seed, steps=10_000_000)
    launch("all_add", grid=3, seed=seed)


@pytest.mark.parametrize(("limit", "fits"), [(99, 99), (163, 163), (227, 227)])
def test_shared_memory_beyond_the_limit(limit, fits):
    launch_bytes = {"shared": fits * 1024 + 4}
    x, out = torch.ones(64), torch.zeros(64)
    kernel = cuda_kernel("shared_overrun", "faults.cu")
    with pytest.raises(ptxsim.SharedLimit, match=f"wants {fits * 1024 + 4} bytes .* the limit is {limit * 1024}"):
        kernel.launch(1, 64, [out, x], **launch_bytes, shared_limit=limit * 1024)
    kernel.launch(1, 64, [out, x], **launch_bytes, shared_limit=limit * 1024, checks=ALL_CHECKS - {"limit"})
    kernel.launch(1, 64, [out, x], shared=fits * 1024, shared_limit=limit * 1024)


@pytest.mark.parametrize(
    ("name", "kind", "sentence"),
    [
        ("barrier_for_too_many", ptxsim.Stuck, "waits at a barrier that nobody completes"),
        ("endless", ptxsim.Stuck, "as many instructions as max_instructions allows"),
        ("failing_assert", ptxsim.Trapped, "a device assert failed"),
        ("trapping", ptxsim.Trapped, "the kernel trapped"),
    ],
)
def test_what_no_switch_silences(name, kind, sentence):
    with pytest.raises(kind, match=sentence):
        launch(name, frozenset())


UNKNOWN = """
.version 8.0
.target sm_80
.address_size 64
.visible .entry unknown(.param .u64 unknown_param_0)
{
    .reg .b32 %r<4>;
    mov.u32 %r1, %tid.x;
    OPCODE
    ret;
}
"""


@pytest.mark.parametrize(
    "instruction",
    [
        "dp4a.u32.u32 %r1, %r1, %r1, %r1;",
        "add.sat.u32 %r1, %r1, %r1;",
        "add.u32 %r1, %r1;",
        "add.u32 %r1, %r1, %r1, %r1;",
        "ret %r1;",
        "ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r1}, [%r2];",
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%r1, %r2, %r1, %r2}, {%r1}, {%r1, %r2}, {%r1, %r2, %r1, %r2};",
        "ld.global.v8.b32 {%r1, %r1, %r1, %r1, %r1, %r1, %r1, %r1}, [%r2];",
        "add.f31 %r1, %r1, %r1;",
        "ld.global.L3::evict.u32 %r1, [%r2];",
        "mov.u32 %r1, %clock;",
        "mov.u32 %r1, nowhere;",
        "add.u32 %r1, %q9, %r1;",
        "mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32 {%r1}, {%r1}, {%r1}, {%r1};",
        "bra nowhere;",
        "call.uni vprintf, (%r1, %r2);",
    ],
)
def test_unknown_instruction_is_refused_with_its_line(instruction):
    module = ptxsim.load(UNKNOWN.replace("OPCODE", instruction))
    with pytest.raises(ptxsim.Unsupported, match=re.escape(instruction.rstrip(";")) + ".*, PTX line 9"):
        module.kernel("unknown")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"args": [torch.zeros(1)]}, "takes 2 arguments, 1 were given"),
        ({"args": [torch.zeros(1), b"123"]}, "1 of off_by_one has 8 bytes"),
        ({"args": [torch.zeros(1), 1.5]}, "1 is a .u64 of 8 bytes, which cannot hold 1.5"),
        ({"args": [torch.zeros(1), [0]]}, r"1 is a .u64 of 8 bytes, which cannot hold \[0\]"),
        ({"args": [torch.zeros(1, device="meta"), None]}, "0 is on meta"),
        ({"block": (100, 20)}, "cannot run 2000 threads a block"),
        ({"grid": 0}, "a grid of 0: at least 1, at most"),
        ({"grid": (1, 70000)}, r"a grid of \(1, 70000\): at least 1, at most"),
        ({"block": (1, 1, 128)}, r"a block of \(1, 1, 128\): at least 1, at most"),
        ({"shared": -16}, "-16 bytes of dynamic shared memory"),
        ({"shared": 2**40}, "bytes of dynamic shared memory"),
        ({"checks": {"everything"}}, r"no such checks: \['everything'\]"),
    ],
)
def test_wrong_launches_are_refused(options, message):
    good = {"grid": 1, "block": 64, "args": [torch.zeros(64), torch.zeros(65)]}
    with pytest.raises(ValueError, match=message):
        cuda_kernel("off_by_one", "faults.cu").launch(**{**good, **options})


def test_views_of_one_storage_share_a_report_and_its_smallest_element():
    doubles = torch.zeros(64, dtype=torch.float64)
    kernel = cuda_kernel("two_blocks_one_address", "faults.cu")
    out, x = doubles.view(torch.float32).split(64)
    report = kernel.launch(1, 64, [Named("out", out), Named("x", x)], tensors={"all": doubles})
    assert report.params["out"] is report.params["x"] is report.params["all"]
    assert report.global_load.bytes == 256
    with pytest.raises(ValueError, match="two tensors are called out"):
        kernel.launch(1, 64, [Named("out", out), Named("out", torch.zeros(64))])


def test_a_fault_is_a_value():
    with pytest.raises(ptxsim.OutOfBounds) as caught:
        launch("off_by_one")
    fault = caught.value
    assert str(pickle.loads(pickle.dumps(fault))) == str(fault)
    assert {fault: 1}[fault] == 1


SCALARS = """
.version 8.0
.target sm_80
.address_size 64
.visible .entry scalars(.param .u64 out, .param .f32 a, .param .s32 b, .param .u16 c, .param .f64 d)
.maxntid 32
{
    .reg .f32 %f1; .reg .b32 %r1; .reg .b16 %h1; .reg .f64 %d1; .reg .b64 %rd1;
    ld.param.u64 %rd1, [out]; ld.param.f32 %f1, [a]; ld.param.s32 %r1, [b]; ld.param.u16 %h1, [c]; ld.param.f64 %d1, [d];
    st.global.f32 [%rd1], %f1; st.global.u32 [%rd1+4], %r1; st.global.u16 [%rd1+8], %h1; st.global.f64 [%rd1+16], %d1;
}
"""


def launch_scalars(*scalars, block=1):
    out = torch.zeros(24, dtype=torch.uint8)
    ptxsim.load(SCALARS).kernel("scalars").launch(np.int64(1), block, [out, *scalars])
    return struct.unpack("<fiH6xd", out.numpy().tobytes())


def test_scalars_are_stored_as_their_parameters_say():
    assert launch_scalars(2, -3, 7, 5) == (2, -3, 7, 5)
    assert launch_scalars(np.float64(0.5), np.int64(2**32 - 1), True, np.float32(2)) == (0.5, -1, 1, 2)
    for position, value in ((1, "x"), (2, 3.0), (2, 2**40), (2, None), (3, 65536), (3, -40000), (4, torch.zeros(1))):
        scalars = [2, 3, 4, 5]
        scalars[position - 1] = value
        with pytest.raises(ValueError, match=f"{position} is a .*, which cannot hold"):
            launch_scalars(*scalars)
    with pytest.raises(ValueError, match="cannot run 64 threads a block; it requires 1 to 32"):
        launch_scalars(2, 3, 4, 5, block=64)


def test_an_unfinished_body_is_refused():
    unfinished = UNKNOWN.replace("OPCODE", "").replace("ret;", "ret")
    with pytest.raises(ptxsim.Unsupported, match="^ret }, PTX line 10$"):
        ptxsim.load(unfinished).kernel("unknown")


@pytest.mark.parametrize("compiler", ["no-such-compiler", "env no-such-compiler"])
def test_a_compiler_that_is_missing_is_named(compiler, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setattr(core, "CACHE", tmp_path)
    failure = core._build.__wrapped__()
    assert isinstance(failure, RuntimeError)
    assert "no-such-compiler" in str(failure)


def test_a_barrier_for_all_threads_may_be_met_with_their_number():
    for seed in range(4):
        launch("barrier_with_and_without_a_count", seed=seed)


def test_registers_do_not_survive_a_block():
    kernel = ptxsim.load(
        UNKNOWN.replace(
            "OPCODE",
            ".reg .pred %p1; .reg .b64 %rd1; mov.u32 %r1, %ctaid.x; setp.eq.u32 %p1, %r1, 0; @%p1 mov.u32 %r2, 7;"
            " ld.param.u64 %rd1, [unknown_param_0]; mad.wide.u32 %rd1, %r1, 4, %rd1; st.global.u32 [%rd1], %r2;",
        )
    ).kernel("unknown")
    for seed in range(4):
        out = torch.zeros(4, dtype=torch.int32)
        kernel.launch(4, 1, [out], seed=seed)
        assert out.tolist() == [7, -1, -1, -1]
