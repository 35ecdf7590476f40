"""Checkpoints of the authors' released code: its key names, its configuration and its quirks.

Keys decide, not class names: ``mhatt`` is RSA and ``mhatt2`` is SSA. ``lnorm`` is the second LayerNorm of both. The
decoder is a torch TransformerDecoderLayer, whose in_proj_weight stacks the query, key and value projections.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from numbers import Real
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
_WHOLE = {"dim_f", "dim_v", "tf_common_dim", "tf_dim_feedforward", "tf_heads", "tf_ec_layer", "tf_dc_layer"}
_FLAGS = {"tf_SAtt": "attribute_attention", "normalize_V": "normalize_attributes"}


class Unused(nn.Module):
    """Tensors of a checkpoint that the model has no use for, kept so that they are written back bit-equal.

    ``mask_bias`` and ``bias`` are among them: the model has their product, the calibration. Its value at the load is
    kept too, and takes part in every cast, so that a later change shows.
    """

    calibration: Tensor

    def __init__(self, tensors: Mapping[str, Tensor], calibration: Tensor) -> None:
        super().__init__()
        self.keys = tuple(tensors)
        self.register_buffer("calibration", calibration.clone(), persistent=False)
        for index, tensor in enumerate(tensors.values()):
            self.register_buffer(f"tensor_{index}", tensor.clone(), persistent=False)

    def tensors(self, calibration: Tensor) -> dict[str, Tensor]:
        """Copies by key; for a calibration that was changed, ``mask_bias`` is the new one and ``bias`` ones."""
        tensors = {key: self.get_buffer(f"tensor_{index}").clone() for index, key in enumerate(self.keys)}
        if not torch.equal(calibration.to(self.calibration), self.calibration):
            tensors["mask_bias"] = calibration.reshape(tensors["mask_bias"].shape).clone()
            if "bias" in tensors:
                tensors["bias"].fill_(1)
        return tensors


def read_config(config: Mapping[str, Any], *, num_classes: int, num_attributes: int) -> BDAConfig:
    """BDAConfig from released names, flat or as wandb writes them (``key: {value: x}``); unknown names are ignored.

    A flag given as a string is read as the released code read it: any string but the empty one is True, "False" too.
    """
    flat = _flat(config)
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
            values["num_layers"] = max(values.get("num_layers", 1), _number(name, flat[name]))
    return BDAConfig(**values)


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Without the ``{value: x}`` that wandb puts around every value."""
    return {
        key: value["value"] if isinstance(value, Mapping) and "value" in value else value
        for key, value in config.items()
    }


def _number(name: str, value: Any) -> Any:
    """A number, also one written as a string, as some released configurations have it."""
    number = value
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            raise ValueError(f"{name} must be a number, got {value!r}") from None
    if isinstance(number, bool) or not isinstance(number, Real):
        raise ValueError(f"{name} must be a number, got {value!r}")
    if name not in _WHOLE:
        return number
    if not float(number).is_integer():
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    return int(float(number))


def _unseen_classes(config: Mapping[str, Any], mask_bias: Tensor) -> Tensor:
    """Boolean (K,): by "unseenclass", else what "seenclass" leaves, else where mask_bias is positive."""
    flat = _flat(config)
    given = {
        name: _listed_classes(name, flat[name], len(mask_bias))
        for name in ("seenclass", "unseenclass")
        if flat.get(name) is not None
    }
    if len(given) == 2 and not torch.equal(given["seenclass"], ~given["unseenclass"]):
        raise ValueError(
            f"seenclass and unseenclass must share the classes 0 to {len(mask_bias) - 1} out between them, "
            f"got {flat['seenclass']} and {flat['unseenclass']}"
        )
    if "unseenclass" in given:
        return given["unseenclass"]
    return ~given["seenclass"] if given else mask_bias > 0


def _listed_classes(name: str, value: Any, num_classes: int) -> Tensor:
    """Boolean (K,) from a list of class indices, or ValueError: it is a checkpoint that is wrong, not a call."""
    try:
        indices = as_classes(name, value)
    except TypeError as error:
        raise ValueError(str(error)) from error
    if indices.dtype == torch.bool:
        raise ValueError(f"{name} must be a list of class indices, got {value!r}")
    return class_mask(name, indices.cpu(), num_classes)


def as_classes(name: str, value: Any) -> Tensor:
    """Class indices, or a boolean mask of classes, as a tensor; TypeError for anything else."""
    shown = f"a {value.dtype} tensor" if isinstance(value, Tensor) else repr(value)
    sentence = f"{name} must be a list of class indices, got {shown}"
    try:
        classes = value if isinstance(value, Tensor) else torch.as_tensor(value, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(sentence) from error
    # torch takes an empty list for floats
    if classes.ndim == 0 or (classes.numel() and (classes.is_floating_point() or classes.is_complex())):
        raise TypeError(sentence)
    return classes


def class_mask(name: str, indices: Tensor, num_classes: int) -> Tensor:
    """Boolean (K,) from class indices of any shape; ValueError for a class that is not there."""
    if any(not 0 <= index < num_classes for index in indices.flatten().tolist()):
        raise ValueError(f"{name} must hold classes 0 to {num_classes - 1}, got {indices.tolist()}")
    mask = torch.zeros(num_classes, dtype=torch.bool, device=indices.device)
    mask[indices.long()] = True
    return mask


def load(model_type: type[Model], state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> Model:
    """A model from a released state dict and configuration.

    ``config`` holds the released names and may hold "unseenclass" or "seenclass" (lists of class indices); without them
    the unseen classes are those whose mask_bias is positive.

    Raises:
        ValueError: a key is missing or has another shape than the configuration says, or the classes are none of the
            checkpoint's or contradict each other, in one sentence.
    """
    for key in ("V", "att", "mask_bias"):
        if key not in state_dict:
            raise ValueError(f"the checkpoint has no key {key!r}: it is not one of the released BDA model")
    attributes, mask_bias = state_dict["att"], state_dict["mask_bias"].flatten()
    if not state_dict["V"].is_floating_point():
        raise ValueError(f"V must be a floating-point tensor, got {state_dict['V'].dtype}")
    if attributes.dim() != 2:
        raise ValueError(f"att must have shape (classes, attributes), got {tuple(attributes.shape)}")
    if len(mask_bias) != len(attributes):
        raise ValueError(
            f"mask_bias must hold a value for each of the {len(attributes)} classes of att, "
            f"got shape {tuple(state_dict['mask_bias'].shape)}"
        )
    settings = read_config(config, num_classes=attributes.shape[0], num_attributes=attributes.shape[1])
    model = model_type(settings, attributes, _unseen_classes(config, mask_bias))
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
    unused = {key: tensor for key, tensor in state_dict.items() if key not in used}
    model.unused = Unused(unused, model.sven.calibration)
    return model


def state_dict(model: BDA) -> dict[str, Tensor]:
    """The model under the released key names, in new tensors.

    Unused keys are as they were loaded, or neutral for a model that was not. A calibration that was changed since the
    load is written as ``mask_bias``, with a ``bias`` of 1.
    """
    ours = {name: tensor.detach() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    return _stacked(ours) | (_neutral(model) if model.unused is None else model.unused.tensors(model.sven.calibration))


def gradients(model: BDA) -> dict[str, Tensor]:
    """The gradients under the released key names, for every parameter that has one.

    A part of a stacked projection that has none, because it is frozen, is zero beside those that have.
    """
    parameters = dict(model.named_parameters())
    keys = {target: key for key, target, _ in _targets(parameters)}
    held = {keys[name] for name, p in parameters.items() if name in keys and p.grad is not None}
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in parameters.items()}
    return _stacked({name: grad for name, grad in grads.items() if keys.get(name) in held})


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
