"""The CUDA kernels over the sizes, dtypes and options that they are for, forward and backward, run by the simulator.

The product of all axes is thousands of cases; these are a subset, by this argument:

- What a kernel does with a width C is settled by how a row can be copied, in pieces of 16, 4 or 2 bytes, and by whether
  the result needs one pass over its columns or several. What it does with a number of keys is settled by the tile that
  holds their scores, or that none does. ``width_class`` and ``key_class`` say which values are alike. Every pair of
  classes is two cases, for SSA, VSA and RSA and every dtype. VSA's are its two forms: values of their own, and keys
  that are the values.
- All else is dealt like cards, every value once before any comes again: which member stands for a class, the sizes
  that are in no pair, the options, and the processors that the plan of a launch has to fill. The seed is fixed, and one
  with which every kernel has a case. ``test_subset`` holds the cases to what is said here.
- A tile's work does not depend on how many images there are. So there are two or three, enough to be summed over, and
  few processors stand for many images.
"""

import itertools
import random
from collections import Counter
from dataclasses import dataclass

import pytest
import torch

from bda_fused.backends import cuda_plan
from tests import attention_cases as cases
from tests.attention_cases import Case, assert_parity
from tests.cuda_device import SimulatedDevice, simulated

WIDTHS = (1, 7, 64, 300, 350, 377, 437, 500, 512, 2048)
ATTRIBUTES = (1, 7, 85, 102, 312, 600)
REGIONS = (1, 49, 196)
IMAGES = {1: 3, 49: 3, 196: 2}  # for so many regions
PROCESSORS = (1, 2, 4, 108)

# The kernels' name of it -> dtype, and torch's matmul precision.
DTYPES = {
    "bf16": (torch.bfloat16, "highest"),
    "fp16": (torch.float16, "highest"),
    "tf32x3": (torch.float32, "highest"),
    "tf32": (torch.float32, "high"),
}
# Kind -> the forms of the two cases of every pair.
FORMS = {"ssa": ("ssa", "ssa"), "vsa": ("vsa, project before", "vsa, project after"), "rsa": ("rsa", "rsa")}

# Name -> the fields of a case with so many rows and keys.
OPTIONS = {
    "plain": lambda rows, keys: {},
    "masked keys": lambda rows, keys: {"bias": (keys,), "masked": 0.3},
    "bias and dropout": lambda rows, keys: {"bias": (rows, keys), "dropout_p": 0.2},
    "map and row sums": lambda rows, keys: {"need_weights": True, "need_row_sum": True},
    "strides": lambda rows, keys: {
        "layout": {
            "query": cases.padded,
            "key": cases.shifted,
            "value": cases.transposed,
            "residual": cases.shifted,
            "attn_bias": cases.padded,
        }
    },
    "heads": lambda rows, keys: {"bias": (1, 2, 1, keys), "dropout_p": 0.3, "need_row_sum": True},
    "everything": lambda rows, keys: {
        "bias": (rows, keys),
        "masked": 0.2,
        "masked_row": True,
        "dropout_p": 0.3,
        "need_weights": True,
        "need_row_sum": True,
        "layout": {"query": cases.shifted, "key": cases.padded, "value": cases.shifted, "residual": cases.padded},
    },
}


@dataclass(frozen=True)
class Point:
    """A case of the matrix, by its place on every axis."""

    kind: str
    form: str
    dtype: str
    width: int
    attributes: int
    regions: int
    option: str
    processors: int

    def __str__(self) -> str:
        sizes = f"C={self.width} HW={self.regions}" + ("" if self.kind == "rsa" else f" A={self.attributes}")
        return f"{self.form}, {self.dtype}, {sizes}, {self.option}, {self.processors} processors"

    @property
    def keys(self) -> int:
        return self.attributes if self.kind == "ssa" else self.regions

    def case(self) -> Case:
        heads = (2,) if self.option == "heads" else ()
        image = (IMAGES[self.regions], *heads, self.regions, self.width)
        word = (*((1, *heads) if heads else ()), self.attributes, self.width)
        query, key, value = {
            "ssa": (image, word, word),
            "vsa, project before": (word, image, image),
            "vsa, project after": (word, image, None),
            "rsa": (image, image, image),
        }[self.form]
        rows, keys = query[-2], key[-2]
        fields = OPTIONS[self.option](rows, keys)
        if self.kind == "rsa":
            fields = {"bias": (rows, keys)} | fields
        given = {"query": query, "key": key, "value": value, "residual": query, "attn_bias": fields.get("bias")}
        fields["layout"] = {x: lay_out for x, lay_out in fields.get("layout", {}).items() if given[x] is not None}
        return Case(query, key, value, query, dtype=DTYPES[self.dtype][0], **fields)


def width_class(width: int, dtype: str) -> tuple[int, bool]:
    """Bytes in which rows can be copied, and whether the result is of one pass over its columns."""
    itemsize = DTYPES[dtype][0].itemsize
    unit = next(unit for unit in (16, 4, 2) if width * itemsize % unit == 0)
    tiles = cuda_plan.TILES[dtype]["forward"]
    return unit, all(32 * tile.pass_units(width, itemsize) >= width * itemsize for tile in tiles)


def key_class(keys: int, dtype: str) -> int:
    """The fewest keys that a tile with room for these has; 0 where they are several groups."""
    return min((tile.keys for tile in cuda_plan.TILES[dtype]["forward"] if tile.keys >= keys), default=0)


def classes(values, class_of, dtype: str) -> list[tuple[int, ...]]:
    groups: dict[object, tuple[int, ...]] = {}
    for x in values:
        group = class_of(x, dtype)
        groups[group] = (*groups.get(group, ()), x)
    return list(groups.values())


def dealer(seed: int):
    """A function that deals members of any tuples, each of one tuple once before any comes again."""
    generator = random.Random(seed)
    decks: dict[tuple, list] = {}

    def deal(members: tuple):
        deck = decks.setdefault(members, [])
        if not deck:
            deck += generator.sample(members, len(members))
        return deck.pop()

    return deal


def matrix() -> list[Point]:
    points = []
    deal = dealer(3)
    for kind, dtype in itertools.product(FORMS, DTYPES):
        widths = classes(WIDTHS, width_class, dtype)
        keys = classes(ATTRIBUTES if kind == "ssa" else REGIONS, key_class, dtype)
        for width, key, form in itertools.product(widths, keys, FORMS[kind]):
            attributes, regions = (key, REGIONS) if kind == "ssa" else (ATTRIBUTES, key)
            sizes = deal(width), deal(attributes), deal(regions)
            points.append(Point(kind, form, dtype, *sizes, deal(tuple(OPTIONS)), deal(PROCESSORS)))
    return points


MATRIX = matrix()


@pytest.fixture
def precision():
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


@pytest.mark.slow
@pytest.mark.parametrize("point", MATRIX, ids=str)
def test_parity(point, precision):
    precision(DTYPES[point.dtype][1])
    torch.manual_seed(0)
    with simulated(processors=point.processors):
        assert_parity(point.case(), "cuda")


def test_yardstick_of_tf32(precision):
    """Ten bits, to the nearest; factors that have no more give torch's own product and gradients."""
    precision("high")
    x = torch.tensor([[1 + 2**-11, 1 + 2**-12, -1 - 3 * 2**-11]])
    assert torch.equal(cases.product(x, torch.eye(3)), torch.tensor([[1 + 2**-10, 1, -1 - 2**-9]]))
    left, right = (torch.randint(-9, 9, shape).float().requires_grad_() for shape in ((3, 5, 4), (4, 6)))
    results = []
    for multiply in (cases.product, torch.matmul):
        y = multiply(left, right)
        results.append([y, *torch.autograd.grad(y.square().sum(), (left, right))])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_subset(precision, monkeypatch):
    """Every value of every axis at least twice, every pair of classes twice, and every kernel that a plan can launch."""
    assert len(set(MATRIX)) == len(MATRIX)
    axes = {"width": WIDTHS, "regions": REGIONS, "option": OPTIONS, "processors": PROCESSORS, "dtype": DTYPES}
    axes["form"] = set(itertools.chain(*FORMS.values()))
    for axis, values in axes.items():
        counts = Counter(getattr(point, axis) for point in MATRIX)
        assert counts.keys() == set(values) and min(counts.values()) >= 2, axis
    counts = Counter(point.attributes for point in MATRIX if point.kind != "rsa")
    assert counts.keys() == set(ATTRIBUTES) and min(counts.values()) >= 2

    for kind, dtype in itertools.product(FORMS, DTYPES):
        keys = ATTRIBUTES if kind == "ssa" else REGIONS
        wanted = {(width_class(c, dtype), key_class(s, dtype)) for c, s in itertools.product(WIDTHS, keys)}
        counts = Counter(
            (width_class(point.width, dtype), key_class(point.keys, dtype))
            for point in MATRIX
            if (point.kind, point.dtype) == (kind, dtype)
        )
        assert counts == dict.fromkeys(wanted, 2)

    monkeypatch.setattr(SimulatedDevice, "_run", lambda self, launch: None)
    launched = set()
    for point in MATRIX:
        precision(DTYPES[point.dtype][1])
        case = point.case()
        with simulated(processors=point.processors) as device:
            cases.run(cases.make_operands(case), case, "cuda")
        launched |= {launch.kernel for launch in device.launches}
    rows = {
        f"residual_attention_{direction}_{dtype}_{tile.name}"
        for dtype, directions in cuda_plan.TILES.items()
        for direction, tiles in directions.items()
        for tile in tiles
    }
    products = {f"summed_product_{form}_{dtype}" for form in ("keys", "queries") for dtype in DTYPES}
    assert launched == {"pack_rows", "ordered_sum"} | rows | products
