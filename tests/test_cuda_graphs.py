"""What lets a CUDA graph capture the cuda backend: nothing waits for the GPU, and nothing allocates behind torch's back."""

import re

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from bda_fused import functional as F
from bda_fused.backends import cuda
from tests import attention_cases as cases
from tests.attention_cases import rsa, ssa, vsa
from tests.cuda_device import SOURCES, simulated

# Operators that read a value on the host, or whose result's shape depends on values.
WAITING = re.compile(r"_local_scalar_dense|item|is_nonzero|nonzero|equal\b|unique|masked_select|pin_memory|_to_cpu")


class Refusing(TorchDispatchMode):
    """Fails where an operator waits for the device, or copies to the host."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = str(function).removeprefix("aten.")
        assert not WAITING.match(name), f"{name} waits for the GPU"
        assert torch.device(kwargs.get("device") or "meta").type != "cpu", f"{name} goes to the host"
        return function(*args, **kwargs)


@pytest.fixture
def calls(monkeypatch):
    """Every forward and backward is watched; the number of times that each enqueues its launches."""
    runs = []

    def watched(direction):
        compute = getattr(cuda, direction)

        def run(*args, **kwargs):
            enqueue, count = cuda._run, []

            def counted(*arguments):
                count.append(arguments)
                with _disable_current_modes():
                    enqueue(*arguments)

            # Undone here: the fixture's own patches outlive the simulated device, whose `_run` this wraps.
            with monkeypatch.context() as here, Refusing():
                here.setattr(cuda, "_run", counted)
                result = compute(*args, **kwargs)
            runs.append((direction, len(count)))
            return result

        return run

    for direction in ("forward", "backward"):
        monkeypatch.setattr(cuda, direction, watched(direction))
    return runs


@pytest.mark.parametrize(
    "case",
    [
        ssa(2, 21, 12, 21, bias=(12,), dropout_p=0.3, need_weights=True, need_row_sum=True),
        vsa(2, 12, 21, 20).but(residual="query"),
        rsa(2, 12, 20, masked=0.3),
        ssa(1, 9, 600, 24),
    ],
    ids=["SSA", "VSA", "RSA", "groups of keys"],
)
def test_nothing_waits_and_all_is_allocated_before_the_first_launch(case, calls):
    operands = cases.make_operands(case)
    with simulated():
        cases.run(operands, case, "cuda")
    assert calls == [("forward", 1), ("backward", 1)]


@pytest.mark.parametrize(
    "waits",
    [lambda x: x.sum().item(), lambda x: bool(x.any()), lambda x: x.nonzero(), lambda x: x.to("cpu", torch.float64)],
)
def test_what_waits_is_refused(waits):
    x = torch.ones(3)
    with Refusing(), pytest.raises(AssertionError):
        waits(x)


def test_native_launch_neither_waits_nor_allocates():
    text = "".join((SOURCES / name).read_text() for name in ("launch.cu", "bindings.cpp", "batch_sum.cu"))
    called = set(re.findall(r"\bcuda[A-Z]\w+(?=\()", text))
    assert called == {
        "cudaGetDevice",
        "cudaGetErrorString",
        "cudaGetLastError",
        "cudaFuncSetAttribute",
        "cudaLaunchKernel",
    }


def step(leaves, backend):
    visual, attributes, bias = leaves
    refined = F.ssa(visual, attributes, attributes, visual, attn_bias=bias, backend=backend)
    synthesis = F.vsa(attributes, refined, refined, attributes, backend=backend)
    return [synthesis, *torch.autograd.grad(synthesis.float().sum(), leaves)]


@pytest.mark.gpu
def test_graph_repeats_a_training_step():
    shapes = [(4, 49, 350), (102, 350), (102,)]
    leaves = [torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_() for shape in shapes]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(leaves, "cuda")  # kernels are loaded by their first call, which may not be captured
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(leaves, "cuda")
    for x in leaves:
        x.data.normal_()
    graph.replay()
    assert all(torch.equal(x, y) for x, y in zip(captured, step(leaves, "cuda"), strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU at most")
def test_the_operands_device_is_used_and_the_current_one_stays():
    leaves = [torch.randn(shape, device="cuda:1").requires_grad_() for shape in [(2, 9, 20), (12, 20), (12,)]]
    results = step(leaves, "cuda")
    assert all(x.device == torch.device("cuda:1") for x in results) and torch.cuda.current_device() == 0
