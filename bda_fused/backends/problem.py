"""What a backend is asked to do: the facts on which the choice between backends rests."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bda_fused.shapes import batch_of


class Options(NamedTuple):
    """What a forward is asked beside its tensors, in the order of the operator's schema, which ops.py explains."""

    scale: float
    dropout_p: float
    residual_is_query: bool
    need_weights: bool
    need_row_sum: bool
    need_grad: bool
    backend: str = "auto"


class BackwardOptions(NamedTuple):
    """What a backward is asked beside its tensors, in the order of the operator's schema.

    needs: whether the gradients of query, key, value and attn_bias are wanted.
    """

    scale: float
    dropout_p: float
    residual_is_query: bool
    needs: list[bool]
    backend: str


class Problem(NamedTuple):
    """One residual attention over 4-D operands, without its data.

    scores: (B, H, L, S), the broadcast of all operands. result_dtype: the dtype of Y. widths: Dk and Dv.
    """

    scores: tuple[int, int, int, int]
    dtype: torch.dtype
    result_dtype: torch.dtype
    device: torch.device
    widths: tuple[int, int]

    @classmethod
    def of(
        cls, query: Tensor, key: Tensor, value: Tensor, residual: Tensor | None, attn_bias: Tensor | None
    ) -> Problem:
        operands = [x for x in (query, key, value, residual, attn_bias) if x is not None]
        return cls(
            scores=(*batch_of(*operands), query.shape[2], key.shape[2]),
            dtype=query.dtype,
            result_dtype=value.dtype if residual is None else torch.result_type(residual, value),
            device=query.device,
            widths=(query.shape[3], value.shape[3]),
        )

    def advice_against_fusing(self, backend: str) -> str | None:
        """None, or one sentence that says why two matrix products should be faster than a fused kernel on a GPU.

        Every row tile reads all keys and values: where these are many bytes, and tensor cores are fast, that takes
        longer than the products do.
        """
        keys, width = self.scores[3], min(self.widths)
        if keys >= 128 and width >= 1024 and torch.cuda.get_device_capability(self.device) >= (9, 0):
            return (
                f"for {keys} keys of width {width} two matrix products are faster than the {backend} backend "
                "on this GPU, by the model of docs/gpu_model.md"
            )
        return None
