"""What the compiled kernels do at released sizes, counted by the simulator on a slice of the rows: bf16, C = 350."""

from dataclasses import dataclass

import pytest
import torch
from bda_fused.kernels import tiles
from bda_fused.kernels.residual_attention import dot_precision
from bda_fused.kernels.residual_attention_backward import plan_rows
from bda_fused.kernels.residual_attention_forward import plan_forward
from bda_fused.kernels.sums import Term, plan_products

from bda_fused.shapes import padded_rows
from bda_fused.testing import assert_close
from tests.ptxsim.report import Report
from tests.simulated_kernels import SM80, simulate

DTYPE, C = torch.bfloat16, 350


@dataclass(frozen=True)
class Counts:
    """macs: issued over useful. unique, requested: bytes over those that must move once. loads, stores: bytes per
    sector, 1 if none is touched in part. banks: shared wavefronts over the least.
    """

    macs: float
    unique: float
    requested: float
    loads: float
    stores: float
    banks: float

    @classmethod
    def of(cls, report: Report, macs: int, floor: int) -> "Counts":
        load, store = report.global_load, report.global_store
        return cls(
            report.macs / macs,
            (load.unique_bytes + store.unique_bytes) / floor,
            (load.bytes + store.bytes) / floor,
            load.ideal_sectors / load.sectors,
            store.ideal_sectors / store.sectors,
            report.shared.wavefronts / report.shared.ideal,
        )


def padded(*shape: int) -> torch.Tensor:
    """Normal numbers in rows of a pitch of 32, zero behind each row: what the modules fold."""
    return torch.nn.functional.pad(torch.randn(shape).to(DTYPE), (0, -shape[-1] % 32))[..., : shape[-1]]


def forward(query, key, value, scores):
    """Y and the report; Y is checked against float64."""
    y = query.new_empty(*scores[:3], value.shape[3])
    precision = dot_precision(query.dtype, query.dtype)
    options = {"scale": C**-0.5, "dropout": (0, 1.0), "precision": precision, "target": SM80}
    (launch,) = plan_forward(scores, query, key, value, query, None, None, y, None, None, **options)
    report = simulate(launch)
    weights = torch.softmax(C**-0.5 * query.double() @ key.double().mT, -1)
    yardstick = torch.softmax(C**-0.5 * (query @ key.mT).float(), -1).to(query.dtype) @ value + query
    assert_close(y, query.double() + weights @ value.double(), yardstick)
    return report


# Attributes, images of 128 rows, then at most: MACs, bytes requested; at least: efficiency of loads and of stores.
SSA = [(312, 5, 1.04, 4.0, 0.90, 0.80), (102, 5, 1.12, 2.4, 0.88, 0.80), (85, 5, 1.14, 2.4, 0.87, 0.80)]


@pytest.mark.parametrize(("attributes", "images", "macs", "requested", "loads", "stores"), SSA)
def test_ssa_forward(attributes, images, macs, requested, loads, stores):
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(images, 1, 128, C).to(DTYPE),
        padded(1, 1, attributes, C),
        padded(1, 1, attributes, C),
    )
    rows = images * 128
    report = forward(query, key, value, (images, 1, 128, attributes))
    counts = Counts.of(report, 2 * rows * attributes * C, 2 * (2 * rows * C + 2 * attributes * C))
    print(counts)
    assert counts.macs <= macs
    assert counts.unique <= 1.01
    assert counts.requested <= requested
    assert counts.loads >= loads
    assert counts.stores >= stores
    assert counts.banks <= 1.02


@pytest.mark.parametrize(("attributes", "macs"), [(312, 1.10), (102, 1.34)])
def test_vsa_forward(attributes, macs):
    """Keys are values, 196 regions of two images; the rows of an image are rounded up to tiles of 64."""
    torch.manual_seed(0)
    query, key = padded(1, 1, attributes, C), padded(2, 1, 196, C)
    report = forward(query, key, key, (2, 1, attributes, 196))
    counts = Counts.of(report, 2 * 2 * attributes * 196 * C, 2 * (2 * 196 * C + attributes * C + 2 * attributes * C))
    print(counts)
    assert counts.macs <= macs
    assert counts.unique <= 1.01
    assert counts.banks <= 1.02


def test_vsa_forward_in_float32():
    """Every product is three of TF32, and no warp computes what another does."""
    torch.manual_seed(0)
    query, key = torch.randn(1, 1, 312, C), torch.randn(2, 1, 196, C)
    report = forward(query, key, key, (2, 1, 312, 196))
    issued = report.macs / (3 * 2 * 2 * 312 * 196 * C)
    print(issued)
    assert issued <= 1.10


@pytest.mark.parametrize(("attributes", "macs"), [(312, 1.04), (102, 1.12), (85, 1.14)])
def test_ssa_backward_rows(attributes, macs):
    """dS and dQ from the kept map: two products of rows by keys."""
    torch.manual_seed(0)
    rows = 640
    grad_y, key, value = torch.randn(5, 1, 128, C).to(DTYPE), padded(1, 1, attributes, C), padded(1, 1, attributes, C)
    weights = padded_rows(key, (5, 1, 128, attributes), 16).copy_(torch.softmax(torch.randn(5, 1, 128, attributes), -1))
    grad_scores = torch.empty(5, 1, 128, tiles.pitch(attributes), dtype=DTYPE)
    grad_query = torch.empty(5, 1, 128, C, dtype=DTYPE)
    options = {"scale": 0.5, "keep_scale": None, "residual_is_query": True, "precision": "tf32", "target": SM80}
    scores = (5, 1, 128, attributes)
    (launch,) = plan_rows(scores, grad_y, key, value, weights, None, None, grad_scores, grad_query, **options)
    report = simulate(launch)
    p, dp = weights.double(), grad_y.double() @ value.double().mT
    p = p / p.sum(-1, keepdim=True)
    ds = p * (dp - (p * dp).sum(-1, keepdim=True))
    rounded = (weights.float() * ((grad_y @ value.mT).float() - (weights.float() * dp).sum(-1, keepdim=True))).to(DTYPE)
    assert_close(grad_scores[..., :attributes], ds, rounded, gradient=True)
    yardstick = (0.5 * rounded @ key).to(DTYPE) + grad_y
    assert_close(grad_query, 0.5 * ds @ key.double() + grad_y.double(), yardstick, gradient=True)
    floor = 2 * (2 * rows * C + 2 * attributes * C + 2 * rows * tiles.pitch(attributes))
    counts = Counts.of(report, 2 * rows * attributes * C, floor)
    print(counts)
    assert counts.macs <= macs
    assert counts.unique <= 1.01
    assert counts.loads >= 0.77
    assert counts.banks <= 1.02


@pytest.mark.parametrize(("attributes", "macs"), [(312, 1.13), (102, 1.38)])
def test_long_product(attributes, macs):
    """The gradient of shared keys, a sum over all rows: rounded up to tiles of 64 by 64 or 128, computed once."""
    torch.manual_seed(0)
    grad_scores = torch.zeros(5, 1, 128, tiles.pitch(attributes), dtype=DTYPE)
    grad_scores[..., :attributes].normal_()
    query, grad_key = torch.randn(5, 1, 128, C).to(DTYPE), torch.empty(1, 1, attributes, C, dtype=DTYPE)
    term = Term(grad_scores, query, 0.5, grad_scores.shape[3])
    options = {"transposed": True, "extra": None, "precision": "tf32", "target": SM80}
    reports = [simulate(launch) for launch in plan_products([term], grad_key, **options)]
    left, right = grad_scores[..., :attributes].reshape(-1, attributes), query.reshape(-1, C)
    truth, yardstick = 0.5 * left.double().mT @ right.double(), 0.5 * left.mT @ right
    assert_close(grad_key[0, 0], truth, yardstick, gradient=True)
    issued = sum(report.macs for report in reports) / (640 * attributes * C)
    print(issued)
    assert issued <= macs
