"""A functional simulator of PTX for tests: see the README beside this file."""

from tests.ptxsim.compile import Module, TritonKernel, compile_cuda, compile_triton, load, run_triton
from tests.ptxsim.faults import (
    BlockConflict,
    DivergentBarrier,
    Fault,
    Misaligned,
    MissingWait,
    OutOfBounds,
    PoisonRead,
    SharedLimit,
    SharedRace,
    Stuck,
    Trapped,
    Unsupported,
    UnwrittenShared,
)
from tests.ptxsim.launch import ALL_CHECKS, Kernel, Named, Out
from tests.ptxsim.report import Access, Param, Report, Wavefronts

__all__ = [
    "ALL_CHECKS",
    "Access",
    "BlockConflict",
    "DivergentBarrier",
    "Fault",
    "Kernel",
    "Misaligned",
    "MissingWait",
    "Module",
    "Named",
    "Out",
    "OutOfBounds",
    "Param",
    "PoisonRead",
    "Report",
    "SharedLimit",
    "SharedRace",
    "Stuck",
    "Trapped",
    "TritonKernel",
    "Unsupported",
    "UnwrittenShared",
    "Wavefronts",
    "compile_cuda",
    "compile_triton",
    "load",
    "run_triton",
]
