"""The CUDA kernels, compiled to PTX and run by the simulator, through the public functions and autograd.

FORMS of attention_cases.py are what every GPU backend must take; CASES are those in which this one's tiles, copies and
groups of keys differ, and every dtype and layout.
"""

import os
import random
import time

import pytest
import torch

from bda_fused.backends import cuda_plan
from tests import attention_cases as cases
from tests.attention_cases import LEAST, Case, assert_parity, rsa, ssa, vsa
from tests.cuda_device import SOURCE_OF, module, simulated

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

SHAPE = (2, 21, 20)
CASES = {
    # Every kind of attention in every dtype.
    **{f"ssa {dtype}": ssa(2, 21, 12, 20, dtype=dtype) for dtype in (BF16, FP16, FP32)},
    **{f"vsa {dtype}": vsa(2, 12, 21, 20, dtype=dtype) for dtype in (BF16, FP16, FP32)},
    **{f"rsa {dtype}": rsa(2, 12, 20, dtype=dtype) for dtype in (BF16, FP16, FP32)},
    # Widths: below one step of the tensor cores, odd, the released ones, more than one pass over the columns.
    **{f"width {c}": ssa(1, 17, 9, c) for c in (1, 7, 64, 300, 350, 377, 437, 500, 512, 2048)},
    **{f"float32 width {c}": ssa(1, 17, 9, c, dtype=FP32) for c in (1, 7, 350, 377)},
    "key and value of other widths": Case((2, 11, 24), (13, 24), (13, 37), (2, 11, 37)),
    # Numbers of keys and queries: the tails of every block, and more keys than fit on chip.
    **{f"{a} attributes": ssa(1, 33, a, 40) for a in (1, 7, 85, 102, 312, 600)},
    **{f"{hw} regions": vsa(1, 85, hw, 40) for hw in (1, 49, 196)},
    "600 float32 attributes": ssa(1, 9, 600, 24, dtype=FP32),
    # Layouts of every operand.
    **{
        f"{name} {layout.__name__}": ssa(2, 21, 13, 20, bias=(2, 21, 13), layout={name: layout})
        for name in ("query", "key", "value", "residual", "attn_bias")
        for layout in (cases.padded, cases.shifted, cases.transposed)
    },
    "query of odd width, shifted": ssa(2, 21, 13, 21, layout={"query": cases.shifted, "residual": cases.shifted}),
    "keys expanded": rsa(3, 12, 20, layout={"key": cases.expanded, "value": cases.expanded}),
    "query expanded": rsa(3, 12, 20, layout={"query": cases.expanded, "residual": cases.expanded}),
    # Biases: every shape that broadcasts, masks, rows without a key, another dtype.
    **{
        f"bias {shape}": rsa(2, 12, 20, bias=shape, masked=0.3, need_row_sum=True)
        for shape in ((12,), (1,), (12, 12), (12, 1), (2, 1, 12), (2, 12, 12))
    },
    "masked row": ssa(2, 21, 12, 20, bias=(21, 12), masked=0.2, masked_row=True, need_weights=True, need_row_sum=True),
    "masked keys that all share": ssa(2, 21, 12, 20, bias=(12,), masked=0.5),
    # Rows whose keys are all masked by a finite number attend to all alike.
    **{
        f"all keys masked by a finite bias {shape}": ssa(2, 11, keys, 20, bias=shape, mask=LEAST, masked=masked)
        for keys, shape, masked in ((12, (12,), 1.0), (12, (11, 12), 1.0), (12, (11, 1), 0.5), (600, (11, 600), 1.0))
    },
    "row masked by a finite bias": ssa(2, 11, 12, 20, bias=(11, 12), mask=LEAST, masked=0.3, masked_row=True),
    # Peaked rows, which a rounded map does not add up to 1, and a yardstick that is exact in them.
    **{f"peaked by a bias, {s} regions": rsa(2, s, 20, scale=0.01, bias_size=8.0) for s in (33, 600)},
    "600 float32 attributes, large scores": ssa(
        1, 9, 600, 24, dtype=FP32, bias=(9, 600), bias_size=30.0, need_row_sum=True
    ),
    "bfloat16 bias": ssa(2, 21, 12, 20, bias=(12,), bias_dtype=BF16),
    # Options.
    **{f"dropout {p}": vsa(2, 12, 21, 20, dropout_p=p, need_weights=True, need_row_sum=True) for p in (0.3, 1.0)},
    "float32 dropout": ssa(2, 12, 21, 20, dtype=FP32, dropout_p=0.5, need_weights=True, need_row_sum=True),
    "dropout in a bias's gradient": rsa(2, 12, 20, dropout_p=0.2),
    "map": ssa(2, 21, 13, 20, need_weights=True),
    "both": Case(SHAPE, (13, 20), None, "query", dropout_p=0.3),
    "no residual": Case(SHAPE, (13, 20), (13, 20), None),
    "float32 residual": ssa(2, 21, 12, 20, residual_dtype=FP32),
    "bfloat16 residual of float16": ssa(2, 21, 12, 20, dtype=FP16, residual_dtype=BF16),
    **{f"needs {needs}": ssa(2, 21, 12, 20, bias=(12,), dropout_p=0.3, needs=needs) for needs in ("", *"qkvrb", "qk")},
    # Groups of keys.
    "600 attributes, every option": ssa(
        2, 11, 600, 24, bias=(600,), masked=0.1, dropout_p=0.3, need_weights=True, need_row_sum=True
    ),
    "1030 attributes, bias of rows": ssa(1, 11, 1030, 24, bias=(11, 1030), masked_row=True, need_weights=True),
    "600 regions, key is value": Case((9, 20), (2, 600, 20), None, (9, 20), dropout_p=0.3),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_parity(case):
    with simulated():
        assert_parity(case, "cuda")


# float64 results are not among what this backend computes.
FORMS = {name: form for name, form in cases.FORMS.items() if form.residual_dtype != torch.float64}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_form(form):
    with simulated():
        assert_parity(form, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_form_on_a_gpu(form):
    assert_parity(form, "cuda", device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_parity_on_a_gpu(case):
    assert_parity(case, "cuda", device="cuda")


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_every_tile(direction, dtype, monkeypatch):
    """Each in turn is the only one; more rows than one tile has, and all of its keys but a few."""
    element = cuda_plan.element_name(dtype)
    for tile in cuda_plan.TILES[element][direction]:
        monkeypatch.setitem(cuda_plan.TILES[element], direction, (tile,))
        case = ssa(1, tile.rows + 17, tile.keys - 5, 44, dtype=dtype, bias=(tile.keys - 5,))
        with simulated(shared_limit=227 * 1024) as device:
            assert_parity(case, "cuda")
        assert any(launch.kernel.endswith(f"{direction}_{element}_{tile.name}") for launch in device.launches)


@pytest.mark.parametrize("precision", ["high", "highest"])
def test_float32_precision_follows_torch(precision):
    before = torch.get_float32_matmul_precision()
    operands = cases.make_operands(ssa(1, 17, 40, 64, dtype=FP32))
    wide = {name: None if x is None else x.double() for name, x in operands.items()}
    try:
        torch.set_float32_matmul_precision(precision)
        with simulated():
            y = cases.run(operands, ssa(1, 17, 40, 64, dtype=FP32, needs=""), "cuda")["y"]
    finally:
        torch.set_float32_matmul_precision(before)
    error = (y.double() - cases.run(wide, ssa(1, 17, 40, 64, needs=""), None)["y"]).abs().max()
    # Products of 10-bit fractions are off by 2 ** -11 of each factor, those of sums of two by about float32's own error.
    assert 1e-5 < error < 1e-2 if precision == "high" else error < 2e-6


@pytest.mark.parametrize(
    "case",
    [
        ssa(2, 50, 102, 350),
        ssa(2, 50, 102, 377, dropout_p=0.3, dtype=FP16),
        ssa(1, 50, 90, 200, dtype=FP32),
        ssa(1, 40, 600, 24, dropout_p=0.3),
        vsa(2, 21, 49, 44),
    ],
)
def test_left_rows_that_stay_on_chip_change_no_bit(case, monkeypatch):
    case = case.but(residual="query")
    operands = cases.make_operands(case)
    shared_bytes = cuda_plan.Tile.shared_bytes

    def results():
        torch.manual_seed(5)
        with simulated(shared_limit=227 * 1024) as device:
            values = cases.run(operands, case, "cuda")
        rows = [x.arguments for x in device.launches if x.kernel.startswith("residual_attention")]
        return values, sum(x.added_kind == cuda_plan.LEFT for x in rows)

    on_chip, staying = results()
    monkeypatch.setattr(
        cuda_plan.Tile, "shared_bytes", lambda *arguments: 2**30 if any(arguments[2:]) else shared_bytes(*arguments)
    )
    from_memory, none = results()
    assert staying > none == 0
    for name, x in on_chip.items():
        assert torch.equal(x, from_memory[name]), name


def test_small_shared_memory():
    """The 99 KiB of consumer cards, at CUB's sizes."""
    with simulated(shared_limit=99 * 1024) as device:
        assert_parity(ssa(1, 50, 312, 350), "cuda")
    assert all(launch.shared <= 99 * 1024 for launch in device.launches)


@pytest.mark.parametrize(
    "case", [ssa(2, 120, 21, 44, bias=(21,), dropout_p=0.2), vsa(3, 40, 21, 44), ssa(1, 40, 600, 24)]
)
def test_order_of_blocks_changes_no_bit(case):
    operands = cases.make_operands(case)
    results = []
    for seed in (0, 1, 2):
        torch.manual_seed(5)
        with simulated(seed=seed):
            results.append(cases.run(operands, case, "cuda"))
    for name, x in results[0].items():
        assert all(torch.equal(x, other[name]) for other in results[1:]), name


@pytest.mark.parametrize("shape", ["B", "L", "S"])
def test_empty(shape):
    sizes = {"B": 2, "L": 3, "S": 5} | {shape: 0}
    b, rows, keys = sizes.values()
    case = Case((b, rows, 8), (b, keys, 8), (b, keys, 8), (b, rows, 8), needs="qkvr", dtype=BF16)
    operands = cases.make_operands(case)
    with simulated():
        results = cases.run(operands, case, "cuda")
    assert torch.equal(results["y"], operands["residual"])
    upstream = cases.upstream_of(results["y"], BF16, results["y"].numel())
    assert torch.equal(results["gradient of residual"], upstream)
    for name in ("query", "key", "value"):
        assert results[f"gradient of {name}"].eq(0).all(), name


def random_case(generator: random.Random) -> Case:
    """Any problem that the public function takes, small."""
    pick = generator.choice
    images, heads = pick([1, 2, 3]), pick([0, 0, 1, 2])
    rows, keys = pick([1, 5, 16, 33, 70]), pick([1, 8, 13, 49, 130, 333, 520])
    width, out_width = (pick([1, 3, 8, 20, 33, 64, 70]) for _ in range(2))
    key_is_value, residual = pick([False, False, True]), pick(["own", "own", "query", None])
    out_width = width if key_is_value or residual == "query" else out_width

    def shape(*last):
        batch = (pick([1, images]), pick([1, heads])) if heads else pick([(), (1,), (images,)])
        return (*batch, *last)

    bias = pick([None, (keys,), (rows, keys), (rows, 1), shape(1, keys), shape(rows, keys)])
    bias = bias if bias is None or len(bias) != 3 or not heads else (1, *bias)
    dtype = pick([BF16, BF16, FP16, FP32])
    present = ["query", "key", *([] if key_is_value else ["value"]), *(["residual"] if residual == "own" else [])]
    case = Case(
        query=shape(rows, width),
        key=shape(keys, width),
        value=None if key_is_value else shape(keys, out_width),
        residual=shape(rows, out_width) if residual == "own" else residual,
        bias=bias,
        bias_size=pick([1.0, 1.0, 8.0]),
        masked=pick([0.0, 0.3]),
        masked_row=pick([False, True]) and bias is not None and bias[-2:] == (rows, keys) and rows > 1,
        scale=pick([None, -0.5, 0.2]),
        dropout_p=pick([0.0, 0.0, 0.3]),
        need_weights=pick([False, True]),
        need_row_sum=pick([False, True]),
        dtype=dtype,
        residual_dtype=pick([None, dtype, FP32, BF16]),
        bias_dtype=pick([dtype, FP32]),
        needs="".join(letter for letter in "qkvrb" if generator.random() < 0.7),
        layout={
            name: pick([cases.padded, cases.shifted, cases.transposed]) for name in present if generator.random() < 0.3
        },
    )
    return case


def test_fuzz():
    """BDA_FUSED_FUZZ_SEED and BDA_FUSED_FUZZ_SECONDS in the environment make it another, or longer.

    Known: about one case in a thousand breaks the rule, by up to a third, with the float32 gradient of a bias that few
    peaked rows see: case 888 of seed 0, 773 of seed 29, 0 of seed 31, 916 of seed 37. There the yardstick, as far off
    as ours in the median, happens to round its few products luckily, and ours has the rounding of the kept map to 16
    bits or, beside float32 operands, of the mean that all of a row's entries share.
    """
    generator = random.Random(int(os.environ.get("BDA_FUSED_FUZZ_SEED", "0")))
    for source in SOURCE_OF.values():
        module(source)  # compiled before the clock runs
    end = time.monotonic() + float(os.environ.get("BDA_FUSED_FUZZ_SECONDS", "20"))
    count = 0
    while time.monotonic() < end:
        case, seed = random_case(generator), generator.randrange(2**31)
        torch.manual_seed(seed)
        try:
            with simulated(processors=generator.choice([2, 108]), shared_limit=generator.choice([99, 163, 227]) * 1024):
                assert_parity(case, "cuda", seed)
        except Exception as error:
            raise AssertionError(f"case {count}, seed {seed}: {case}") from error
        count += 1
    print(f"{count} cases")
    assert count > 10
