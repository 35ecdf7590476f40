"""One PTX instruction, or a few, on arrays: a kernel is written around them and run, one thread for each element."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from tests import ptxsim

_REGISTER = {1: "b16", 2: "b16", 4: "b32", 8: "b64"}


def execute(code: str, *inputs: np.ndarray, out: type, outputs: int = 1, extra: np.ndarray | None = None) -> np.ndarray:
    """Runs ``code`` with a, b, c, ... loaded from ``inputs`` (equally long) and d (d0, d1, ...) stored as ``out``.

    Inputs and outputs are taken by their bits. Predicates p, q, r and registers t0 .. t7 (b32), w0, w1 (b64) are free
    to use; %i is the thread's element. extra: an array of any shape, whose address is the parameter after the inputs'.
    """
    n = len(inputs[0])
    arrays = [np.ascontiguousarray(x) for x in inputs]
    names = ["d"] if outputs == 1 else [f"d{k}" for k in range(outputs)]
    out_size = np.dtype(out).itemsize
    declared = [f".reg .{_REGISTER[x.itemsize]} {name};" for name, x in zip("abcefgh", arrays, strict=False)]
    loads = [
        f"ld.param.u64 %addr, [p{k}]; mad.wide.u32 %addr, %i, {x.itemsize}, %addr; ld.global.b{8 * x.itemsize} {name}, [%addr];"
        for k, (name, x) in enumerate(zip("abcefgh", arrays, strict=False))
    ]
    stores = [
        f"ld.param.u64 %addr, [o{k}]; mad.wide.u32 %addr, %i, {out_size}, %addr; st.global.b{8 * out_size} [%addr], {name};"
        for k, name in enumerate(names)
    ]
    pointers = [*arrays, *([np.ascontiguousarray(extra)] if extra is not None else [])]
    params = [f".param .u64 o{k}" for k in range(outputs)] + [f".param .u64 p{k}" for k in range(len(pointers))]
    lines = [
        ".version 8.0\n.target sm_80\n.address_size 64",
        f".visible .entry probe({', '.join(params)}, .param .u32 n) {{",
        ".reg .pred %inside, p, q, r; .reg .b32 %i, %block, %size; .reg .b64 %addr; .reg .b32 t<8>; .reg .b64 w<2>;",
        *declared,
        *(f".reg .{_REGISTER[out_size]} {name};" for name in names),
        "mov.u32 %i, %tid.x; mov.u32 %block, %ctaid.x; mov.u32 %size, %ntid.x; mad.lo.u32 %i, %block, %size, %i;",
        "ld.param.u32 %block, [n]; setp.ge.u32 %inside, %i, %block; @%inside ret;",
        *loads,
        code,
        *stores,
        "ret; }",
    ]
    results: list[np.ndarray] = [np.zeros(n, out) for _ in names]
    block = min(n, 256)
    args: Sequence[object] = [*map(_tensor, results), *map(_tensor, pointers), n]
    ptxsim.load("\n".join(lines)).kernel("probe").launch(-(-n // block), block, args)
    return results[0] if outputs == 1 else np.stack(results)


def _tensor(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x.view(np.uint8) if x.dtype.kind == "u" else x)
