"""Saving and loading of trained models, checked against the configuration that made them."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn


def save_weights(model: nn.Module, path: Path) -> None:
    """Write the model's state dict as a safetensors file."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    path.write_bytes(save(tensors))  # safetensors' own way to a file ends with a mode that knows no umask


def load_weights(model: nn.Module, path: Path) -> None:
    """Read a safetensors file into `model`; nothing is loaded unless everything fits.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a safetensors file, or a tensor's name, shape or dtype is not the model's.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file ({error})") from error
    expected = model.state_dict()
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors:
            raise ValueError(f"{path} lacks the tensor {name}, which its configuration asks for")
        if name not in expected:
            raise ValueError(f"{path} holds a tensor {name}, for which its configuration has no place")
        found, asked = tensors[name], expected[name]
        if found.shape != asked.shape or found.dtype != asked.dtype:
            raise ValueError(
                f"{path}: the tensor {name} is {found.dtype} of shape {tuple(found.shape)}, and its configuration "
                f"asks for {asked.dtype} of shape {tuple(asked.shape)}"
            )
    model.load_state_dict(tensors)
