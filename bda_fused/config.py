"""The configuration of a BDA model: every flag of the paper and of the released code, checked when it is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from bda_fused import _checks

# More than any model has: a projection of this width has 17 GB in float32, and far beyond it sizes overflow.
MAX_SIZE = 2**16

_CHOICES = {
    "stem": ("none", "conv"),
    "positions": ("none", "learned"),
    "residual": ("double", "single"),
    "order": ("ssa-vsa", "vsa-ssa"),
    "vce_from": ("memory", "attributes"),
}

# What the training scripts of the released code set: C, FFN width, dropout, dropout1, fsqrt, sqrt, weight, lambdas.
_SETTINGS: dict[tuple[str, str], dict[str, Any]] = {
    ("CUB", "GZSL"): {"dim": 350, "dropout": 0.35, "fsqrt": 155, "sqrt": 155, "lambda_cal": 0.3},
    ("CUB", "CZSL"): {
        "dim": 437, "ffn_dim": 512, "dropout": 0.4, "fsqrt": 167, "sqrt": 155, "lambda_cal": 0.25,
    },
    ("SUN", "GZSL"): {
        "dim": 350, "dropout": 0.35, "fsqrt": 128, "sqrt": 130,
        "lambda_cal": 0.1, "lambda_reg": 0.05, "lambda_vce": 1.2,
    },
    ("SUN", "CZSL"): {
        "dim": 350, "dropout": 0.35, "kv_dropout": 1.0, "fsqrt": 128, "sqrt": 130,
        "lambda_cal": 0.1, "lambda_reg": 0.05, "lambda_vce": 1.2,
    },
    ("AWA2", "GZSL"): {
        "dim": 500, "dropout": 0.45, "kv_dropout": 0.45, "fsqrt": 127, "sqrt": 153, "weight": 0.01,
        "lambda_cal": 2.5, "lambda_reg": 0.0001, "lambda_vce": 0.0025,
    },
}  # fmt: skip
_SETTINGS["AWA2", "CZSL"] = _SETTINGS["AWA2", "GZSL"]
_DATASETS: dict[str, dict[str, Any]] = {
    "CUB": {"num_classes": 200, "num_attributes": 312},
    "SUN": {"num_classes": 717, "num_attributes": 102},
    "AWA2": {"num_classes": 50, "num_attributes": 85},
}


@dataclass(frozen=True, kw_only=True)
class BDAConfig:
    """Sizes and flags of BDA. The defaults are those of the released CUB GZSL run, where the code sets one.

    Sizes, each from 1 to 65536:
        num_classes: K, seen and unseen.
        num_attributes: A.
        image_dim: width of the feature map (2048 for ResNet-101; the stem's last width with ``stem="conv"``).
        attribute_dim: width of the attribute vectors (300 for word2vec).
        dim: C, the width of regions and attributes inside (released name tf_common_dim).
        ffn_dim: hidden width of both feed-forward networks (tf_dim_feedforward).
        grid: (H, W) of the regions, HW = H * W.
        num_heads: attention heads (tf_heads); a divisor of ``dim``. Every released run has one.
        num_layers: encoder and decoder layers (tf_ec_layer, tf_dc_layer); only 1, as in every released run.

    Input:
        stem: "none" for feature maps; "conv", two 3 x 3 convolutions and a 3 x 3 max-pooling, for small images.
        stem_channels: of the image and of the two convolutions.
        positions: "learned" adds a trained (HW, C) embedding to the regions; the released code has "none".
        normalize_visual: L2-normalise every region's features (released: always).
        normalize_attributes: L2-normalise the attribute vectors (normalize_V; on in every released run).

    Blocks:
        use_rsa: region self-attention first.
        geometry: its score bias from the regions' positions.
        use_ssa: semantic synthesis attention; False for the ablation.
        attribute_attention: self-attention over the attributes before VSA (tf_SAtt; on in every released run).
        ffn_between: a feed-forward network between SSA and VSA (released: yes; the paper's outline has none).
        order: "ssa-vsa", or "vsa-ssa" for the ablation, where SSA acts on the scores only through L_VCE.
        residual: around RSA and SSA, "double" for LN_out(x + drop(LN_in(x + drop Z))) (released), or "single" for
            LN(x + drop Z).
        layer_norm: False leaves out every LayerNorm.

    Attention:
        fsqrt, sqrt: RSA's scores are divided by sqrt(fsqrt), SSA's by sqrt(sqrt).
        weight, weight_self: factors of keys and values in RSA and in SSA.
        tgt_weight: factor of the attributes before VSA.
        dropout: after every block, inside the feed-forward networks, and on every map but SSA's (tf_dropout).
        ssa_map_dropout: on the map of SSA (0.1 in the released code, whatever tf_dropout is).
        kv_dropout: on the keys and values of RSA (dropout1).

    Losses:
        lambda_cal, lambda_reg, lambda_vce: weights of L_cal, L_reg and L_VCE beside L_SCE.
        vce_from: what the class head sees: "memory", the mean region of the encoder's output (released), or
            "attributes", the mean row of U_V (the paper's outline).
        vce_bias_quirk: subtract the calibration from the class head's logits, as the released code does.
        logit_scale: factor of the class scores.
        gamma: factor of the calibration -1 (seen) and +1 (unseen) in the class scores.

    Raises:
        ValueError, TypeError: one sentence for the first field that is out of range or of another type.
    """

    num_classes: int
    num_attributes: int
    image_dim: int = 2048
    attribute_dim: int = 300
    dim: int = 350
    ffn_dim: int = 2048
    grid: tuple[int, int] = (14, 14)
    num_heads: int = 1
    num_layers: int = 1

    stem: str = "none"
    stem_channels: tuple[int, int, int] = (1, 32, 64)
    positions: str = "none"
    normalize_visual: bool = True
    normalize_attributes: bool = True

    use_rsa: bool = True
    geometry: bool = True
    use_ssa: bool = True
    attribute_attention: bool = True
    ffn_between: bool = True
    order: str = "ssa-vsa"
    residual: str = "double"
    layer_norm: bool = True

    fsqrt: float = 155.0
    sqrt: float = 155.0
    weight: float = 1.0
    weight_self: float = 1.0
    tgt_weight: float = 1.0
    dropout: float = 0.35
    ssa_map_dropout: float = 0.1
    kv_dropout: float = 0.0

    lambda_cal: float = 0.3
    lambda_reg: float = 0.005
    lambda_vce: float = 0.1
    vce_from: str = "memory"
    vce_bias_quirk: bool = False
    logit_scale: float = 1.0
    gamma: float = 1.0

    def __post_init__(self) -> None:
        for name in ("grid", "stem_channels"):
            if isinstance(getattr(self, name), list):  # what JSON makes of a tuple
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for field in fields(self):
            self._check(field.name, str(field.type), getattr(self, field.name))
        if self.dim % self.num_heads:
            raise ValueError(f"num_heads must divide dim = {self.dim}, got {self.num_heads}")
        if self.num_layers != 1:
            raise ValueError(f"num_layers must be 1, as in every released configuration, got {self.num_layers}")
        if self.stem == "conv" and self.stem_channels[-1] != self.image_dim:
            raise ValueError(
                f"image_dim must be the stem's last width {self.stem_channels[-1]} with stem='conv', "
                f"got {self.image_dim}"
            )

    def _check(self, name: str, annotation: str, value: Any) -> None:
        if annotation == "bool":
            if not isinstance(value, bool):
                raise TypeError(f"{name} must be true or false, got {value!r}")
        elif annotation == "str":
            if value not in _CHOICES[name]:
                raise ValueError(f"{name} must be one of {', '.join(_CHOICES[name])}, got {value!r}")
        elif annotation == "float":
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{name} must be a number, got {value!r}")
            if not _checks.is_finite(value):
                raise ValueError(f"{name} must be finite, got {value}")
            if "dropout" in name and not 0 <= value <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {value}")
            if name in ("fsqrt", "sqrt") and value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")
        else:
            sizes = value if isinstance(value, tuple) else (value,)
            length = {"grid": 2, "stem_channels": 3}.get(name, 1)
            if len(sizes) != length or not all(isinstance(n, int) and not isinstance(n, bool) for n in sizes):
                raise TypeError(f"{name} must be {length} integer{'s' * (length > 1)}, got {value!r}")
            if min(sizes) < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
            if max(sizes) > MAX_SIZE:
                raise ValueError(f"{name} must be at most {MAX_SIZE}, got {value}")

    @classmethod
    def released(cls, dataset: str, setting: str = "GZSL") -> BDAConfig:
        """The configuration of a released run: "CUB", "SUN" or "AWA2", "GZSL" or "CZSL".

        Raises:
            ValueError: there is no such run.
        """
        if (dataset, setting) not in _SETTINGS:
            runs = ", ".join(" ".join(run) for run in _SETTINGS)
            raise ValueError(f"the released runs are {runs}, got {dataset} {setting}")
        return cls(**_DATASETS[dataset], **_SETTINGS[dataset, setting], vce_bias_quirk=True)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BDAConfig:
        """The inverse of ``to_dict``. Raises ValueError for an unknown field, and what the constructor raises."""
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"unknown field {unknown[0]!r} of BDAConfig, known are {', '.join(sorted(known))}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and tuples by field name, ready for JSON."""
        return asdict(self)
