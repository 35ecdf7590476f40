"""The dropout of attention maps: Philox's known answers, the mask's statistics, its seed and its replay."""

import pytest
import torch

from bda_fused import dropout
from bda_fused import functional as F
from bda_fused.testing import philox_masks, record_seeds, replay_masks

# Known answers of Philox4x32-10, from the test vectors of the Random123 library: counter, key, output.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, expected):
    seed = key[0] | (key[1] << 32)
    seed = torch.tensor(seed - 2**64 if seed >= 2**63 else seed)
    words = dropout.philox(seed, tuple(torch.tensor(word) for word in counter))
    assert tuple(int(word) for word in words) == expected


def test_philox_mask_depends_on_the_flattened_row_alone():
    """Row (b * H + h) * L + l: any flattening of the batch gives the same mask."""
    seed = torch.tensor(11)
    keep = dropout.philox_keep(seed, 0.3, (2, 3, 5, 7))
    assert torch.equal(keep.view(30, 7), dropout.philox_keep(seed, 0.3, (30, 7)))
    assert torch.equal(keep[..., :6], dropout.philox_keep(seed, 0.3, (2, 3, 5, 6))), "columns do not depend on S"


@pytest.mark.parametrize("philox", [False, True])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_mask_keeps_its_share_and_is_unbiased(p, philox, monkeypatch):
    monkeypatch.setattr(dropout, "philox_everywhere", philox)
    mask = dropout.mask(torch.tensor(5), p, (200, 500), torch.float64)
    assert set(mask.unique().tolist()) == {0.0, 1 / (1 - p)}
    standard_error = (p / (1 - p) / mask.numel()) ** 0.5
    assert abs(mask.mean() - 1) < 4 * standard_error


def test_the_seed_decides_the_mask_and_torch_decides_the_seed():
    query, key = torch.randn(2, 3, 8), torch.randn(40, 8)

    def call():
        return F.residual_attention(query, key, key, dropout_p=0.5)

    torch.manual_seed(1)
    first, second = call(), call()
    torch.manual_seed(1)
    assert torch.equal(first, call())
    assert not torch.equal(first, second)


def test_certain_dropout_leaves_the_residual():
    query, key, residual = torch.randn(2, 3, 8), torch.randn(4, 8), torch.randn(2, 3, 8)
    assert torch.equal(F.residual_attention(query, key, key, residual, dropout_p=1.0), residual)


@pytest.mark.parametrize("philox", [False, True])
def test_recorded_seeds_replay_the_mask(philox):
    """The mask of the fused op, applied to the natural formulation, gives its result."""
    query, key, value = torch.randn(2, 3, 8), torch.randn(5, 8), torch.randn(5, 8)
    masks = philox_masks() if philox else torch.enable_grad()
    with masks:
        with record_seeds() as seeds:
            y, weights = F.residual_attention(query, key, value, dropout_p=0.4, need_weights=True)
        dropped = replay_masks(seeds)(torch.softmax(8**-0.5 * query @ key.mT, -1), 0.4, True)
    assert len(seeds) == 1
    torch.testing.assert_close(dropped @ value, y)
    torch.testing.assert_close(weights, torch.softmax(8**-0.5 * query @ key.mT, -1), msg="the map is before dropout")


def test_philox_mask_is_the_documented_function_of_row_and_column():
    """Counter (col // 4, row_lo, row_hi, 0), lane col % 4, kept where the word is at least p * 2**32."""
    seed, p = torch.tensor(2**40 + 17), 0.3
    keep = dropout.philox_keep(seed, p, (5, 11))
    zero = torch.tensor(0)
    for row in range(5):
        for column in range(11):
            words = dropout.philox(seed, (torch.tensor(column // 4), torch.tensor(row), zero, zero))
            assert bool(keep[row, column]) == (int(words[column % 4]) >= p * 2**32)
