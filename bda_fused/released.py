"""Checkpoints of the authors' released code: its key names, its configuration and its quirks.

Keys decide, not class names: ``mhatt`` is RSA and ``mhatt2`` is SSA. ``lnorm`` is the second LayerNorm of both. The
decoder is a torch TransformerDecoderLayer, whose in_proj_weight stacks the query, key and value projections.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from bda_fused.config import BDAConfig

if TYPE_CHECKING:
    from bda_fused.reference import BDA

    Model = TypeVar("Model", bound=BDA)

_ENCODER = "transformer.transformer_encoder.layers.0."
_DECODER = "transformer.transformer_decoder.layers.0."

# Released prefix or key -> ours. A module of ours that is absent leaves its keys unused.
_PREFIXES = {
    "layer_se.2.": "sven.class_head.",
    "transformer.embed_attr.0.": "embed_attribute.",
    "transformer.embed_cv.0.": "embed_visual.",
    "transformer.transformer_encoder.WGs.0.": "bdan.rsa.geometry.",
    _ENCODER + "lnorm.": "bdan.block_norm.",
    _ENCODER + "mhatt.attention.fc_q.": "bdan.rsa.q_proj.",
    _ENCODER + "mhatt.attention.fc_k.": "bdan.rsa.k_proj.",
    _ENCODER + "mhatt.attention.fc_v.": "bdan.rsa.v_proj.",
    _ENCODER + "mhatt.attention.fc_o.": "bdan.rsa.out_proj.",
    _ENCODER + "mhatt.layer_norm.": "bdan.rsa_norm.",
    _ENCODER + "mhatt2.attention.fc_q.": "bdan.ssa.q_proj.",
    _ENCODER + "mhatt2.attention.fc_k.": "bdan.ssa.k_proj.",
    _ENCODER + "mhatt2.attention.fc_v.": "bdan.ssa.v_proj.",
    _ENCODER + "mhatt2.attention.fc_o.": "bdan.ssa.out_proj.",
    _ENCODER + "mhatt2.layer_norm.": "bdan.ssa_norm.",
    _ENCODER + "pwff.fc1.": "bdan.visual_ffn.fc1.",
    _ENCODER + "pwff.fc2.": "bdan.visual_ffn.fc2.",
    _ENCODER + "pwff.layer_norm.": "bdan.visual_ffn_norm.",
    _DECODER + "self_attn.out_proj.": "bdan.attribute_attention.out_proj.",
    _DECODER + "multihead_attn.out_proj.": "bdan.vsa.out_proj.",
    _DECODER + "norm1.": "bdan.attribute_attention_norm.",
    _DECODER + "norm2.": "bdan.vsa_norm.",
    _DECODER + "norm3.": "bdan.attribute_ffn_norm.",
    _DECODER + "linear1.": "bdan.attribute_ffn.fc1.",
    _DECODER + "linear2.": "bdan.attribute_ffn.fc2.",
}
_KEYS = {"V": "attribute_vectors", "W_1": "sven.readout", "att": "sven.class_attributes"}
_STACKED = {
    _DECODER + "self_attn.in_proj_": "bdan.attribute_attention.",
    _DECODER + "multihead_attn.in_proj_": "bdan.vsa.",
}
_PROJECTIONS = ("q_proj.", "k_proj.", "v_proj.")

_NUMBERS = {
    "dim_f": "image_dim",
    "dim_v": "attribute_dim",
    "tf_common_dim": "dim",
    "tf_dim_feedforward": "ffn_dim",
    "tf_heads": "num_heads",
    "tf_dropout": "dropout",
    "tf_dropout1": "kv_dropout",
    "dropout1": "kv_dropout",
    "fsqrt": "fsqrt",
    "sqrt": "sqrt",
    "weight": "weight",
    "weight_self": "weight_self",
    "tgt_weight": "tgt_weight",
    "lambda_": "lambda_cal",
    "lambda_reg": "lambda_reg",
    "lambda_CEVi": "lambda_vce",
}
_FLAGS = {"tf_SAtt": "attribute_attention", "normalize_V": "normalize_attributes"}


class Unused(nn.Module):
    """Tensors of a checkpoint that the model has no use for, kept so that they are written back bit-equal."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.keys = tuple(tensors)
        for index, tensor in enumerate(tensors.values()):
            self.register_buffer(f"tensor_{index}", tensor.clone(), persistent=False)

    def items(self) -> Iterator[tuple[str, Tensor]]:
        return ((key, self.get_buffer(f"tensor_{index}")) for index, key in enumerate(self.keys))


def read_config(config: Mapping[str, Any], *, num_classes: int, num_attributes: int) -> BDAConfig:
    """BDAConfig from released names, flat or as wandb writes them (``key: {value: x}``); unknown names are ignored.

    A flag given as a string is read as the released code read it: any string but the empty one is True, "False" too.
    """
    flat = {
        key: value["value"] if isinstance(value, Mapping) and "value" in value else value
        for key, value in config.items()
    }
    values: dict[str, Any] = {"num_classes": num_classes, "num_attributes": num_attributes, "vce_bias_quirk": True}
    for name, ours in _NUMBERS.items():
        if name in flat:
            values[ours] = _number(name, flat[name])
    for name, ours in _FLAGS.items():
        if name in flat:
            if isinstance(flat[name], str):
                warnings.warn(
                    f"{name} is the string {flat[name]!r}, which the released code reads as {bool(flat[name])}",
                    stacklevel=3,
                )
            values[ours] = bool(flat[name])
    for name in ("tf_ec_layer", "tf_dc_layer"):
        if name in flat:
            values["num_layers"] = max(values.get("num_layers", 1), int(_number(name, flat[name])))
    return BDAConfig(**values)


def _number(name: str, value: Any) -> float | int:
    """A number, also one written as a string, as some released configurations have it."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise ValueError(f"{name} must be a number, got {value!r}") from None
    return int(value) if _NUMBERS.get(name, "").endswith(("dim", "heads")) else value


def load(model_type: type[Model], state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> Model:
    """A model from a released state dict and configuration.

    ``config`` holds the released names and may hold "unseenclass" (a list of class indices); without it the unseen
    classes are those whose mask_bias is positive.

    Raises:
        ValueError: a key is missing or has another shape than the configuration says, in one sentence.
    """
    for key in ("V", "att", "mask_bias"):
        if key not in state_dict:
            raise ValueError(f"the checkpoint has no key {key!r}: it is not one of the released BDA model")
    attributes, mask_bias = state_dict["att"], state_dict["mask_bias"].flatten()
    settings = read_config(config, num_classes=attributes.shape[0], num_attributes=attributes.shape[1])
    unseen = config.get("unseenclass")
    model = model_type(settings, attributes, mask_bias > 0 if unseen is None else torch.as_tensor(unseen))
    model.to(state_dict["V"].dtype)
    model.sven.calibration = mask_bias * state_dict.get("bias", mask_bias.new_ones(()))

    ours = dict(model.named_parameters()) | dict(model.named_buffers())
    used: set[str] = set()
    for key, target, part in _targets(ours):
        if key not in state_dict:
            raise ValueError(f"the checkpoint has no key {key!r}")
        source = part(state_dict[key])
        if source.shape != ours[target].shape:
            raise ValueError(
                f"{key} must have shape {_whole(key, ours[target])} by the configuration, "
                f"got {tuple(state_dict[key].shape)}"
            )
        with torch.no_grad():
            ours[target].copy_(source)
        used.add(key)
    model.unused = Unused({key: tensor for key, tensor in state_dict.items() if key not in used})
    return model


def state_dict(model: BDA) -> dict[str, Tensor]:
    """The model under the released key names; for a model not loaded from them, with neutral values for unused keys."""
    ours = {name: tensor.detach() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    return _stacked(ours) | dict(model.unused.items() if model.unused is not None else _neutral(model))


def gradients(model: BDA) -> dict[str, Tensor]:
    """The gradients under the released key names, for every parameter that has one."""
    return _stacked({name: p.grad for name, p in model.named_parameters() if p.grad is not None})


def _targets(ours: Mapping[str, Tensor]) -> Iterator[tuple[str, str, Callable[[Tensor], Tensor]]]:
    """(released key, our name, how to take ours out of it) for every tensor of ours that a checkpoint holds."""
    for key, name in _KEYS.items():
        yield key, name, lambda x: x
    for prefix, our_prefix in _PREFIXES.items():
        for leaf in ("weight", "bias"):
            if our_prefix + leaf in ours:
                yield prefix + leaf, our_prefix + leaf, lambda x: x
    for prefix, our_prefix in _STACKED.items():
        for leaf in ("weight", "bias"):
            for index, projection in enumerate(_PROJECTIONS):
                if our_prefix + projection + leaf in ours:
                    yield prefix + leaf, our_prefix + projection + leaf, partial(_third, index)


def _third(index: int, stacked: Tensor) -> Tensor:
    return stacked.tensor_split(3)[index]


def _stacked(ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under the released keys, the stacked projections put together."""
    parts: dict[str, list[Tensor]] = {}
    for key, target, _ in _targets(ours):
        if target in ours:
            parts.setdefault(key, []).append(ours[target])
    return {key: torch.cat(tensors) if len(tensors) > 1 else tensors[0].clone() for key, tensors in parts.items()}


def _whole(key: str, part: Tensor) -> tuple[int, ...]:
    stacked = any(key.startswith(prefix) for prefix in _STACKED)
    return (3 * part.shape[0], *part.shape[1:]) if stacked else tuple(part.shape)


def _neutral(model: BDA) -> dict[str, Tensor]:
    """The released model's unused tensors, with values that do nothing."""
    weight, bias = model.embed_visual.weight, model.embed_visual.bias
    calibration = model.sven.calibration
    return {
        "bias": calibration.new_ones(()),
        "mask_bias": calibration[None].clone(),
        "weight_ce": torch.eye(model.config.num_classes, dtype=weight.dtype, device=weight.device),
        "transformer.embed_cv_aux.0.weight": torch.zeros_like(weight, requires_grad=False),
        "transformer.embed_cv_aux.0.bias": torch.zeros_like(bias, requires_grad=False),
    }
