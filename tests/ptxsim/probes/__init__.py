"""Kernels that the simulator is proved on: CUDA C++ and Triton."""

from pathlib import Path

from tests import ptxsim

FOLDER = Path(__file__).parent


def cuda_kernel(name: str, file: str = "kernels.cu") -> ptxsim.Kernel:
    """A kernel of a .cu file beside this one, compiled once."""
    return ptxsim.compile_cuda(FOLDER / file).kernel(name)
