"""Kernels that the simulator is proved on: CUDA C++ and Triton."""

import shutil
from pathlib import Path

import pytest

from tests import ptxsim

FOLDER = Path(__file__).parent
NEEDS_NVCC = pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc on PATH")


def cuda_kernel(name: str, file: str = "kernels.cu") -> ptxsim.Kernel:
    """A kernel of a .cu file beside this one, compiled once."""
    return ptxsim.compile_cuda(FOLDER / file).kernel(name)
