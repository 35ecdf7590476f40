"""The two GPU backends on the same inputs, each in the simulator: as good as the rule asks, and as near to each other."""

import pytest
import torch

from bda_fused import functional as F
from bda_fused import testing
from tests import attention_cases as cases
from tests import cuda_device
from tests.attention_cases import rsa, ssa, vsa

pytest.importorskip("triton")
from tests import simulated_kernels

SIMULATED = {"cuda": cuda_device.simulated, "triton": simulated_kernels.simulated}
OPTIONS = {"need_weights": True, "need_row_sum": True}
CASES = {
    "SSA": ssa(2, 21, 12, 20, bias=(12,), **OPTIONS),
    "VSA": vsa(2, 12, 21, 20, **OPTIONS).but(value=None),
    "RSA": rsa(2, 13, 20, **OPTIONS).but(value=None, residual=None),
}
DROPOUT = {name: case.but(dropout_p=0.3) for name, case in CASES.items()}


@pytest.mark.parametrize(
    "case", [*CASES.values(), *DROPOUT.values()], ids=[*CASES, *(f"{name}, dropout" for name in DROPOUT)]
)
def test_results_and_gradients(case):
    operands = cases.make_operands(case)
    ours = {}
    for backend, simulated in SIMULATED.items():
        torch.manual_seed(3)  # the same dropout seed
        with simulated(), testing.record_seeds() as seeds:
            ours[backend] = cases.run(operands, case, backend)
    truth, yardstick = cases.truth_and_yardstick(operands, case, seeds)
    for name, x in truth.items():
        factor = testing.GRADIENT_FACTOR if "gradient" in name else testing.OUTPUT_FACTOR
        term = cases.largest(truth)
        for results in ours.values():
            testing.assert_close(
                results[name], x, yardstick[name], gradient="gradient" in name, largest_term=term, name=name
            )
        distance = (ours["cuda"][name].double() - ours["triton"][name].double()).abs().max()
        assert distance <= testing.error_bound(x, yardstick[name], factor=factor, largest_term=term), name


def test_dropout_masks_are_equal():
    """With an identity as the values the result is M * P, which is 0 where a weight was dropped and nowhere else."""
    query, key = torch.randn(2, 9, 8).bfloat16(), torch.randn(2, 21, 8).bfloat16()
    value = torch.eye(21).bfloat16().expand(2, -1, -1).contiguous()
    dropped = {}
    for backend, simulated in SIMULATED.items():
        torch.manual_seed(3)
        with simulated(), testing.record_seeds() as seeds:
            dropped[backend] = F.residual_attention(query, key, value, dropout_p=0.4, backend=backend) == 0
    assert torch.equal(dropped["cuda"], dropped["triton"])
    assert torch.equal(dropped["cuda"], ~testing.philox_keep(seeds[0], 0.4, (2, 9, 21)))
