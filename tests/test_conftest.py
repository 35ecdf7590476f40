"""The poison that the other tests rely on is there, and no test loosens it."""

import pytest
import torch


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_memory_that_nobody_wrote_is_nan(dtype):
    written = torch.ones(2, 3, dtype=dtype)
    fresh = (
        torch.empty(2, 3, dtype=dtype),
        torch.empty_strided((2, 3), (4, 1), dtype=dtype),
        torch.empty_like(written),
        written.new_empty(2, 3),
        torch.empty(0, dtype=dtype).resize_(2, 3),
    )
    for tensor in fresh:
        assert tensor.isnan().all()


def test_tests_run_on_one_thread():
    assert torch.get_num_threads() == 1
