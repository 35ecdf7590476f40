"""What is installed, what was built, and which backends run here: ``python -m bda_fused.info``."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from bda_fused import _native, backends
from bda_fused._version import __version__

# The first driver that runs a statically linked CUDA runtime of this major version (NVIDIA's CUDA compatibility guide).
_DRIVERS = {12: "r525", 13: "r580"}


def report() -> str:
    """Versions, the extension modules with what they were built for, the GPU, and every backend with its reason."""
    built = _native.build_info()
    lines = [
        ("bda_fused", __version__),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("torch", torch.__version__),
        ("triton", _version("triton")),
        ("GPU", _gpu()),
        ("_cpu", _cpu(built.get("_cpu", {}))),
        ("_cuda", _cuda(built.get("_cuda", {}))),
        *((f"backend {name}", reason or "available") for name, reason in backends.availability().items()),
    ]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:{width}}  {text}" for name, text in lines)


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "torch finds none"
    devices = (torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count()))
    return ", ".join(f"{device.name} (sm_{device.major}{device.minor})" for device in devices)


def _cpu(built: dict[str, Any]) -> str:
    reason = _native.status("_cpu")
    if reason is not None:
        return reason
    return f"built with {built['compiler']}, runs {_native.module('_cpu').instruction_set()}"


def _cuda(built: dict[str, Any]) -> str:
    reason = _native.status("_cuda")
    if reason is not None:
        return reason
    module = _native.module("_cuda")
    runtime, driver = module.runtime_version(), module.driver_version()
    needed = f"CUDA {_dotted(runtime)}"
    if runtime // 1000 in _DRIVERS:
        needed += f" ({_DRIVERS[runtime // 1000]} or newer)"
    found = f"one for CUDA {_dotted(driver)}" if driver else "none"
    return (
        f"built with {built['toolkit']} for {', '.join(built['arches'] + built['ptx'])}; "
        f"needs a driver for {needed}, found {found}"
    )


def _dotted(cuda: int) -> str:
    """13020 is CUDA 13.2."""
    return f"{cuda // 1000}.{cuda % 1000 // 10}"


if __name__ == "__main__":
    print(report())
