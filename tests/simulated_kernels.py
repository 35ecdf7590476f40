"""Launches of the Triton kernels executed as compiled sm_80 PTX in the simulator."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from bda_fused.kernels.launch import KIB, Launch, Target

from bda_fused.backends import triton as backend
from tests.ptxsim.compile import TritonKernel
from tests.ptxsim.report import Report

SM80 = Target(80, 163 * KIB)
_kernels: dict[Any, TritonKernel] = {}


def compiled(launch: Launch) -> TritonKernel:
    """The kernel of ``launch``, compiled once for all launches that need the same."""
    signature, constants, aligned = launch.specialization()
    key = (launch.kernel.__name__, *map(repr, (signature, constants, aligned, launch.options)))
    if key not in _kernels:
        kernel = launch.compile(SM80)
        _kernels[key] = TritonKernel(kernel.asm["ptx"], kernel.metadata, list(signature))
    return _kernels[key]


def simulate(launch: Launch, **options: Any) -> Report:
    """The report of ``launch`` on CPU tensors, which are read and written in place; ``options`` as in ptxsim."""
    signature, *_ = launch.specialization()
    arguments = [launch.arguments[name] for name in signature]
    return compiled(launch).launch(launch.grid, arguments, shared_limit=SM80.shared_memory, **options)


@contextmanager
def simulated(**options: Any) -> Iterator[list[tuple[str, Report]]]:
    """Inside the context ``backend="triton"`` takes CPU tensors and is simulated; collects kernels and their reports."""
    reports: list[tuple[str, Report]] = []
    run, can_run = Launch.run, backend.can_run
    Launch.run = lambda launch: reports.append((launch.kernel.__name__, simulate(launch, **options)))  # type: ignore[method-assign]
    backend.can_run = lambda problem: None
    try:
        yield reports
    finally:
        Launch.run, backend.can_run = run, can_run  # type: ignore[method-assign]
