"""Checkpoints come back bit for bit, and one that does not fit is refused by the tensor that disagrees."""

import os

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from bda_fused.zsl.checkpoint import load_weights, save_weights


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "model.safetensors"
    save_weights(nn.Linear(3, 2), path)
    return path


def test_round_trip(checkpoint):
    torch.manual_seed(0)
    model, loaded = nn.Linear(3, 2), nn.Linear(3, 2)
    load_weights(loaded, checkpoint)
    assert loaded.weight.equal(model.weight) and loaded.bias.equal(model.bias)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_the_file_has_the_mode_that_the_umask_says(umask, mode, tmp_path):
    before = os.umask(umask)
    try:
        save_weights(nn.Linear(3, 2), tmp_path / "model.safetensors")
    finally:
        os.umask(before)
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == mode


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(4, 2), r"the tensor weight is torch.float32 of shape \(2, 3\), and .* asks for .* shape \(2, 4\)"),
        (nn.Linear(3, 2).double(), "the tensor bias is torch.float32 .* asks for torch.float64"),
        (nn.Linear(3, 2, bias=False), "holds a tensor bias, for which its configuration has no place"),
        (nn.Sequential(nn.Linear(3, 2)), "lacks the tensor 0.bias"),
    ],
    ids=["shape", "dtype", "unexpected", "missing"],
)
def test_a_checkpoint_that_does_not_fit_is_refused_and_leaves_the_model_alone(checkpoint, model, message):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_weights(model, checkpoint)
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())


def test_a_missing_file_and_a_file_of_another_kind_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        load_weights(nn.Linear(1, 1), tmp_path / "none.safetensors")
    text = tmp_path / "text.safetensors"
    text.write_text("not tensors, but long enough to be read as a header")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        load_weights(nn.Linear(1, 1), text)


def test_an_empty_checkpoint_is_refused(tmp_path):
    save_file({}, tmp_path / "empty.safetensors")
    with pytest.raises(ValueError, match="lacks the tensor bias"):
        load_weights(nn.Linear(1, 1), tmp_path / "empty.safetensors")
