"""What a launch can be stopped by."""

from __future__ import annotations

from dataclasses import astuple, dataclass


class Unsupported(NotImplementedError):
    """An opcode or feature of PTX that the simulator does not know; the message quotes it with its line."""


@dataclass(eq=False)
class Fault(Exception):
    """An error of the kernel, found while it ran.

    block: (x, y, z). thread: (x, y, z), or None where a whole warp or block is meant. ptx_line: of the PTX text, from
    1. source: "file:line" of the kernel's source, or "unknown".
    """

    what: str
    kernel: str
    block: tuple[int, int, int]
    thread: tuple[int, int, int] | None
    ptx_line: int
    opcode: str
    source: str

    def __str__(self) -> str:
        who = f"thread {self.thread} of block {self.block}" if self.thread else f"block {self.block}"
        return f"{self.kernel}, {who}: {self.what} [{self.opcode}, PTX line {self.ptx_line}, {self.source}]"

    def __reduce__(self) -> tuple[type[Fault], tuple]:
        return type(self), astuple(self)


class OutOfBounds(Fault):
    """An access outside every allocation, or a write to a constant."""


class Misaligned(Fault):
    """An address that is no multiple of the access's size."""


class SharedRace(Fault):
    """Two threads touch a byte of shared memory, one writes, and no barrier orders them."""


class UnwrittenShared(Fault):
    """Shared memory is read before the block wrote it."""


class MissingWait(Fault):
    """Shared memory is touched while a cp.async to it is in flight."""


class PoisonRead(Fault):
    """A byte of an output is read before it is written."""


class DivergentBarrier(Fault):
    """A barrier or warp collective that not all of its members reach together."""


class BlockConflict(Fault):
    """Two blocks touch a global element, one writes, not both by atomics."""


class Stuck(Fault):
    """A barrier that can never complete, or more instructions than allowed."""


class Trapped(Fault):
    """A trap instruction or a failed device assert."""


class SharedLimit(ValueError):
    """A launch with more shared memory than the target allows a block."""


# In the order of Fault::Kind in core/memory.h.
KINDS: tuple[type[Fault], ...] = (
    OutOfBounds,
    Misaligned,
    SharedRace,
    UnwrittenShared,
    MissingWait,
    PoisonRead,
    DivergentBarrier,
    BlockConflict,
    Stuck,
    Trapped,
)
