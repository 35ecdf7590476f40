"""Between tensors and kernels: a launch is planned as an object, and then run, compiled ahead of time or simulated."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import gcd
from typing import Any

import torch
import triton
from torch import Tensor

from bda_fused import shapes

KIB = 1024
# No tile of tiles.py has more rows.
_LARGEST_TILE = 128


@dataclass(frozen=True)
class Target:
    """What the choice of tiles rests on: compute capability (80 for sm_80) and opt-in shared memory in bytes."""

    capability: int
    shared_memory: int

    @classmethod
    def of(cls, device: torch.device) -> Target:
        """That of a CUDA device; of an A100 for the CPU, where the interpreter runs."""
        return _target(device.index) if device.type == "cuda" else cls(80, 163 * KIB)


@lru_cache
def _target(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    # Where torch does not report it, the least that a GPU from sm_80 up has.
    shared_memory = getattr(properties, "shared_memory_per_block_optin", 99 * KIB)
    return Target(10 * properties.major + properties.minor, shared_memory)


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel, not yet made.

    kernel: the Triton function. grid: the number of programs. arguments: its tensors and numbers at run time, by name.
    constants: its compile-time constants, by name. options: num_warps, num_stages
    and, where a tile names its registers, maxnreg. fixed: the constants that the grid rests on.
    """

    kernel: Any
    grid: int
    arguments: dict[str, Tensor | int | float | None]
    constants: dict[str, Any]
    options: dict[str, int]
    fixed: tuple[str, ...] = ()

    def run(self) -> None:
        """Launch on the tensors' device, on its current stream; with BDA_FUSED_AUTOTUNE=1 what was fastest there."""
        from bda_fused.kernels import autotune

        device = next(x.device for x in self.arguments.values() if isinstance(x, Tensor))
        launch = autotune.fastest(self, Target.of(device)) if autotune.ENABLED else self
        launch.start()

    def start(self) -> None:
        """Launch with the constants and options that are given."""
        self.kernel[(self.grid,)](**self.arguments, **self.constants, **self.options)

    def specialization(self) -> tuple[dict[str, str], dict[str, Any], list[str]]:
        """What the compiler knows of the arguments: their types by name, the constants, and the aligned pointers."""
        signature, constants, aligned = {}, dict(self.constants), []
        for parameter in self.kernel.params:
            name = parameter.name
            if name in constants:
                continue
            argument = self.arguments[name]
            if argument is None:
                constants[name] = None
            elif isinstance(argument, Tensor):
                signature[name] = _POINTERS[argument.dtype]
                if argument.data_ptr() % 16 == 0:
                    aligned.append(name)
            else:
                signature[name] = parameter.annotation_type
        return signature, constants, aligned

    def compile(self, target: Target) -> Any:
        """The kernel compiled ahead of time for ``target``, as ``run`` would compile it there."""
        signature, constants, aligned = self.specialization()
        names = self.kernel.arg_names
        types = {name: signature.get(name, "constexpr") for name in names}
        attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
        source = triton.compiler.ASTSource(self.kernel, types, constants, attributes)
        gpu = triton.backends.compiler.GPUTarget("cuda", target.capability, 32)
        return triton.compile(source, target=gpu, options=self.options)


_POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int64: "*i64",
}


def strides(x: Tensor, names: str) -> dict[str, int]:
    """The strides of a 4-D operand by name, 0 along axes of size 1: ``strides(key, "k_b k_h k_s")``."""
    return dict(zip(names.split(), _steps(x), strict=False))


def _steps(x: Tensor) -> list[int]:
    return [shapes.step(x, axis) for axis in range(x.dim())]


def layout(x: Tensor | None) -> tuple[int, int]:
    """What is compiled in of an operand's strides: ``row_stride`` of blocks.py takes it.

    The largest power of two up to 16 that divides the distance of any two rows, in elements; and the distance of
    neighbouring rows where they are packed or lie less than 32 elements apart from that, else 0.
    """
    if x is None:
        return 16, 0
    *_, step, _ = steps = _steps(x)
    width = x.shape[3]
    return gcd(16, *steps[:3]), step if width > 1 and width <= step < width + 32 else 0


def readable_width(x: Tensor) -> int:
    """How many columns of every row lie in memory that may be read: at least its own, at most up to a multiple of 64.

    More than its own where the rows lie further apart, in storage that does not end with the last of them.
    """
    width = x.shape[3]
    room = x.untyped_storage().nbytes() // x.element_size() - int(x.storage_offset()) - 1 - _span(x)
    apart = [step - width for step in _steps(x)[:3] if step]
    return width + max(0, min(-width % 64, room, *apart))


def has_padded_rows(x: Tensor) -> bool:
    """Whether rows lie as those of folded operands do: at a known distance, aligned, and readable in steps of 32."""
    align, step = layout(x)
    aligned = align == 16 and x.data_ptr() % 16 == 0
    return aligned and step > 0 and readable_width(x) >= -(-x.shape[3] // 32) * 32


def _span(x: Tensor) -> int:
    """How far, in elements, the last element lies behind the first."""
    return sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True))


class Rows:
    """How a problem's (b, h, l) are split into groups, one for each set of keys, and the rows that ask them.

    Batch axes that keys and values share belong to the rows. Where the memory of every operand with rows allows it,
    they become one axis with l; elsewhere, and where they lie very far apart, a kernel divides the row number
    (``divided``). ``lean``: it need not, and keys and values have padded rows, so that threads hold few addresses.
    """

    def __init__(
        self, scores: tuple[int, int, int, int], *, keys: tuple[Tensor, ...], rows: tuple[Tensor | None, ...]
    ) -> None:
        images, heads, length, _ = scores
        shared_b, shared_h = (all(x.shape[axis] == 1 or x.stride(axis) == 0 for x in keys) for axis in (0, 1))
        steps = [_steps(x) for x in rows if x is not None and not self._is_one_row(x)]
        self.merged_h = heads > 1 and shared_h and all(h == length * l for _, h, l, _ in steps)
        if self.merged_h:
            heads, length = 1, heads * length
        self.merged_b = images > 1 and heads == 1 and shared_b and all(b == length * l for b, _, l, _ in steps)
        if self.merged_b:
            images, length = 1, images * length
        far = any(_LARGEST_TILE * l >= 2**31 for *_, l, _ in steps)  # else distances within a tile are 32-bit numbers
        self.divided = (images > 1 and shared_b) or (heads > 1 and shared_h) or far
        self.batch = (1 if shared_b else images), (1 if shared_h else heads)
        self.groups = self.batch[0] * self.batch[1]
        self.lean = not self.divided and all(map(has_padded_rows, keys))
        self.length = (images if shared_b else 1) * (heads if shared_h else 1) * length
        self.arguments = {
            "ROWS": self.length,
            "H": heads,
            "L": length,
            "OUTER_H": heads if shared_h else 1,
            "GROUP_H": 1 if shared_h else heads,
        }

    @staticmethod
    def _is_one_row(x: Tensor) -> bool:
        return x.shape[:3] == (1, 1, 1)

    def strides(self, x: Tensor | None, names: str) -> dict[str, int]:
        """As ``strides``, 0 along axes that have become part of l; all 0 for an operand that is not there."""
        if x is None:
            return dict.fromkeys(names.split(), 0)
        b, h, *rest = _steps(x)
        return dict(zip(names.split(), (0 if self.merged_b else b, 0 if self.merged_h else h, *rest), strict=False))

    def share(self, bias: Tensor) -> bool:
        """Whether all rows of a group have the same bias."""
        return self._is_one_row(bias) or (
            not self.merged_b and not self.merged_h and not self.divided and bias.shape[2] == 1
        )
