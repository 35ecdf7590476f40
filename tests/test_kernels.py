"""The Triton kernels: interpreted, compiled ahead of time, executed in the PTX simulator, and on a GPU where there is one."""

import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from bda_fused.kernels import autotune, sums, tiles
from bda_fused.kernels.launch import KIB, Launch, Target, has_padded_rows, layout, readable_width

from bda_fused import functional as F
from bda_fused.backends import triton as backend
from tests import gpu_resources
from tests.attention_cases import FORMS, Case, assert_parity, rsa, ssa, vsa
from tests.simulated_kernels import SM80, simulated

ROOT = Path(__file__).parent.parent
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def test_under_the_interpreter():
    """interpreted_kernels.py in a process of its own: the interpreter replaces the kernels when they are imported."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/interpreted_kernels.py"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout[-3000:]
    assert int(re.search(r"(\d+) passed", result.stdout)[1]) >= 80


@pytest.mark.parametrize("name", FORMS)
def test_compiled_form(name):
    """Every form through the public function, forward and backward, as sm_80 PTX in the simulator: no fault."""
    with simulated() as reports:
        assert_parity(FORMS[name], "triton")
    assert reports


@pytest.mark.parametrize(
    "case",
    [ssa(1, 33, 40, 64), vsa(2, 17, 84, 129), rsa(2, 13, 20), ssa(2, 5, 520, 33)],
    ids=lambda case: str(case.key),
)
def test_float32_at_high_is_rounded_to_tf32(case):
    """By the rule, whose yardstick rounds its factors there; tensor cores alone would cut them off."""
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        with simulated():
            assert_parity(case.but(dtype=torch.float32), "triton")
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", FORMS)
def test_compiled_form_in_other_dtypes(name, dtype):
    with simulated():
        assert_parity(FORMS[name].but(dtype=dtype), "triton")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("bias_by_row", [False, True])
@pytest.mark.parametrize("keys", [16, 102, 128, 144, 196, 240, 304, 312, 400, 512, 600])
def test_compiled_tile(keys, bias_by_row, dropout_p, dtype):
    """Every entry of the table that sm_80 has for rows that are not padded, with a last tile that is not full and a width
    that no step divides.
    """
    bias = (35, keys) if bias_by_row else (keys,)
    shapes = (2, 35, 45), (keys, 45), (keys, 37), (2, 35, 37), bias
    with simulated():
        assert_parity(Case(*shapes, dropout_p=dropout_p, need_weights=True, dtype=dtype), "triton")


def padded(x):
    """The rows of a folded operand."""
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % 32))[..., : x.shape[-1]]


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_compiled_tile_of_padded_rows(dropout_p, monkeypatch):
    """305 to 320 keys have tiles of their own where the rows of keys and values are padded."""
    shapes = (2, 75, 45), (312, 45), (312, 37), (2, 75, 37), (312,)
    heights = []

    def noting(choose):
        def chosen(*args, **options):
            tile = choose(*args, **options)
            heights.append(tile.rows)
            return tile

        return chosen

    for name in ("forward", "backward"):
        monkeypatch.setattr(tiles, name, noting(getattr(tiles, name)))
    with simulated():
        assert_parity(Case(*shapes, dropout_p=dropout_p, layout={"key": padded, "value": padded}), "triton")
    assert heights == [64 if dropout_p else 128] * 2


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", FORMS)
def test_form_on_a_gpu(name, dtype):
    assert_parity(FORMS[name].but(dtype=dtype), "triton", device="cuda")


def train(batch, *, attributes=21, regions=6, dim=20, dropout_p=0.0):
    """One step of SSA with a key bias, and of VSA, for so many images."""
    leaves = [torch.randn(*shape, dtype=torch.bfloat16, requires_grad=True) for shape in
              ((batch, regions, dim), (attributes, dim), (attributes, dim))]  # fmt: skip
    bias = torch.randn(attributes, requires_grad=True)
    refined = F.ssa(leaves[0], leaves[1], leaves[2], leaves[0], attn_bias=bias, dropout_p=dropout_p, backend="triton")
    y = F.vsa(leaves[1], refined, refined, leaves[2], backend="triton")
    return torch.autograd.grad(y.sin().sum(), [*leaves, bias])


@pytest.mark.parametrize("sizes", [{}, {"attributes": 312, "regions": 312, "dim": 32}], ids=["small", "padded rows"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_no_batch_size_compiles_anything_anew(dropout_p, sizes, monkeypatch):
    """What the compiler sees of the launches of a training step is the same for one image and for eight."""
    monkeypatch.setattr(backend, "can_run", lambda problem: None)
    seen = []
    monkeypatch.setattr(Launch, "run", lambda launch: seen.append(launch))
    keys = []
    for batch in range(1, 9):
        seen.clear()
        train(batch, dropout_p=dropout_p, **sizes)
        keys.append({(launch.kernel.__name__, repr(launch.specialization()), repr(launch.options)) for launch in seen})
    assert all(key == keys[-1] for key in keys[1:])
    assert keys[0] <= keys[-1]  # with one image there are no sums over images


def test_results_do_not_depend_on_the_order_of_blocks():
    """Partial sums, ordered sums and the bias gradient are bit-identical however the simulator shuffles the blocks."""
    results = []
    for seed in (0, 1, 2):
        torch.manual_seed(5)
        with simulated(seed=seed) as reports:
            results.append(train(48, attributes=21, regions=30, dropout_p=0.2))
    assert any(name == "residual_attention_ordered_sum" for name, _ in reports)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@pytest.mark.parametrize(
    "columns", [1, 16, 49, 85, 102, 128, 129, 196, 208, 209, 224, 256, 257, 312, 320, 321, 400, 512]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("bias_by_row", [False, True])
@pytest.mark.parametrize("capability", [80, 90, 100, 120])
def test_blocks_hold_a_score_row_and_only_the_last_reaches_beyond(columns, dtype, dropped, bias_by_row, capability):
    target = Target(capability, 99 * KIB)
    for width, lean in product((350, 377), (False, True)):
        ahead = tiles.forward(target, dtype, columns, width, dropped=dropped, bias_by_row=bias_by_row, lean=lean)
        back = tiles.backward(target, dtype, columns, width, dropped=dropped, lean=lean)
        assert back.columns == tiles.pitch(columns), "gradients of scores fill their scratch"
        assert tiles.pitch(columns) < columns + (16 if columns <= 208 else 64)
        for tile in (ahead, back):
            assert columns <= tile.columns < columns + tile.groups[-1][-1]
            assert all(block >= 16 and block & (block - 1) == 0 for group in tile.groups for block in group)
            assert tile.rows >= 16


def test_what_is_compiled_in_of_strides():
    packed = torch.empty(2, 1, 5, 350)
    assert layout(packed) == (2, 350)
    assert readable_width(packed) == 350
    padded = torch.empty(2, 1, 5, 352)[..., :350]
    assert layout(padded) == (16, 352)
    assert readable_width(padded) == 352
    assert readable_width(torch.empty(5 * 352 - 2).as_strided((1, 1, 5, 350), (0, 0, 352, 1))) == 350, "it ends early"
    assert layout(torch.empty(5, 2, 1, 350).permute(1, 2, 0, 3)) == (2, 0)
    assert layout(packed.expand(2, 3, 5, 350)) == (2, 350)


def test_which_rows_are_padded():
    padded_rows = torch.empty(2, 1, 5, 352)[..., :350]
    assert has_padded_rows(padded_rows)
    assert has_padded_rows(padded_rows[:1].expand(2, 1, 5, 350)), "rows that images share"
    assert not has_padded_rows(torch.empty(2, 1, 5, 350)), "not aligned"
    assert not has_padded_rows(torch.empty(2, 1, 5, 368)[..., 1:351]), "they begin beside an aligned address"
    assert not has_padded_rows(torch.empty(5 * 352 - 2).as_strided((1, 1, 5, 350), (0, 0, 352, 1))), "it ends early"
    assert not has_padded_rows(torch.empty(2, 1, 5, 400)[..., :350]), "the kernel does not know their distance"


def test_offsets_past_the_32_bit_range_are_computed_in_64_bits():
    """The operands of a group begin at 64-bit offsets, so only a distance within a tile must fit into 32 bits."""
    from bda_fused.kernels.launch import Rows

    huge = torch.empty(3, 1, 2**20, 2048, device="meta")
    rows = Rows((3, 1, 2**20, 64), keys=(torch.empty(1, 1, 64, 2048, device="meta"),), rows=(huge,))
    assert not rows.divided
    assert rows.length == 3 * 2**20
    assert rows.strides(huge, "b h l") == {"b": 0, "h": 0, "l": 2048}
    keys, far = torch.empty(1, 1, 64, 8, device="meta"), torch.empty(1, device="meta")
    for step, divided in ((2**24 - 1, False), (2**24, True)):
        operand = far.as_strided((1, 1, 128, 8), (0, 0, step, 1))
        assert Rows((1, 1, 128, 64), keys=(keys,), rows=(operand,)).divided is divided
    assert sums._splits(1, 2**24, least=8) * 2**24 < 2**31


def test_every_capability_has_a_tile_within_its_shared_memory():
    """docs/gpu_resources.md has the bytes of every entry; sm_86 and sm_89, with 99 KiB, run what sm_80 runs."""
    rows = gpu_resources.read()
    assert {row["GPU"] for row in rows} == set(gpu_resources.GPUS)
    for row in rows:
        _, limit, _ = gpu_resources.GPUS[row["GPU"]]
        assert float(row["shared KiB"]) <= (99 if row["GPU"] == "sm_80" else limit), row


def test_a_gpu_with_99_kib_gets_a_tile_that_fits():
    """sm_86 and sm_89, in float32 and with more than 320 keys."""
    target = Target(86, 99 * KIB)
    case = gpu_resources.CASES["SSA, A=400, C=350, fp32"]
    for launch in gpu_resources.launches(case, torch.float32, target)[:2]:
        assert launch.compile(target).metadata.shared <= target.shared_memory


def test_kernels_keep_everything_in_registers():
    """Every row of docs/gpu_resources.md."""
    for row in gpu_resources.read():
        assert row["spilled bytes"] == "0", row
        assert int(row["registers"]) >= 16, f"the compiler left nothing of it: {row}"


@pytest.mark.parametrize(
    ("gpu", "name"),
    [
        ("sm_80", "SSA, A=102, C=350"),
        ("sm_80", "VSA, A=312, C=350"),
        ("sm_90", "S=600, C=350, fp32"),
        ("sm_100", "SSA, A=312, C=350, fp32"),
        ("sm_120", "SSA, A=312, C=350"),
    ],
)
def test_the_assembler_reports_what_the_document_says(gpu, name):
    assert gpu_resources.rows(gpu, name) == [
        row for row in gpu_resources.read() if (row["GPU"], row["case"]) == (gpu, name)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("gpu", ["sm_80", "sm_90", "sm_100", "sm_120"])
def test_the_assembler_reports_what_the_document_says_of_everything(gpu):
    rows = [row for name in gpu_resources.CASES for row in gpu_resources.rows(gpu, name)]
    assert rows == [row for row in gpu_resources.read() if row["GPU"] == gpu]


def test_autotuning_is_off_unless_the_environment_asks_for_it(monkeypatch):
    started = []
    monkeypatch.setattr(Launch, "start", lambda launch: started.append(launch))
    monkeypatch.setattr(autotune, "fastest", lambda launch, target: pytest.fail("it timed a launch"))
    launch = gpu_resources.launches(gpu_resources.CASES["SSA, A=102, C=350"], torch.bfloat16, SM80)[0]
    launch.run()
    assert started == [launch]
    code = "from bda_fused.kernels import autotune; print(autotune.ENABLED)"
    for value, expected in (("1", "True"), ("0", "False")):
        environment = os.environ | {"BDA_FUSED_AUTOTUNE": value}
        result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert result.stdout.strip() == expected, result.stderr


def test_autotuning_takes_the_fastest_neighbour_that_fits(monkeypatch):
    monkeypatch.setattr(autotune, "_fastest", {})
    launch = gpu_resources.launches(gpu_resources.CASES["SSA, A=102, C=350"], torch.bfloat16, SM80)[0]
    found = autotune.candidates(launch, SM80)
    assert found[0] is launch and len(found) >= 4
    assert all(each.compile(SM80).metadata.shared <= SM80.shared_memory for each in found)
    small = Target(80, launch.compile(SM80).metadata.shared)
    assert len(autotune.candidates(launch, small)) < len(found)
    monkeypatch.setattr(Launch, "start", lambda each: each)
    chosen = autotune.fastest(launch, SM80, time=lambda start: -float(start().constants["BLOCK_DK"]))
    assert chosen.constants == launch.constants | {"BLOCK_DK": 2 * launch.constants["BLOCK_DK"]}
    timed = autotune.fastest(launch, SM80, time=lambda start: pytest.fail("it timed a launch of a kind it knows"))
    assert timed.constants == chosen.constants


def test_autotuning_keeps_what_the_grid_rests_on():
    """Of long score rows every program computes BLOCK_DV columns: with another step some would not be computed."""
    long = gpu_resources.CASES["SSA, A=102, C=350"].but(key=(601, 350), value=(601, 350), bias=(601,))
    launch = gpu_resources.launches(long, torch.bfloat16, SM80)[0]
    found = autotune.candidates(launch, SM80)
    assert len(found) > 1
    assert {each.constants["BLOCK_DV"] for each in found} == {launch.constants["BLOCK_DV"]}


def test_refuses_old_gpus_and_other_devices_in_one_sentence(monkeypatch):
    from bda_fused.backends.problem import Problem

    problem = Problem((1, 1, 2, 3), torch.float32, torch.float32, torch.device("cuda", 0), (8, 8))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert backend.can_run(problem) == "the triton backend needs an NVIDIA GPU and torch finds none"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert backend.can_run(problem) == (
        "the triton backend needs a GPU of compute capability 8.0 or newer, cuda:0 has 7.5"
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert backend.can_run(problem) is None
    most, many = (
        Problem((1, 1, rows, 3), torch.float32, torch.float32, torch.device("cuda", 0), (8, 8))
        for rows in (2**31 - 128, 2**31 - 127)
    )
    assert backend.can_run(most) is None
    assert backend.can_run(many) == "the triton backend takes at most 2147483520 query rows, got 2147483521"
