"""Running a kernel: arguments to parameter bytes, tensors to address ranges, the core's outcome to a fault or a report."""

from __future__ import annotations

import ctypes
import operator
import random
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.ptxsim import core
from tests.ptxsim.faults import KINDS, SharedLimit
from tests.ptxsim.lower import BLOCK_REGISTERS, LANE_REGISTERS, LAUNCH_REGISTERS, RANGE_BITS, LoweredKernel
from tests.ptxsim.parser import Variable
from tests.ptxsim.report import Access, Param, Report, tally

# Check in core/memory.h, in its order; "limit" is checked here.
CHECKS = ("bounds", "alignment", "races", "unwritten", "waits", "poison", "barriers", "blocks")
ALL_CHECKS = frozenset({*CHECKS, "limit"})
MAX_GRID, MAX_BLOCK, MAX_SHARED = (2**31 - 1, 65535, 65535), (1024, 1024, 64), 2**20
POISON, READ, WRITTEN, ATOMIC = 8, 1, 2, 4  # Allocation::Flag in core/memory.h


@dataclass(frozen=True)
class Named:
    """A tensor argument, reported under a name."""

    name: str
    tensor: Tensor | Out


@dataclass(frozen=True)
class Out:
    """A tensor whose bytes are poisoned before the launch: 0xFF, and a fault if read before they are written."""

    tensor: Tensor


@dataclass
class _Range:
    """A storage in the launch's address space, with its shadows: see Allocation in core/memory.h."""

    name: str
    memory: np.ndarray  # its bytes
    base: int
    granule: int
    writable: bool
    flags: np.ndarray
    by_block: np.ndarray = field(default_factory=lambda: np.zeros((3, 0), np.int32))

    def allocation(self) -> core.Allocation:
        self.by_block = np.zeros((3, -(-self.memory.size // self.granule)), np.int32)
        shadows = (self.flags.ctypes.data, *(row.ctypes.data for row in self.by_block))
        return core.Allocation(self.memory.ctypes.data, self.memory.size, *shadows, self.granule, self.writable)

    def param(self, traffic: Sequence[core.Traffic]) -> Param:
        unique = [int(np.count_nonzero(self.flags & flag)) for flag in (READ, WRITTEN, ATOMIC)]
        read, write, atomic = (
            Access(t.requests, t.bytes, t.sectors, t.ideal, u) for t, u in zip(traffic, unique, strict=True)
        )
        return Param(read, write, atomic, int(np.count_nonzero(self.flags & POISON)))


class AddressSpace:
    """Global memory of one launch. Each storage has a range of its own, whatever number of tensors view it."""

    def __init__(self) -> None:
        self.ranges: list[_Range] = []
        self.by_host: dict[int, _Range] = {}  # by the host's address of a storage
        self.by_name: dict[str, _Range] = {}  # by the name of each tensor that views it

    def add(self, name: str, memory: np.ndarray, granule: int, *, writable: bool = True) -> _Range:
        base = (len(self.ranges) + 1) << RANGE_BITS
        self.ranges.append(_Range(name, memory, base, granule, writable, np.zeros_like(memory)))
        self.call(name, self.ranges[-1])
        return self.ranges[-1]

    def call(self, name: str, found: _Range) -> None:
        if self.by_name.setdefault(name, found) is not found:
            raise ValueError(f"two tensors are called {name}")

    def address(self, name: str, argument: Tensor | Out) -> int:
        """Where a tensor begins; its storage joins the space the first time."""
        tensor = argument.tensor if isinstance(argument, Out) else argument
        if tensor.device.type != "cpu":
            raise ValueError(f"{name} is on {tensor.device}; the simulator takes CPU tensors")
        host, size = tensor.untyped_storage().data_ptr(), tensor.element_size()
        found = self.by_host.get(host)
        if found is None:
            memory = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy()
            found = self.add(name, memory, size)
            if memory.size:
                self.by_host[host] = found
        self.call(name, found)
        found.granule = min(found.granule, size)
        offset = int(tensor.storage_offset()) * size
        if isinstance(argument, Out):
            shape, strides = (*tensor.shape, size), (*(s * size for s in tensor.stride()), 1)
            for memory, value in ((found.memory, 0xFF), (found.flags, POISON)):
                np.lib.stride_tricks.as_strided(memory[offset:], shape, strides)[...] = value
        return found.base + offset

    def translate(self, word: int) -> int:
        """A host address to the address that the kernel sees; any other number stays."""
        for host, known in self.by_host.items():
            if host <= word < host + known.memory.size:
                return known.base + word - host
        return word


class Kernel:
    """A compiled entry, ready to be launched. param_names: what tensors are called in reports."""

    def __init__(self, lowered: LoweredKernel, param_names: Sequence[str] = ()):
        self.lowered = lowered
        self.name = lowered.name
        self.param_names = [*param_names, *map(str, range(len(param_names), len(lowered.params)))]

    def launch(
        self,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        args: Sequence[Any] | bytes,
        *,
        shared: int = 0,
        tensors: Mapping[str, Tensor | Out] | None = None,
        seed: int = 0,
        shared_limit: int = 163 * 1024,
        checks: Collection[str] = ALL_CHECKS,
        max_instructions: int = 1 << 28,
    ) -> Report:
        """Runs the kernel; the README says what arguments may be. Raises Fault, SharedLimit or ValueError."""
        if unknown := set(checks) - ALL_CHECKS:
            raise ValueError(f"no such checks: {sorted(unknown)}; there are {sorted(ALL_CHECKS)}")
        lowered = self.lowered
        grid3, block3 = _three("grid", grid, MAX_GRID), _three("block", block, MAX_BLOCK)
        threads, blocks = int(np.prod(block3)), int(np.prod(grid3))
        least, most = lowered.threads
        if not least <= threads <= most:
            raise ValueError(f"{self.name} cannot run {threads} threads a block; it requires {least} to {most}")
        if not 0 <= shared <= MAX_SHARED:
            raise ValueError(f"{shared} bytes of dynamic shared memory")
        shared_bytes = (-(-lowered.static_shared // 16) * 16 if shared else lowered.static_shared) + shared
        if shared_bytes > shared_limit and "limit" in checks:
            raise SharedLimit(
                f"{self.name} wants {shared_bytes} bytes of shared memory a block, the limit is {shared_limit}"
            )

        space = AddressSpace()
        for variable in lowered.globals:
            data = np.frombuffer(variable.data.ljust(variable.size, b"\0"), np.uint8)
            space.add(variable.name, data, 1, writable=False)
        for name, tensor in (tensors or {}).items():
            space.address(name, tensor)
        params = args.ljust(1, b"\0") if isinstance(args, bytes) else self._pack(args, space)
        params = _translate(params, space)

        known = (*block3, *grid3, shared, shared_bytes, -(-threads // 32))
        launch_constants = [(lowered.specials[name], 4, v) for name, v in zip(LAUNCH_REGISTERS, known, strict=True)]
        constants = np.array([*lowered.constants, *launch_constants], np.int64)
        order = np.random.default_rng(seed).permutation(blocks).astype(np.uint64)
        counts = np.zeros((4, len(lowered.code)), np.uint64)
        allocations = (core.Allocation * len(space.ranges))(*(r.allocation() for r in space.ranges))
        names = (ctypes.c_char_p * len(space.ranges))(*(r.name.encode() for r in space.ranges))
        launch = core.Launch(
            code=lowered.code.ctypes.data,
            instructions=len(lowered.code),
            register_bytes=lowered.register_bytes,
            constants=constants.ctypes.data,
            constant_count=len(constants),
            checks=sum(1 << bit for bit, name in enumerate(CHECKS) if name in checks),
            lane_registers=(core.i32 * 10)(*(lowered.specials[name] for name in LANE_REGISTERS)),
            ctaid=(core.i32 * 3)(*(lowered.specials[name] for name in BLOCK_REGISTERS)),
            grid=(core.u32 * 3)(*grid3),
            block=(core.u32 * 3)(*block3),
            shared_bytes=shared_bytes,
            local_bytes=lowered.local_bytes,
            params=ctypes.cast(ctypes.c_char_p(params), ctypes.c_void_p),
            allocations=allocations,
            names=names,
            allocation_count=len(space.ranges),
            param_bytes=len(params),
            block_order=order.ctypes.data,
            seed=random.Random(seed).getrandbits(64),
            max_steps=max_instructions,
            counters=core.Counters(*(row.ctypes.data for row in counts)),
        )
        outcome = core.Outcome()
        start = time.perf_counter()
        core.load().ptxsim_run(ctypes.byref(launch), ctypes.byref(outcome))
        seconds = time.perf_counter() - start
        if outcome.kind == core.FAILED:
            raise RuntimeError(f"the simulator failed: {outcome.message.decode()}")
        if outcome.kind >= 0:
            self._raise(outcome, grid3, block3)
        traffic = {r.base: r.param(a.traffic) for r, a in zip(space.ranges, allocations, strict=True)}
        used = {name: traffic[r.base] for name, r in space.by_name.items()}
        macs, barriers = launch.counters.macs, launch.counters.barriers
        return tally(lowered.statements, *counts, macs=macs, barriers=barriers, params=used, seconds=seconds)

    def _pack(self, args: Sequence[Any], space: AddressSpace) -> bytes:
        params = self.lowered.params
        if len(args) != len(params):
            raise ValueError(f"{self.name} takes {len(params)} arguments, {len(args)} were given")
        packed = b""
        for param, name, value in zip(params, self.param_names, args, strict=True):
            packed = packed.ljust(-(-len(packed) // param.align) * param.align, b"\0")
            data = _pack_one(param, name, value, space)
            if len(data) != param.size:
                raise ValueError(f"{name} of {self.name} has {param.size} bytes, {value!r} has {len(data)}")
            packed += data
        return packed.ljust(1, b"\0")

    def _raise(self, outcome: core.Outcome, grid: Sequence[int], block: Sequence[int]) -> None:
        statements = self.lowered.statements
        statement = statements[min(outcome.pc, len(statements) - 1)]
        raise KINDS[outcome.kind](
            what=outcome.message.decode(),
            kernel=self.name,
            block=_place(outcome.block, grid),
            thread=_place(outcome.thread, block) if outcome.thread >= 0 else None,
            ptx_line=statement.line,
            opcode=statement.opcode,
            source=f"{statement.source[0]}:{statement.source[1]}" if statement.source[1] else "unknown",
        )


def _pack_one(param: Variable, name: str, value: Any, space: AddressSpace) -> bytes:
    """The bytes of one argument, by the type that the PTX declares; types of bits (.b32) take any number."""
    kind, size = param.type[0], param.size
    if isinstance(value, Named):
        return _pack_one(param, value.name, value.tensor, space)
    if isinstance(value, Tensor | Out) and kind != "f":
        return space.address(name, value).to_bytes(8, "little")
    if isinstance(value, bytes | ctypes.Structure):
        return bytes(value)
    if isinstance(value, np.generic) and kind == "b":
        return value.tobytes()
    number = 0 if value is None and size == 8 else value.item() if isinstance(value, np.generic) else value
    if isinstance(number, int | float) and (kind == "f" or (kind == "b" and isinstance(number, float))):
        return np.array(number, {2: np.float16, 4: np.float32, 8: np.float64}[size]).tobytes()
    bits = 8 * size
    if isinstance(number, int) and -(1 << (bits - 1)) <= number < 1 << bits:
        return (number & ((1 << bits) - 1)).to_bytes(size, "little")
    raise ValueError(f"{name} is a .{param.type} of {size} bytes, which cannot hold {value!r}")


def _translate(params: bytes, space: AddressSpace) -> bytes:
    """Host addresses of registered tensors, at multiples of 8 bytes, to addresses that the kernel sees."""
    whole = len(params) // 8 * 8
    words = np.frombuffer(params[:whole], np.uint64)
    return b"".join(space.translate(int(word)).to_bytes(8, "little") for word in words) + params[whole:]


def _three(what: str, shape: int | Sequence[int], limits: Sequence[int]) -> tuple[int, int, int]:
    axes = [operator.index(axis) for axis in np.atleast_1d(np.asarray(shape))]
    if not 1 <= len(axes) <= 3 or not all(1 <= n <= most for n, most in zip(axes, limits, strict=False)):
        raise ValueError(f"a {what} of {shape}: at least 1, at most {limits}")
    x, y, z = (*axes, 1, 1)[:3]
    return x, y, z


def _place(index: int, shape: Sequence[int]) -> tuple[int, int, int]:
    return index % shape[0], index // shape[0] % shape[1], index // shape[0] // shape[1]
