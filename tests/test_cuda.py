"""The CUDA kernels, compiled to PTX and run by the simulator, through the public functions and autograd."""

import pytest
import torch

from tests import cuda_cases as cases
from tests.cuda_cases import Case, assert_parity, rsa, ssa, vsa
from tests.cuda_device import simulated

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

SHAPE = (2, 21, 20)
HEADS = {
    "per head": Case((2, 3, 9, 10), (2, 3, 13, 10), (2, 3, 13, 12), (2, 3, 9, 12)),
    "keys shared by images": Case((2, 3, 9, 10), (1, 3, 13, 10), (1, 3, 13, 12), None, bias=(1, 3, 9, 13)),
    "keys shared by heads": Case((2, 3, 9, 10), (2, 1, 13, 10), (2, 1, 13, 12), (1, 3, 9, 12), bias=(2, 1, 1, 13)),
    "all shared but values": Case(
        (1, 1, 9, 10), (1, 1, 13, 10), (2, 3, 13, 12), None, dropout_p=0.3, need_weights=True
    ),
}
CASES = {
    # Every kind of attention in every dtype.
    **{f"ssa {dtype}": ssa(2, 21, 12, 20, dtype=dtype) for dtype in (BF16, FP16, FP32)},
    **{f"vsa {dtype}": vsa(2, 12, 21, 20, dtype=dtype) for dtype in (BF16, FP16, FP32)},
    **{f"rsa {dtype}": rsa(2, 12, 20, dtype=dtype) for dtype in (BF16, FP16, FP32)},
    # Widths: below one step of the tensor cores, odd, the released ones, more than one pass over the columns.
    **{f"width {c}": ssa(1, 17, 9, c) for c in (1, 7, 64, 300, 350, 377, 437, 500, 512, 2048)},
    **{f"float32 width {c}": ssa(1, 17, 9, c, dtype=FP32) for c in (1, 7, 350, 377)},
    "key and value of other widths": Case((2, 11, 24), (13, 24), (13, 37), (2, 11, 37)),
    # Numbers of keys and queries: the tails of every block, and more keys than fit on chip.
    **{f"{a} attributes": ssa(1, 33, a, 40) for a in (1, 7, 85, 102, 312, 600)},
    **{f"{hw} regions": vsa(1, 85, hw, 40) for hw in (1, 49, 196)},
    "600 float32 attributes": ssa(1, 9, 600, 24, dtype=FP32),
    # Layouts of every operand.
    **{
        f"{name} {layout.__name__}": ssa(2, 21, 13, 20, bias=(2, 21, 13), layout={name: layout})
        for name in ("query", "key", "value", "residual", "attn_bias")
        for layout in (cases.padded, cases.shifted, cases.transposed)
    },
    "query of odd width, shifted": ssa(2, 21, 13, 21, layout={"query": cases.shifted, "residual": cases.shifted}),
    "keys expanded": rsa(3, 12, 20, layout={"key": cases.expanded, "value": cases.expanded}),
    "query expanded": rsa(3, 12, 20, layout={"query": cases.expanded, "residual": cases.expanded}),
    # Biases: every shape that broadcasts, masks, rows without a key, another dtype.
    **{
        f"bias {shape}": rsa(2, 12, 20, bias=shape, masked=0.3, need_row_sum=True)
        for shape in ((12,), (1,), (12, 12), (12, 1), (2, 1, 12), (2, 12, 12))
    },
    "masked row": ssa(2, 21, 12, 20, bias=(21, 12), masked=0.2, masked_row=True, need_weights=True, need_row_sum=True),
    "masked keys that all share": ssa(2, 21, 12, 20, bias=(12,), masked=0.5),
    "bfloat16 bias": ssa(2, 21, 12, 20, bias=(12,), bias_dtype=BF16),
    # Options.
    **{f"dropout {p}": vsa(2, 12, 21, 20, dropout_p=p, need_weights=True, need_row_sum=True) for p in (0.3, 1.0)},
    "float32 dropout": ssa(2, 12, 21, 20, dtype=FP32, dropout_p=0.5, need_weights=True, need_row_sum=True),
    "dropout in a bias's gradient": rsa(2, 12, 20, dropout_p=0.2),
    "map": ssa(2, 21, 13, 20, need_weights=True),
    "key is value": Case((12, 20), SHAPE, None, (12, 20), need_row_sum=True),
    "query is residual": Case(SHAPE, (13, 20), (13, 20), "query"),
    "query is residual for all images": Case((12, 20), SHAPE, SHAPE, "query"),
    "both": Case(SHAPE, (13, 20), None, "query", dropout_p=0.3),
    "no residual": Case(SHAPE, (13, 20), (13, 20), None),
    "float32 residual": ssa(2, 21, 12, 20, residual_dtype=FP32),
    "bfloat16 residual of float16": ssa(2, 21, 12, 20, dtype=FP16, residual_dtype=BF16),
    "negative scale": ssa(2, 21, 12, 20, scale=-0.7),
    "two dimensions": Case((21, 20), (12, 20), (12, 20), (21, 20)),
    **{f"needs {needs}": ssa(2, 21, 12, 20, bias=(12,), dropout_p=0.3, needs=needs) for needs in ("", *"qkvrb", "qk")},
    **{f"heads, {name}": case for name, case in HEADS.items()},
    # Groups of keys.
    "600 attributes, every option": ssa(
        2, 11, 600, 24, bias=(600,), masked=0.1, dropout_p=0.3, need_weights=True, need_row_sum=True
    ),
    "1030 attributes, bias of rows": ssa(1, 11, 1030, 24, bias=(11, 1030), masked_row=True, need_weights=True),
    "600 regions, key is value": Case((9, 20), (2, 600, 20), None, (9, 20), dropout_p=0.3),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_parity(case):
    with simulated():
        assert_parity(case, "cuda")
