"""The CUDA kernels, compiled to PTX and run by the simulator, through the public functions and autograd."""

import pytest
import torch

from tests import cuda_cases as cases
from tests.cuda_cases import Case, assert_parity, rsa, ssa, vsa
from tests.cuda_device import simulated

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

CASES = {
    # Every kind of attention in every dtype.
    **{f"ssa {d}".replace("torch.", ""): ssa(2, 21, 12, 20, dtype=d) for d in (BF16, FP16, FP32)},
    **{f"vsa {d}".replace("torch.", ""): vsa(2, 12, 21, 20, dtype=d) for d in (BF16, FP16, FP32)},
    **{f"rsa {d}".replace("torch.", ""): rsa(2, 12, 20, dtype=d) for d in (BF16, FP16, FP32)},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_parity(case):
    with simulated():
        assert_parity(case, "cuda")
