"""BDA in plain PyTorch, to be read next to the equations: the oracle of every test.

Lee et al., "BDA: Bi-directional attention for zero-shot learning", Computational Visual Media 11(5), 2025,
doi 10.26599/CVM.2025.9450401, and the authors' released code. U (B, HW, C) are the regions of B images, V_A (A, C) the
attributes, which all images share: they stay 2-D until something separates the images.

    RSA   U'  = attention(U, U), its scores biased by the regions' positions
    SSA   U_S = attention(U', V_A): regions ask attributes
    VSA   U_V = attention(V_A, U_S): attributes ask regions

bda_fused.modules has the same classes with fused attention.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from bda_fused import _checks, losses, released
from bda_fused.config import MAX_SIZE, BDAConfig

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
]


def map_dropout(weights: Tensor, p: float, training: bool) -> Tensor:
    """Dropout of an attention map."""
    return nnf.dropout(weights, p, training)


class Attention(nn.Module):
    """Z = drop(softmax(scale * Q K^T + attn_bias)) V W_o + b_o, and x + Z with ``residual``.

    Q = x W_q + b_q from the rows that ask; K = kv_scale (y W_k + b_k) and V = kv_scale (y W_v + b_v) from those that
    answer.

    Args:
        dim: C, the width of x, y and the result.
        scale: of the scores; default (dim / num_heads) ** -0.5.
        bias: whether the projections have biases.
        out_proj: whether there is an output projection W_o.
        dropout: probability of dropout on the map, in training.
        kv_scale: factor of the projected keys and values.
        kv_dropout: probability of dropout on the projected keys and values, two masks, in training.
        residual: whether x is added.
        num_heads: heads, a divisor of ``dim``.

    Raises:
        TypeError: a size that is no integer, or a scale or a probability that is no number.
        ValueError: a size below 1, heads that do not divide ``dim``, a probability outside [0, 1], or a scale that is
            not finite in float32.
    """

    def __init__(
        self,
        dim: int,
        *,
        scale: float | None = None,
        bias: bool = True,
        out_proj: bool = False,
        dropout: float = 0.0,
        kv_scale: float = 1.0,
        kv_dropout: float = 0.0,
        residual: bool = True,
        num_heads: int = 1,
    ) -> None:
        super().__init__()
        _checks.check_sizes(dim=dim, num_heads=num_heads)
        if dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads, got dim={dim}, num_heads={num_heads}")
        _checks.check_probability("dropout", dropout)
        _checks.check_probability("kv_dropout", kv_dropout)
        if scale is not None:
            _checks.check_finite("scale", scale, "a finite float or None")
        _checks.check_finite("kv_scale", kv_scale)
        self.q_proj = nn.Linear(dim, dim, bias=bias)
        self.k_proj = nn.Linear(dim, dim, bias=bias)
        self.v_proj = nn.Linear(dim, dim, bias=bias)
        self.out_proj = nn.Linear(dim, dim, bias=bias) if out_proj else None
        self.scale = float((dim // num_heads) ** -0.5 if scale is None else scale)
        self.dropout = float(dropout)
        self.kv_scale = float(kv_scale)
        self.kv_dropout = float(kv_dropout)
        self.residual = residual
        self.num_heads = num_heads
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            if projection is not None:
                nn.init.xavier_uniform_(projection.weight)
                if projection.bias is not None:
                    nn.init.zeros_(projection.bias)

    def attend(
        self, x: Tensor, y: Tensor, *, attn_bias: Tensor | None = None, need_weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Rows of x (..., L, C) ask rows of y (..., S, C); the result and, if asked for, the map before dropout."""
        q = self.q_proj(x)
        k = nnf.dropout(self.kv_scale * self.k_proj(y), self.kv_dropout, self.training)
        v = nnf.dropout(self.kv_scale * self.v_proj(y), self.kv_dropout, self.training)
        if self.num_heads > 1:
            q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(-3, -2) for t in (q, k, v))
        scores = self.scale * (q @ k.mT)
        if attn_bias is not None:
            scores = scores + attn_bias
        weights = torch.softmax(scores, -1)
        z = map_dropout(weights, self.dropout, self.training) @ v
        if self.num_heads > 1:
            z = z.transpose(-3, -2).flatten(-2)
        if self.out_proj is not None:
            z = self.out_proj(z)
        return x + z if self.residual else z, weights if need_weights else None

    def extra_repr(self) -> str:
        return f"scale={self.scale:.4g}, dropout={self.dropout}, residual={self.residual}, num_heads={self.num_heads}"


class SemanticSynthesisAttention(Attention):
    """SSA: U_S = U + softmax(scale * Q K^T) V, regions asking attributes; the softmax runs over the A attributes."""

    def forward(self, visual: Tensor, attributes: Tensor, need_weights: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """U_S (B, HW, C) from visual (B, HW, C) and attributes (A, C) or (B, A, C); with need_weights also the map.

        The map is (B, HW, A), with heads (B, H, HW, A).
        """
        return _result(*self.attend(visual, attributes, need_weights=need_weights))


class VisualSynthesisAttention(Attention):
    """VSA: U_V = V_A + softmax(scale * Q K^T) V, attributes asking regions; the softmax runs over the HW regions."""

    def forward(self, visual: Tensor, attributes: Tensor, need_weights: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """U_V (B, A, C) from visual (B, HW, C) and attributes (A, C) or (B, A, C); with need_weights also the map.

        The map is (B, A, HW), with heads (B, H, A, HW).
        """
        return _result(*self.attend(attributes, visual, need_weights=need_weights))


class AttributeSelfAttention(Attention):
    """The attributes ask each other, before VSA."""

    def forward(
        self, attributes: Tensor, images: int | None = None, need_weights: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """(A, C) for attributes (A, C), or with ``images`` (images, A, C): one dropout mask for each image."""
        if images is not None:
            attributes = attributes.expand(images, -1, -1)
        return _result(*self.attend(attributes, attributes, need_weights=need_weights))


class RegionSelfAttention(Attention):
    """RSA: the regions ask each other; g, which depends on their positions alone, is subtracted from the scores.

    g = ReLU(G w_g + b_g) >= 0 with the position features G of ``geometry_features``. Every pair of regions with the
    same offsets has the same g, so it is computed for H * W offsets, not for (H * W) ** 2 pairs, and once, not per
    image.

    Args:
        grid: (H, W) of the regions, row by row.
        geometry: False leaves out g.

    Raises:
        TypeError: a grid that is not two integers.
        ValueError: a height or width below 1 or above 65536.
    """

    geometry_table: Tensor
    offsets: Tensor

    def __init__(self, dim: int, *, grid: tuple[int, int] = (14, 14), geometry: bool = True, **kwargs: Any) -> None:
        super().__init__(dim, **kwargs)
        if not isinstance(grid, tuple | list) or len(grid) != 2 or not all(map(_checks.is_integer, grid)):
            raise TypeError(f"grid must be (H, W), two integers, got {grid!r}")
        if min(grid) < 1:
            raise ValueError(f"grid must be (H, W) of at least (1, 1), got {grid}")
        if max(grid) > MAX_SIZE:
            raise ValueError(f"grid must be (H, W) of at most {(MAX_SIZE, MAX_SIZE)}, got {grid}")
        self.grid = (grid[0], grid[1])
        self.geometry = nn.Linear(GEOMETRY_FEATURES, 1) if geometry else None
        self.register_buffer("geometry_table", geometry_features(self.grid), persistent=False)
        self.register_buffer("offsets", _offsets(self.grid), persistent=False)

    def _apply(self, *args: Any, **kwargs: Any) -> RegionSelfAttention:
        """A cast leaves the position features in float64, so that a model cast to float64 has them exact.

        They are made anew, with the offsets, so that a model that comes from the "meta" device has them at all.
        """
        super()._apply(*args, **kwargs)
        device = self.offsets.device
        self.geometry_table, self.offsets = geometry_features(self.grid).to(device), _offsets(self.grid).to(device)
        return self

    def geometry_bias(self) -> Tensor | None:
        """-g, (HW, HW), added to the scaled scores of every image."""
        if self.geometry is None:
            return None
        g = torch.relu(self.geometry(self.geometry_table.to(self.geometry.weight.dtype)))
        return -g[:, 0][self.offsets]

    def forward(self, visual: Tensor, need_weights: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """U' (B, HW, C) from visual (B, HW, C); with need_weights also the map (B, HW, HW) or (B, H, HW, HW)."""
        height, width = self.grid
        if visual.shape[-2] != height * width:
            raise ValueError(f"visual must have {height} x {width} = {height * width} regions, got {visual.shape[-2]}")
        return _result(*self.attend(visual, visual, attn_bias=self.geometry_bias(), need_weights=need_weights))


GEOMETRY_FEATURES = 64


def geometry_features(grid: tuple[int, int]) -> Tensor:
    """G of every offset (i, j) between two regions of an H x W grid: (H * W, 64), float64.

    As the released code has it, for any grid: the boxes are 1/H by 1/W large, their sizes are w = 1/H + 1 and
    h = 1/W + 1, the offsets dx = log(max(|cx - cx'| / w, 1e-3)) and dy likewise, and dw = log(w / w') = dh = 0. Then
    sin and cos of 100 * (dx, dy, dw, dh) * 1000 ** (-k / 8), k = 0..7: 32 sines followed by 32 cosines.
    """
    height, width = grid
    first, second = torch.meshgrid(
        torch.arange(height, dtype=torch.float64) / height,
        torch.arange(width, dtype=torch.float64) / width,
        indexing="ij",
    )
    dx = (first / (1 / height + 1)).clamp(min=1e-3).log().flatten()
    dy = (second / (1 / width + 1)).clamp(min=1e-3).log().flatten()
    position = torch.stack((dx, dy, torch.zeros_like(dx), torch.zeros_like(dx)), -1)
    frequencies = 1000.0 ** (-torch.arange(8, dtype=torch.float64) / 8)
    angles = (100 * position[..., None] * frequencies).flatten(1)
    return torch.cat((angles.sin(), angles.cos()), -1)


def _offsets(grid: tuple[int, int]) -> Tensor:
    """The row of ``geometry_features`` for every pair of regions: (HW, HW) int64."""
    height, width = grid
    region = torch.arange(height * width)
    row, column = region // width, region % width
    return (row[:, None] - row).abs() * width + (column[:, None] - column).abs()


def _result(y: Tensor, weights: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
    return y if weights is None else (y, weights)


class FeedForward(nn.Module):
    """Linear, ReLU, dropout, Linear: (..., dim) to (..., dim) through (..., hidden_dim).

    Raises:
        TypeError: a size that is no integer, or a probability that is no number.
        ValueError: a size below 1, or a probability outside [0, 1].
    """

    def __init__(self, dim: int, hidden_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        _checks.check_sizes(dim=dim, hidden_dim=hidden_dim)
        _checks.check_probability("dropout", dropout)
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.dropout = nn.Dropout(float(dropout))
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.dropout(torch.relu(self.fc1(x))))


class BDANOutput(NamedTuple):
    """features F (B, A, C); memory M (B, HW, C); attributes U_V (B, A, C); the maps, or None where not asked for."""

    features: Tensor
    memory: Tensor
    attributes: Tensor
    ssa_map: Tensor | None
    vsa_map: Tensor | None


class BDAN(nn.Module):
    """The bi-directional attention network: RSA, SSA, FFN_1, attribute self-attention, VSA, FFN_2.

    Every block is followed by dropout, the residual and LayerNorm; around RSA and SSA ``config.residual`` "double" puts
    a second residual with a LayerNorm that both share: LN_out(x + drop(LN_in(x + drop Z))). With order "vsa-ssa" VSA
    reads U' and SSA then asks U_V, image by image, so that SSA reaches the scores only through L_VCE.
    """

    def __init__(self, config: BDAConfig) -> None:
        super().__init__()
        self.config = config
        common: dict[str, Any] = {"out_proj": True, "residual": False, "num_heads": config.num_heads}

        def norm() -> nn.Module:
            return nn.LayerNorm(config.dim) if config.layer_norm else nn.Identity()

        self.dropout = nn.Dropout(config.dropout)
        self.rsa: RegionSelfAttention | None = None
        self.ssa: SemanticSynthesisAttention | None = None
        self.attribute_attention: AttributeSelfAttention | None = None
        self.visual_ffn: FeedForward | None = None
        self.block_norm: nn.Module | None = None
        if config.use_rsa:
            self.rsa = RegionSelfAttention(
                config.dim,
                grid=config.grid,
                geometry=config.geometry,
                scale=config.fsqrt**-0.5,
                dropout=config.dropout,
                kv_scale=config.weight,
                kv_dropout=config.kv_dropout,
                **common,
            )
            self.rsa_norm = norm()
        if config.use_ssa:
            self.ssa = SemanticSynthesisAttention(
                config.dim,
                scale=config.sqrt**-0.5,
                dropout=config.ssa_map_dropout,
                kv_scale=config.weight_self,
                **common,
            )
            self.ssa_norm = norm()
        if config.residual == "double" and (config.use_rsa or config.use_ssa):
            self.block_norm = norm()
        if config.ffn_between:
            self.visual_ffn = FeedForward(config.dim, config.ffn_dim, config.dropout)
            self.visual_ffn_norm = norm()
        if config.attribute_attention:
            self.attribute_attention = AttributeSelfAttention(config.dim, dropout=config.dropout, **common)
            self.attribute_attention_norm = norm()
        self.vsa = VisualSynthesisAttention(config.dim, dropout=config.dropout, **common)
        self.vsa_norm = norm()
        self.attribute_ffn = FeedForward(config.dim, config.ffn_dim, config.dropout)
        self.attribute_ffn_norm = norm()

    def forward(self, visual: Tensor, attributes: Tensor, need_weights: bool = False) -> BDANOutput:
        """From regions U (B, HW, C) and attributes V_A (A, C)."""
        if self.rsa is not None:
            visual = self._block(visual, self.rsa(visual), self.rsa_norm)
        queries = self.attribute_queries(attributes, images=visual.shape[0])
        if self.config.order == "ssa-vsa":
            visual, ssa_map = self._ssa(visual, attributes, need_weights)
            memory = self._memory(visual)
            refined, vsa_map = self._vsa(memory, queries, need_weights)
        else:
            refined, vsa_map = self._vsa(visual, queries, need_weights)
            visual, ssa_map = self._ssa(visual, refined, need_weights)
            memory = self._memory(visual)
        features = self.attribute_ffn_norm(refined + self.dropout(self.attribute_ffn(refined)))
        return BDANOutput(features, memory, refined, ssa_map, vsa_map)

    def attribute_queries(self, attributes: Tensor, images: int) -> Tensor:
        """What asks in VSA: (A, C), or (images, A, C) where dropout separates the images."""
        if self.attribute_attention is not None:
            separate = self.training and self.config.dropout > 0
            z = self.attribute_attention(attributes, images if separate else None)
            attributes = self.attribute_attention_norm(attributes + self.dropout(z))
        return self.config.tgt_weight * attributes

    def _block(self, x: Tensor, z: Tensor, norm: nn.Module) -> Tensor:
        """LN_in(x + drop Z), and around it LN_out(x + drop(.)) in the released double form."""
        y = norm(x + self.dropout(z))
        return y if self.block_norm is None else self.block_norm(x + self.dropout(y))

    def _ssa(self, visual: Tensor, attributes: Tensor, need_weights: bool) -> tuple[Tensor, Tensor | None]:
        if self.ssa is None:
            return visual, None
        z, weights = _with_map(self.ssa, visual, attributes, need_weights)
        return self._block(visual, z, self.ssa_norm), weights

    def _memory(self, visual: Tensor) -> Tensor:
        if self.visual_ffn is None:
            return visual
        return self.visual_ffn_norm(visual + self.dropout(self.visual_ffn(visual)))

    def _vsa(self, memory: Tensor, queries: Tensor, need_weights: bool) -> tuple[Tensor, Tensor | None]:
        z, weights = _with_map(self.vsa, memory, queries, need_weights)
        return self.vsa_norm(queries + self.dropout(z)), weights


def _with_map(
    attention: nn.Module, visual: Tensor, attributes: Tensor, need_weights: bool
) -> tuple[Tensor, Tensor | None]:
    result = attention(visual, attributes, need_weights)
    return result if need_weights else (result, None)


class SVENOutput(NamedTuple):
    """class_scores (B, K), the calibration included; attribute_scores e (B, A)."""

    class_scores: Tensor
    attribute_scores: Tensor


class SVEN(nn.Module):
    """The read-out e_bi = <(w W_1)_i, F_bi>, the class scores logit_scale * e att^T + gamma c, and L_VCE's class head.

    Buffers: class_attributes att (K, A); calibration c (K,), -1 for seen and +1 for unseen classes.
    """

    class_attributes: Tensor
    calibration: Tensor

    def __init__(self, config: BDAConfig, class_attributes: Tensor, calibration: Tensor) -> None:
        super().__init__()
        self.config = config
        self.readout = nn.Parameter(torch.randn(config.attribute_dim, config.dim))
        self.class_head = nn.Linear(config.dim, config.num_classes)
        self.register_buffer("class_attributes", class_attributes)
        self.register_buffer("calibration", calibration)

    def forward(self, features: Tensor, attribute_vectors: Tensor) -> SVENOutput:
        """From F (B, A, C) and w (A, attribute_dim)."""
        attribute_scores = (features * (attribute_vectors @ self.readout)).sum(-1)
        return SVENOutput(self.uncalibrated(attribute_scores) + self.bias, attribute_scores)

    @property
    def bias(self) -> Tensor:
        """gamma c, (K,)."""
        return self.config.gamma * self.calibration

    def uncalibrated(self, attribute_scores: Tensor) -> Tensor:
        """logit_scale * e att^T (B, K)."""
        return self.config.logit_scale * (attribute_scores @ self.class_attributes.mT)

    def visual_logits(self, rows: Tensor) -> Tensor:
        """The class head (B, K) on the mean of rows (B, N, C)."""
        logits = self.class_head(rows.mean(1))
        return logits - self.bias if self.config.vce_bias_quirk else logits


class BDAOutput(NamedTuple):
    """What BDA returns.

    class_scores: (B, K), the calibration included; the prediction is their arg max. attribute_scores: e (B, A).
    visual: the encoder's output M (B, HW, C). attributes: U_V (B, A, C). ssa_map (B, HW, A), vsa_map (B, A, HW): the
    attention maps, with heads (B, H, ., .), or None where not asked for.
    """

    class_scores: Tensor
    attribute_scores: Tensor
    visual: Tensor
    attributes: Tensor
    ssa_map: Tensor | None
    vsa_map: Tensor | None


class BDA(nn.Module):
    """The whole model: from a feature map or an image to class scores, with its losses.

    Args:
        config: sizes and flags.
        class_attributes: att (K, A), the classes' attribute vectors; rows of unit length in every released run
            (``class_attribute_matrix`` makes them from a data set's table).
        unseen: boolean (K,) or the indices of the unseen classes.
        attribute_vectors: (A, attribute_dim) initial word vectors, trained with the model; default a normal draw.

    Raises:
        TypeError: ``unseen`` is neither a mask nor class indices.
        ValueError: tensors that do not fit the configuration, or classes that it does not have.
    """

    unseen: Tensor

    def __init__(
        self,
        config: BDAConfig,
        class_attributes: Tensor,
        unseen: Tensor | Iterable[int],
        attribute_vectors: Tensor | None = None,
    ) -> None:
        super().__init__()
        if tuple(class_attributes.shape) != (config.num_classes, config.num_attributes):
            raise ValueError(
                f"class_attributes must be (num_classes, num_attributes) = ({config.num_classes}, "
                f"{config.num_attributes}), got shape {tuple(class_attributes.shape)}"
            )
        vectors = (config.num_attributes, config.attribute_dim)
        if attribute_vectors is None:
            attribute_vectors = torch.randn(vectors)
        elif tuple(attribute_vectors.shape) != vectors:
            raise ValueError(
                f"attribute_vectors must be (num_attributes, attribute_dim) = {vectors}, "
                f"got shape {tuple(attribute_vectors.shape)}"
            )
        self.config = config
        self.stem: nn.Module | None = None
        if config.stem == "conv":
            image, first, second = config.stem_channels
            self.stem = nn.Sequential(
                nn.Conv2d(image, first, 3, padding=1),
                nn.ReLU(),
                nn.Conv2d(first, second, 3, padding=1),
                nn.ReLU(),
                nn.MaxPool2d(3),
            )
        self.embed_visual = nn.Linear(config.image_dim, config.dim)
        self.positions: nn.Parameter | None = None
        if config.positions == "learned":
            self.positions = nn.Parameter(0.02 * torch.randn(config.grid[0] * config.grid[1], config.dim))
        self.attribute_vectors = nn.Parameter(attribute_vectors.detach().clone().to(torch.get_default_dtype()))
        self.embed_attribute = nn.Linear(config.attribute_dim, config.dim)
        self.bdan = BDAN(config)
        mask = _unseen_mask(unseen, config.num_classes)
        calibration = torch.where(mask, 1.0, -1.0).to(self.attribute_vectors.dtype)
        self.sven = SVEN(config, class_attributes.detach().clone().to(calibration.dtype), calibration)
        self.register_buffer("unseen", mask)
        self.unused: released.Unused | None = None

    def forward(self, feature_map: Tensor, need_weights: bool = False) -> BDAOutput:
        """From a feature map (B, image_dim, H, W), or with a stem images (B, channels, 3 H, 3 W)."""
        vectors = self.normalized_attribute_vectors()
        out = self.bdan(self.embed_regions(feature_map), self.attribute_embedding(), need_weights)
        scores = self.sven(out.features, vectors)
        return BDAOutput(
            scores.class_scores, scores.attribute_scores, out.memory, out.attributes, out.ssa_map, out.vsa_map
        )

    def embed_regions(self, feature_map: Tensor) -> Tensor:
        """U (B, HW, C)."""
        channels = self.config.stem_channels[0] if self.stem is not None else self.config.image_dim
        if feature_map.dim() != 4 or feature_map.shape[1] != channels:
            raise ValueError(f"the input must be (B, {channels}, height, width), got shape {tuple(feature_map.shape)}")
        if self.stem is not None:
            feature_map = self.stem(feature_map)
        if tuple(feature_map.shape[2:]) != self.config.grid:
            raise ValueError(f"the grid of regions must be {self.config.grid}, got {tuple(feature_map.shape[2:])}")
        regions = feature_map.flatten(2).mT
        if self.config.normalize_visual:
            regions = nnf.normalize(regions, dim=-1)
        regions = self.embed_visual(regions)
        return regions if self.positions is None else regions + self.positions

    def normalized_attribute_vectors(self) -> Tensor:
        """w (A, attribute_dim)."""
        vectors = self.attribute_vectors
        return nnf.normalize(vectors, dim=-1) if self.config.normalize_attributes else vectors

    def attribute_embedding(self) -> Tensor:
        """V_A (A, C)."""
        return self.embed_attribute(self.normalized_attribute_vectors())

    def losses(self, out: BDAOutput, labels: Tensor) -> dict[str, Tensor]:
        """total = sce + lambda_cal cal + lambda_reg reg + lambda_vce vce, for labels (B,) int64; each of shape ()."""
        config, sven = self.config, self.sven
        rows = out.visual if config.vce_from == "memory" else out.attributes
        terms = {
            "sce": losses.semantic_cross_entropy(sven.uncalibrated(out.attribute_scores), labels),
            "cal": losses.self_calibration(out.class_scores, self.unseen),
            "reg": losses.attribute_regression(out.attribute_scores, sven.class_attributes, labels),
            "vce": losses.visual_cross_entropy(sven.visual_logits(rows), labels),
        }
        total = (
            terms["sce"]
            + config.lambda_cal * terms["cal"]
            + config.lambda_reg * terms["reg"]
            + config.lambda_vce * terms["vce"]
        )
        return {"total": total, **terms}

    @classmethod
    def from_released(cls, state_dict: dict[str, Tensor], config: dict[str, Any]) -> BDA:
        """A model from a checkpoint of the released code, by its own key names; see ``released.load``."""
        return released.load(cls, state_dict, config)

    def to_released(self, *, grads: bool = False) -> dict[str, Tensor]:
        """The state dict under the released key names, bit-equal to what was loaded, or the gradients under them."""
        return released.gradients(self) if grads else released.state_dict(self)


def class_attribute_matrix(attributes: Tensor) -> Tensor:
    """att (K, A) from a data set's table (K, A): missing values, which are negative, become 0, and rows unit length."""
    return nnf.normalize(attributes.clamp(min=0), dim=-1)


def _unseen_mask(unseen: Tensor | Iterable[int], num_classes: int) -> Tensor:
    if isinstance(unseen, Iterable) and not hasattr(unseen, "__array__"):
        unseen = list(unseen)  # torch takes tensors, arrays and lists, no sets and no generators
    given = released.as_classes("unseen", unseen)
    if given.dtype == torch.bool:
        if tuple(given.shape) != (num_classes,):
            raise ValueError(f"unseen must be a mask of {num_classes} classes, got shape {tuple(given.shape)}")
        mask = given.clone()
    else:
        mask = released.class_mask("unseen", given, num_classes)
    if not 0 < int(mask.sum()) < num_classes:
        raise ValueError(f"unseen must leave seen and unseen classes, got {int(mask.sum())} of {num_classes}")
    return mask
