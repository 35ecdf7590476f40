"""Every test runs on one thread, and memory that nobody wrote reads as NaN."""

import torch


def pytest_configure():
    torch.set_num_threads(1)
    # In this mode torch fills what empty, empty_like, new_empty and resize_ return: NaN, or the largest integer. It
    # only warns of operators without a deterministic form, so a test of determinism itself must switch it off.
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
