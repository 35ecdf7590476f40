"""What a launch did: instructions, memory traffic, shared-memory wavefronts, tensor-core work."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from tests.ptxsim.parser import Statement


@dataclass
class Access:
    """Traffic of one kind. requests: instructions of warps; bytes: over all lanes; sectors: distinct 32-byte sectors a
    request touches, summed; ideal_sectors: what its distinct bytes would fill; unique_bytes: distinct over the launch."""

    requests: int = 0
    bytes: int = 0
    sectors: int = 0
    ideal_sectors: int = 0
    unique_bytes: int = 0

    def __add__(self, other: Access) -> Access:
        return Access(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


@dataclass
class Param:
    """One tensor's traffic. unwritten: bytes of an Out tensor that no thread wrote."""

    read: Access
    write: Access
    atomic: Access
    unwritten: int


@dataclass
class Wavefronts:
    """Shared-memory wavefronts, beside what the same accesses would take without bank conflicts."""

    wavefronts: int = 0
    ideal: int = 0


@dataclass
class Shared(Wavefronts):
    by: dict[str, Wavefronts] = field(default_factory=dict)  # "ld", "st", "ldmatrix", "cp.async", "atom"


@dataclass
class Report:
    """Counts are of warps' instructions unless named otherwise; the README lists the fields."""

    warp_instructions: int
    thread_instructions: int
    opcodes: Counter[str]
    classes: Counter[str]
    mma: int
    macs: int
    barriers: int
    params: dict[str, Param]
    shared: Shared
    lines: Counter[tuple[str, int]]
    seconds: float

    @property
    def global_load(self) -> Access:
        return sum((p.read for p in self._storages()), Access())

    @property
    def global_store(self) -> Access:
        return sum((p.write for p in self._storages()), Access())

    def _storages(self) -> Iterable[Param]:
        """Each entry of params once: tensors that share a storage share it."""
        return {id(p): p for p in self.params.values()}.values()


_INTEGER_OR_BITS = "bsu"


def instruction_class(opcode: str) -> str:
    """A coarse class: "mma", "ldmatrix", "cp.async", "load.global", "store.shared", "atomic", "barrier", "shuffle",
    "branch", "convert", "compare", "move", "special" (approximations), "fp16", "fp32", "fp64", "integer", "other"."""
    tokens = opcode.split(".")
    base, kind = tokens[0], tokens[-1]
    if base in ("mma", "ldmatrix"):
        return base
    if base in ("ld", "st"):
        space = next((t.split("::")[0] for t in tokens[1:] if t.split("::")[0] in _SPACES), "generic")
        return f"{'load' if base == 'ld' else 'store'}.{space}"
    if opcode.startswith("cp.async"):
        return "cp.async" if tokens[2] in ("ca", "cg") else "barrier"
    if base in ("ex2", "lg2", "sin", "cos", "tanh", "rcp", "rsqrt", "sqrt", "div") and "f" in kind:
        return "special"
    if base in _CLASSES:
        return _CLASSES[base]
    if kind in ("f16", "f16x2", "bf16", "bf16x2"):
        return "fp16"
    if kind in ("f32", "f64"):
        return f"fp{kind[1:]}"
    return "integer" if kind[0] in _INTEGER_OR_BITS or kind == "pred" else "other"


_SPACES = ("global", "shared", "local", "param", "const")
_CLASSES = dict.fromkeys(("bar", "barrier", "membar", "fence"), "barrier")
_CLASSES |= dict.fromkeys(("shfl", "vote", "match", "redux", "activemask"), "shuffle")
_CLASSES |= dict.fromkeys(("bra", "ret", "exit", "trap", "call"), "branch")
_CLASSES |= {"atom": "atomic", "red": "atomic", "cvt": "convert", "cvta": "convert", "setp": "compare"}
_CLASSES |= {"mov": "move", "selp": "move", "prmt": "move"}


def tally(
    statements: Sequence[Statement],
    executed: np.ndarray,
    threads: np.ndarray,
    passes: np.ndarray,
    ideal: np.ndarray,
    *,
    macs: int,
    barriers: int,
    params: dict[str, Param],
    seconds: float,
) -> Report:
    """Sums the counters of each static instruction."""
    opcodes: Counter[str] = Counter()
    lines: Counter[tuple[str, int]] = Counter()
    shared = Shared()
    for index, statement in enumerate(statements):
        count = int(executed[index])
        opcodes[statement.opcode] += count
        lines[statement.source] += count
        if passes[index]:
            base = "cp.async" if statement.opcode.startswith("cp.async") else statement.opcode.split(".")[0]
            kind = shared.by.setdefault("atom" if base == "red" else base, Wavefronts())
            for total in (shared, kind):
                total.wavefronts += int(passes[index])
                total.ideal += int(ideal[index])
    opcodes, lines = +opcodes, +lines
    classes: Counter[str] = Counter()
    for opcode, count in opcodes.items():
        classes[instruction_class(opcode)] += count
    return Report(
        warp_instructions=int(executed.sum()),
        thread_instructions=int(threads.sum()),
        opcodes=opcodes,
        classes=classes,
        mma=classes["mma"],
        macs=macs,
        barriers=barriers,
        params=params,
        shared=shared,
        lines=lines,
        seconds=seconds,
    )
