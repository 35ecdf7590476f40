"""The fused model: the classes of bda_fused.reference, with the same constructors, parameters, state_dict and results.

Attention goes through the algebra of plan.py and residual attention; everything else is the reference itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bda_fused import fold, reference
from bda_fused.config import BDAConfig
from bda_fused.memo import once, remembering
from bda_fused.reference import SVEN, BDAOutput, FeedForward

__all__ = [
    "BDA",
    "BDAN",
    "SVEN",
    "AttributeSelfAttention",
    "BDAConfig",
    "BDAOutput",
    "FeedForward",
    "RegionSelfAttention",
    "SemanticSynthesisAttention",
    "VisualSynthesisAttention",
    "frozen",
    "fuse",
]


class FusedAttention(reference.Attention):
    """reference.Attention through folded weights and residual attention; each call picks the cheapest exact algebra.

    A projection that is more than its weight and bias (it has hooks, or a forward of its own, as adapters and pruned
    layers have) is called as it is, and the attention around it computed as the reference does.
    """

    def attend(
        self, x: Tensor, y: Tensor, *, attn_bias: Tensor | None = None, need_weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        if not fold.is_plain(self):
            return super().attend(x, y, attn_bias=attn_bias, need_weights=need_weights)
        return fold.attend(self, x, y, attn_bias=attn_bias, need_weights=need_weights)


class SemanticSynthesisAttention(FusedAttention, reference.SemanticSynthesisAttention):
    """SSA, fused: W_q moves into the keys and W_o into the values, which all images share."""


class VisualSynthesisAttention(FusedAttention, reference.VisualSynthesisAttention):
    """VSA, fused: W_k moves into the queries, and the values are projected where there are fewer rows."""


class RegionSelfAttention(FusedAttention, reference.RegionSelfAttention):
    """RSA, fused: one merged score matrix, regions as keys and values, one geometry bias for all images."""

    def geometry_bias(self) -> Tensor | None:
        return once(self, "geometry_bias", super().geometry_bias)


class AttributeSelfAttention(FusedAttention, reference.AttributeSelfAttention):
    """The attributes' self-attention, fused: one map for all images, under one dropout mask for each."""

    def forward(
        self, attributes: Tensor, images: int | None = None, need_weights: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        if not fold.is_plain(self):
            return super().forward(attributes, images, need_weights)
        y, weights = fold.attend(self, attributes, attributes, images=images, need_weights=need_weights)
        return y if weights is None else (y, weights)


class BDAN(reference.BDAN):
    """The bi-directional attention network with fused attention."""

    def __init__(self, config: BDAConfig) -> None:
        super().__init__(config)
        fuse(self)

    def attribute_queries(self, attributes: Tensor, images: int) -> Tensor:
        return once(self, "queries", lambda: super(BDAN, self).attribute_queries(attributes, images), attributes)


class BDA(reference.BDA):
    """The whole model with fused attention."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        fuse(self)

    def attribute_embedding(self) -> Tensor:
        return once(self, "embedding", super().attribute_embedding)


_TWINS: dict[type[nn.Module], type[nn.Module]] = {
    reference.SemanticSynthesisAttention: SemanticSynthesisAttention,
    reference.VisualSynthesisAttention: VisualSynthesisAttention,
    reference.RegionSelfAttention: RegionSelfAttention,
    reference.AttributeSelfAttention: AttributeSelfAttention,
    reference.BDAN: BDAN,
    reference.BDA: BDA,
}


def fuse(model: nn.Module) -> dict[str, str]:
    """Replace, in place, every reference module inside ``model`` (and itself) by its fused twin.

    A module changes its class and nothing else: parameters, buffers, hooks and what refers to them stay, so optimisers
    and checkpoints go on. Subclasses of a reference class are left as they are, since they may do something else, and
    an attention whose projections have hooks or a forward of their own computes as the reference does.

    Returns:
        What was replaced: the module's name inside ``model`` ("" for itself) -> the name of its class.

    Raises:
        TypeError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    replaced = {}
    for name, module in model.named_modules():
        twin = _TWINS.get(type(module))
        if twin is not None:
            module.__class__ = twin
            replaced[name] = twin.__name__
    return replaced


@contextmanager
def frozen(model: nn.Module) -> Iterator[nn.Module]:
    """Inference with the products of parameters computed once: folded keys, values and queries, merged matrices.

    Inside the context gradients are off, and what no image changes is computed in the first call and kept until the
    context ends, for the thread that entered it. A parameter that is written to or replaced meanwhile is noticed by
    torch's version counter and its address, and what came from it computed anew; what goes around both (an in-place
    change through ``.data``, or of an inference tensor) is not. Calls that are in training mode, compiled, or under
    ``torch.enable_grad`` keep nothing.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: ``model`` is in training mode, or has no fused module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if any(module.training for module in model.modules()):
        raise ValueError("model must be in eval mode to be frozen, call model.eval() first")
    fused = [module for module in model.modules() if isinstance(module, tuple(_TWINS.values()))]
    if not fused:
        raise ValueError("model has no fused module to freeze, call bda_fused.fuse(model) first")
    with remembering(fused), torch.no_grad():
        yield model
