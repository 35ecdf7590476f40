"""Every test runs on one thread, and memory that nobody wrote reads as NaN."""

import pytest
import torch


@pytest.hookimpl(tryfirst=True)
def pytest_configure():
    torch.set_num_threads(1)
    # torch fills what empty, empty_like, new_empty and resize_ return: NaN for floats, the largest number for integers.
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
