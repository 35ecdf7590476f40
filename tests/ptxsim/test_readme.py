"""The README's ten lines run as printed."""

import re

import pytest
import torch

from tests.ptxsim.probes import FOLDER, NEEDS_NVCC

README = (FOLDER.parent / "README.md").read_text()


@NEEDS_NVCC
def test_the_ten_lines():
    pytest.importorskip("triton")
    from tests.ptxsim.probes.triton_kernels import scale

    lines = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    source = """extern "C" __global__ void saxpy(float* y, const float* x, float a, int n) {
        int i = blockIdx.x * blockDim.x + threadIdx.x;
        if (i < n) y[i] = a * x[i];
    }"""
    exec(lines, {"torch": torch, "source": source, "triton_fn": scale})
