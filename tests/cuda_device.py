"""A GPU for tests of the cuda backend: its launches, run by the PTX simulator on CPU tensors."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bda_fused.backends import cuda
from bda_fused.backends.cuda_plan import Device, Launch
from tests import ptxsim

SOURCES = Path(__file__).parents[1] / "csrc" / "cuda"
OUTPUTS = {"out", "row_sum", "scores_grad", "dropped", "bias_grad", "bias_grad_sums", "statistics", "packed"}
OUTPUTS |= {"out0", "out1"}
ALLOCATION = 512  # bytes, to a multiple of which torch's allocator and cudaMalloc round


@functools.cache
def module(source: str) -> ptxsim.Module:
    """The kernels of one .cu file."""
    return ptxsim.compile_cuda(SOURCES / source)


SOURCE_OF = {
    "pack_rows": "pack_rows.cu",
    "ordered_sum": "ordered_sum.cu",
    "summed_product": "summed_product.cu",
    "residual_attention_forward": "residual_attention_forward.cu",
    "residual_attention_backward": "residual_attention_backward.cu",
}


def kernel(name: str) -> ptxsim.Kernel:
    source = next(source for stem, source in SOURCE_OF.items() if name.startswith(stem))
    return module(source).kernel(name)


class SimulatedDevice:
    """Runs launches in order, as a stream does.

    launches: those that were run, and reports: what the simulator counted for each.
    """

    def __init__(self, processors: int = 108, shared_limit: int = 163 * 1024, seed: int = 0):
        self.facts = Device(processors, shared_limit)
        self.seed = seed
        self.launches: list[Launch] = []
        self.reports: list[ptxsim.Report] = []
        self._written: set[int] = set()

    def run(self, launches: Sequence[Launch], device: torch.device) -> None:
        for launch in launches:
            self.launches.append(launch)
            self.reports.append(self._run(launch))

    def _run(self, launch: Launch) -> ptxsim.Report:
        outputs = OUTPUTS | ({"weights"} if "forward" in launch.kernel else set())
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in launch.tensors.values()}
        copies = {address: _allocate(storage) for address, storage in storages.items()}
        tensors = {}
        for name, x in launch.tensors.items():
            copy = torch.empty(0, dtype=x.dtype).set_(copies[_address(x)], x.storage_offset(), x.shape, x.stride())
            fresh = name in outputs and _address(x) not in self._written
            tensors[name] = ptxsim.Out(copy) if fresh else copy
        report = kernel(launch.kernel).launch(
            launch.grid,
            launch.block,
            _moved(bytes(launch.arguments), storages, copies),
            shared=launch.shared,
            tensors=tensors,
            seed=self.seed,
            shared_limit=self.facts.shared_limit,
        )
        for name, x in launch.tensors.items():
            if name in outputs:
                self._written.add(_address(x))
                x.untyped_storage().copy_(copies[_address(x)][: x.untyped_storage().nbytes()])
        return report


@contextlib.contextmanager
def simulated(**options) -> Iterator[SimulatedDevice]:
    """Inside the context the cuda backend takes CPU tensors and runs on a simulated device."""
    device = SimulatedDevice(**options)
    before = cuda._run, cuda._device, cuda.can_run
    cuda._run, cuda._device, cuda.can_run = device.run, lambda _: device.facts, lambda _: None
    try:
        yield device
    finally:
        cuda._run, cuda._device, cuda.can_run = before


def _address(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _allocate(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    """A copy as a GPU would hold it: kernels may read whole aligned words, of which the tensor has a part."""
    size = -(-storage.nbytes() // ALLOCATION) * ALLOCATION
    copy = torch.zeros(size, dtype=torch.uint8)
    copy[: storage.nbytes()] = torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),))
    return copy.untyped_storage()


def _moved(
    arguments: bytes, storages: dict[int, torch.UntypedStorage], copies: dict[int, torch.UntypedStorage]
) -> bytes:
    """The arguments with every address in a storage replaced by that in its copy."""
    words = np.frombuffer(arguments, np.uint64).copy()
    for index, word in enumerate(words.tolist()):
        for address, storage in storages.items():
            if address <= word < address + storage.nbytes():
                words[index] = copies[address].data_ptr() + word - address
    return words.tobytes()
