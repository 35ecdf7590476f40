"""The README's ten lines run as printed, and its numbers of lines are those of the files."""

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


def test_the_files():
    table = README.partition("## The files")[2]
    rows = re.findall(r"^\| (`.*?) \| ([\d, ]+) \|$", table, re.MULTILINE)
    folder, sizes = FOLDER.parent, {}
    for text, numbers in rows:
        names = re.findall(r"`((?:core/)?\w+\.(?:py|cpp|h))`", text)
        sizes |= dict(zip(names, map(int, numbers.split(", ")), strict=True))
    assert sizes, "no table"
    for name, size in sizes.items():
        path = folder / name if (folder / name).exists() else folder / "core" / name
        assert len(path.read_text().splitlines()) == size, name
