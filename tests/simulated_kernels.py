"""Launches of the Triton kernels, executed as compiled PTX in the simulator."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from bda_fused.kernels.launch import KIB, Launch, Target
from tests.ptxsim import Report
from tests.ptxsim.compile import TritonKernel

SM80 = Target(80, 163 * KIB)
_kernels: dict[Any, TritonKernel] = {}


def simulate(launch: Launch, **options: Any) -> Report:
    """The report of ``launch`` on CPU tensors, which are read and written in place; ``options`` as in ptxsim."""
    signature, constants, aligned = launch.specialization()
    key = (launch.kernel.__name__, *map(repr, (signature, constants, aligned, launch.options)))
    if key not in _kernels:
        compiled = launch.compile(SM80)
        _kernels[key] = TritonKernel(compiled.asm["ptx"], compiled.metadata, list(signature))
    arguments = [_pinned(launch.arguments[name]) for name in signature]
    return _kernels[key].launch(launch.grid, arguments, shared_limit=SM80.shared_memory, **options)


def _pinned(argument: Tensor | int | float | None) -> Tensor | int | float | None:
    return argument
