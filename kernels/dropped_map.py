"""The map with its dropout mask in the signs: what the backward reads of a map that was dropped."""

import triton
import triton.language as tl
from bda_fused.kernels.blocks import keep, load_block
from bda_fused.kernels.launch import Launch, strides
from torch import Tensor

BLOCK_R, BLOCK_C = 32, 128


@triton.jit(do_not_specialize=["w_b", "w_h", "w_l", "ROWS", "S", "H", "L", "PITCH", "threshold"])
def residual_attention_signed_map(
    weights,
    seed,
    signed,
    w_b: "i64",
    w_h: "i64",
    w_l: "i64",
    ROWS: "i32",
    S: "i32",
    H: "i32",
    L: "i32",
    PITCH: "i32",
    threshold: "u32",
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """signed (ROWS, PITCH) = weights where they survive dropout, else -weights; 0 beyond the S columns."""
    tiles_c = tl.cdiv(PITCH, BLOCK_C)
    first = tl.program_id(0) % tiles_c * BLOCK_C
    row = tl.program_id(0) // tiles_c * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = row < ROWS
    row = row.to(tl.int64)
    outer = row // L
    at = outer // H * w_b + outer % H * w_h + (row - outer * L) * w_l
    cols = first + tl.arange(0, BLOCK_C)[None, :]
    p = load_block(weights + at[:, None], inside, cols, S, False, False)  # [BLOCK_R, BLOCK_C]
    p = tl.where(keep(seed, row, threshold, first, BLOCK_C), p, -p)
    mask = inside[:, None] & (cols < PITCH)
    tl.store(signed + row[:, None] * (PITCH // 16 * 16) + cols, p.to(signed.dtype.element_ty), mask=mask)


def plan_signed_map(weights: Tensor, seed: Tensor, signed: Tensor, columns: int, threshold: int) -> list[Launch]:
    """The launch that fills signed (B, H, L, pitch) from weights (B or 1, H or 1, L, columns)."""
    images, heads, rows, pitch = signed.shape
    arguments = {
        "weights": weights, "seed": seed, "signed": signed, **strides(weights, "w_b w_h w_l"),
        "ROWS": images * heads * rows, "S": columns, "H": heads, "L": rows, "PITCH": pitch, "threshold": threshold,
    }  # fmt: skip
    grid = triton.cdiv(images * heads * rows, BLOCK_R) * triton.cdiv(pitch, BLOCK_C)
    constants = {"BLOCK_R": BLOCK_R, "BLOCK_C": BLOCK_C}
    return [Launch(residual_attention_signed_map, grid, arguments, constants, {"num_warps": 4, "num_stages": 2})]
