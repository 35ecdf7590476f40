"""Fused modules against the reference: the same parameters, inputs and dropout masks, outputs and every gradient."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from bda_fused import modules, reference, testing


def twins(kind: str, dim: int, dtype: torch.dtype = torch.float64, **options) -> tuple[nn.Module, nn.Module]:
    """A reference module with random parameters and its fused twin with the same."""
    twin = [getattr(namespace, kind)(dim, **options) for namespace in (reference, modules)]
    for name, parameter in twin[0].named_parameters():
        nn.init.normal_(parameter, std=0.5 if name.endswith("bias") else dim**-0.5)
    twin[1].load_state_dict(twin[0].state_dict())
    return tuple(module.to(dtype) for module in twin)


@contextlib.contextmanager
def _dropout(function) -> Iterator[None]:
    original = nn.functional.dropout
    nn.functional.dropout = function
    try:
        yield
    finally:
        nn.functional.dropout = original


@contextlib.contextmanager
def recorded_dropout() -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Collects the masks of every dropout, on keys and values and on outputs, and the seeds of the maps' dropout."""
    masks = []
    original = nn.functional.dropout

    def record(x, p=0.5, training=True, inplace=False):
        if not training or p == 0:
            return x
        masks.append(original(torch.ones(x.shape, dtype=x.dtype), p))
        return x * masks[-1]

    with testing.record_seeds() as seeds, _dropout(record):
        yield masks, seeds


@contextlib.contextmanager
def replayed_dropout(masks: list[Tensor], seeds: list[Tensor]) -> Iterator[None]:
    """Applies recorded masks in the reference, in their order; all of them must be used up."""
    remaining = iter(masks)

    def replay(x, p=0.5, training=True, inplace=False):
        return x * next(remaining).to(x.dtype) if training and p > 0 else x

    original = reference.map_dropout
    reference.map_dropout = testing.replay_masks(seeds)
    try:
        with _dropout(replay):
            yield
    finally:
        reference.map_dropout = original
    assert next(remaining, None) is None, "the reference drew fewer masks than the fused module"


def results(module: nn.Module, inputs: tuple[Tensor, ...], upstream: Tensor | None = None) -> dict[str, Tensor]:
    """The output, the map, and the gradient of every input and parameter, for one upstream gradient."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    y, weights = module(*leaves, need_weights=True)
    upstream = torch.ones_like(y) if upstream is None else upstream.to(y.dtype)
    named = {f"input {index}": leaf for index, leaf in enumerate(leaves)} | dict(module.named_parameters())
    map_gradient = torch.linspace(-1, 1, weights.numel(), dtype=weights.dtype).view(weights.shape)
    grads = torch.autograd.grad((y, weights), list(named.values()), (upstream, map_gradient))
    return {"output": y, "map": weights} | {f"gradient of {n}": g for n, g in zip(named, grads, strict=True)}


def both(kind: str, dim: int, inputs: tuple[Tensor, ...], *, train: bool = True, upstream=None, **options):
    """The results of the reference and of its fused twin in float64, with the same dropout masks."""
    ours, truth = twins(kind, dim, **options)[::-1]
    ours.train(train)
    truth.train(train)
    with recorded_dropout() as (masks, seeds):
        fused = results(ours, inputs, upstream)
    with replayed_dropout(masks, seeds):
        expected = results(truth, inputs, upstream)
    return fused, expected


def assert_same(fused: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    """Equal to ``tolerance`` of each tensor's largest entry; zero gradients to that of the largest gradient's."""
    gradients = [name for name in expected if "gradient" in name]
    largest_gradient = max((_largest(expected[name]) for name in gradients), default=0.0)
    for name, x in expected.items():
        assert fused[name].shape == x.shape, name
        scale = max(_largest(x), 1e-3 * largest_gradient if name in gradients else 0.0)
        error = _largest(fused[name] - x)
        assert error <= tolerance * scale, f"{name} is off by {error:.2e}, allowed {tolerance * scale:.2e}"


def _largest(x: Tensor) -> float:
    return float(x.detach().abs().max()) if x.numel() else 0.0
