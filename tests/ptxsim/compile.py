"""PTX from nvcc and from Triton, and modules of kernels."""

from __future__ import annotations

import functools
import inspect
import shutil
import subprocess
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.ptxsim.core import lookup
from tests.ptxsim.launch import Kernel, Named, Out
from tests.ptxsim.lower import lower
from tests.ptxsim.parser import parse
from tests.ptxsim.report import Report

TRITON_TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
    torch.bool: "i1",
}


class Module:
    """The kernels of one PTX text."""

    def __init__(self, ptx: str, name: str = "ptx"):
        self.ptx, self.name = ptx, name
        self.text = parse(ptx)
        self._kernels: dict[str, Kernel] = {}

    @property
    def kernel_names(self) -> list[str]:
        return list(self.text.entries)

    def kernel(self, name: str) -> Kernel:
        """The entry of this name, or the only one whose mangled name contains it."""
        names = [name] if name in self.kernel_names else [n for n in self.kernel_names if name in n]
        if len(names) != 1:
            raise KeyError(f"{name} is in the names of {len(names)} kernels of {self.name}: {self.kernel_names}")
        if names[0] not in self._kernels:
            self._kernels[names[0]] = Kernel(lower(self.text.kernel(names[0]), self.text, lookup))
        return self._kernels[names[0]]


class TritonKernel(Kernel):
    """A Triton kernel, launched like any other; its block, shared memory and scratch arguments are known."""

    def __init__(self, ptx: str, metadata: Any, param_names: Sequence[str]):
        text = parse(ptx)
        super().__init__(lower(text.kernel(metadata.name), text, lookup), param_names)
        self.ptx, self.metadata = ptx, metadata
        self.arguments = len(param_names)
        if metadata.global_scratch_size or metadata.profile_scratch_size:
            raise NotImplementedError(f"{metadata.name} wants scratch memory")

    def launch(self, grid: int | Sequence[int], args: Sequence[Any], **options: Any) -> Report:  # type: ignore[override]
        scratch = [None] * (len(self.lowered.params) - self.arguments)
        block = 32 * self.metadata.num_warps
        return super().launch(grid, block, [*args, *scratch], shared=self.metadata.shared, **options)


def load(ptx: str, *, name: str = "ptx") -> Module:
    """PTX text from anywhere."""
    return Module(ptx, name)


def compile_cuda(source: str | Path, *, arch: str = "sm_80", flags: Sequence[str] = ()) -> Module:
    """nvcc's PTX for CUDA C++ text, or for the file at a Path. Raises RuntimeError with nvcc's words if it refuses."""
    text = source.read_text() if isinstance(source, Path) else source
    where = str(source) if isinstance(source, Path) else ""
    return _compile_cuda(text, where, arch, tuple(flags))


@functools.cache
def _compile_cuda(text: str, where: str, arch: str, flags: tuple[str, ...]) -> Module:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise RuntimeError("there is no nvcc on PATH")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(where) if where else Path(folder) / "kernel.cu"
        if not where:
            path.write_text(text)
        target = Path(folder) / "kernel.ptx"
        command = [nvcc, "-ptx", "-lineinfo", "-std=c++17", f"-arch={arch}", *flags, "-o", str(target), str(path)]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{run.stderr}")
        return Module(target.read_text(), path.name)


def compile_triton(
    fn: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    *,
    divisible: Collection[str] = (),
    arch: int = 80,
    num_warps: int = 4,
    num_stages: int = 3,
    **options: Any,
) -> TritonKernel:
    """A @triton.jit function compiled for sm_``arch`` without a GPU."""
    import triton
    from triton.backends.compiler import GPUTarget

    names = list(inspect.signature(fn.fn).parameters)
    types = {name: "constexpr" if name in constexprs else signature[name] for name in names}
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in divisible}
    source = triton.compiler.ASTSource(fn=fn, signature=types, constexprs=dict(constexprs), attrs=attrs)
    target = GPUTarget("cuda", arch, 32)
    compiled = triton.compile(
        source, target=target, options={"num_warps": num_warps, "num_stages": num_stages, **options}
    )
    return TritonKernel(compiled.asm["ptx"], compiled.metadata, [name for name in names if name not in constexprs])


_compiled: dict[Any, TritonKernel] = {}


def run_triton(
    fn: Any,
    grid: int | Sequence[int],
    *args: Any,
    arch: int = 80,
    num_warps: int = 4,
    num_stages: int = 3,
    launch: Mapping[str, Any] | None = None,
    **constexprs: Any,
) -> Report:
    """``fn[grid](*args, **constexprs)``: compiles as the JIT would specialise it, and launches.

    args: tensors (or Out), numbers, None, in the order of the parameters; constexprs may also be given by position.
    launch: keywords of Kernel.launch.
    """
    parameters = inspect.signature(fn.fn)
    bound = parameters.bind(*args, **{k: v for k, v in constexprs.items() if k in parameters.parameters})
    bound.apply_defaults()
    options = {k: v for k, v in constexprs.items() if k not in parameters.parameters}
    constant = {p.name for p in fn.params if p.is_constexpr}
    fixed = {p.name for p in fn.params if p.do_not_specialize}
    signature, values, divisible = {}, {}, []
    for name, value in bound.arguments.items():
        kind, multiple = _specialise(value)
        if name in constant or value is None or (type(value) is int and value == 1 and name not in fixed):
            values[name] = value
        else:
            signature[name] = kind
            if multiple and name not in fixed:
                divisible.append(name)
    key = (fn, arch, num_warps, num_stages, *map(repr, (signature, values, divisible, options)))
    if key not in _compiled:
        _compiled[key] = compile_triton(
            fn, signature, values, divisible=divisible, arch=arch, num_warps=num_warps, num_stages=num_stages, **options
        )
    return _compiled[key].launch(grid, [bound.arguments[name] for name in signature], **(launch or {}))


def _specialise(value: Any) -> tuple[str, bool]:
    """The Triton type of an argument, and whether the JIT would mark it as a multiple of 16."""
    while isinstance(value, Named | Out):
        value = value.tensor
    if isinstance(value, Tensor):
        return "*" + TRITON_TYPES[value.dtype], int(value.storage_offset()) * value.element_size() % 16 == 0
    if isinstance(value, bool):
        return "i1", False
    if isinstance(value, int):
        kind = "i32" if -(2**31) <= value < 2**31 else "i64" if value < 2**63 else "u64"
        return kind, value % 16 == 0
    return "fp32", False
