"""The C++ core: built once for its sources and this CPU, loaded through ctypes."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import subprocess
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).parent / "core"
CACHE = Path(__file__).parents[2] / "build" / "ptxsim"
# Arithmetic is IEEE: no contraction of a * b + c. -fno-math-errno lets square roots vectorise.
FLAGS = ("-std=c++20", "-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-strict-aliasing", "-fPIC")

u32, i32, u64, i64, pointer = ctypes.c_uint32, ctypes.c_int32, ctypes.c_uint64, ctypes.c_int64, ctypes.c_void_p


class Traffic(ctypes.Structure):
    """Traffic in core/memory.h."""

    _fields_ = [(name, u64) for name in ("requests", "bytes", "sectors", "ideal")]


class Allocation(ctypes.Structure):
    """Allocation in core/memory.h. traffic: read, written, by atomics."""

    _fields_ = [
        ("data", pointer),
        ("size", u64),
        ("flags", pointer),
        ("writer", pointer),
        ("reader", pointer),
        ("updater", pointer),
        ("granule", u32),
        ("writable", u32),
        ("traffic", Traffic * 3),
    ]


class Counters(ctypes.Structure):
    """Counters in core/machine.h."""

    _fields_ = [
        *((name, pointer) for name in ("executed", "threads", "passes", "ideal")),
        ("macs", u64),
        ("barriers", u64),
    ]


class Launch(ctypes.Structure):
    """Launch in core/machine.h."""

    _fields_ = [
        ("code", pointer),
        ("instructions", u32),
        ("register_bytes", u32),
        ("constants", pointer),
        ("constant_count", u32),
        ("checks", u32),
        ("lane_registers", i32 * 10),
        ("ctaid", i32 * 3),
        ("grid", u32 * 3),
        ("block", u32 * 3),
        ("shared_bytes", u32),
        ("local_bytes", u32),
        ("param_bytes", u32),
        ("params", pointer),
        ("allocations", ctypes.POINTER(Allocation)),
        ("names", ctypes.POINTER(ctypes.c_char_p)),
        ("allocation_count", u64),
        ("block_order", pointer),
        ("seed", u64),
        ("max_steps", u64),
        ("counters", Counters),
    ]


FAILED = -2  # Outcome.kind where the core itself gave up


class Outcome(ctypes.Structure):
    """Outcome in core/machine.cpp."""

    _fields_ = [("kind", i32), ("pc", i32), ("block", i64), ("thread", i64), ("message", ctypes.c_char * 512)]


@functools.cache
def load() -> ctypes.CDLL:
    """The core, built if no build of these sources is at hand; a build that failed is not tried again."""
    if isinstance(library := _build(), RuntimeError):
        raise library
    core = ctypes.CDLL(str(library))
    core.ptxsim_operation.argtypes = [ctypes.c_char_p, u32]
    core.ptxsim_operation.restype = i32
    core.ptxsim_run.argtypes = [ctypes.POINTER(Launch), ctypes.POINTER(Outcome)]
    core.ptxsim_run.restype = None
    sizes = (u32 * 4)()
    core.ptxsim_sizes(sizes)
    assert [*sizes] == [96, *map(ctypes.sizeof, (Allocation, Launch, Outcome))], "core.py and the core differ in layout"
    return core


def lookup(name: str, mods: int) -> int:
    """The number of an operation with these modifiers, -1 if there is none."""
    return load().ptxsim_operation(name.encode(), mods)


@functools.cache
def _build() -> Path | RuntimeError:
    """Where the library is, or why it could not be built."""
    compiler = shlex.split(os.environ.get("CXX") or (sysconfig.get_config_var("CXX") or "g++").split()[0])
    digest = hashlib.sha256(" ".join([*compiler, *FLAGS, platform.platform(), _cpu()]).encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.read_bytes())
    target = CACHE / f"core-{digest.hexdigest()[:16]}.so"
    if target.exists():
        return target
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        objects = {source: Path(folder) / f"{source.stem}.o" for source in SOURCES.glob("*.cpp")}
        run = functools.partial(subprocess.run, stderr=subprocess.PIPE, text=True)
        partial = Path(folder) / target.name
        try:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                compile_one = lambda pair: run([*compiler, *FLAGS, "-c", pair[0], "-o", pair[1]])  # noqa: E731
                steps = list(pool.map(compile_one, objects.items()))
            steps.append(run([*compiler, "-shared", *objects.values(), "-o", partial]))
        except OSError as error:
            return RuntimeError(f"the simulator's core was not built: {error}")
        if any(step.returncode for step in steps):
            return RuntimeError("the simulator's core was not built:\n" + "".join(step.stderr for step in steps))
        partial.replace(target)
    return target


def _cpu() -> str:
    """What -march=native means here."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
