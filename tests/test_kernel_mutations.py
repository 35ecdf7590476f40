"""Seeded edits of the Triton kernels, each of which a named test must notice under the interpreter."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORWARD, BACKWARD, BLOCKS = "residual_attention_forward.py", "residual_attention_backward.py", "blocks.py"

# What is wrong, file, what the file says, what it says instead, the form whose test must fail.
MUTATIONS = [
    (
        "columns beyond the last key are not masked",
        BLOCKS,
        'x = tl.where((cols < S)[None, :], x, -float("inf"))',
        "x = x",
        "SSA-float32",
    ),
    (
        "the sum forgets that a later column group has a greater maximum",
        FORWARD,
        "total *= shrink",
        "total *= 1.0",
        "VSA with two column groups-float32",
    ),
    (
        "values of column groups before a greater maximum keep their weight",
        BLOCKS,
        "acc *= shrinks[g][:, None]",
        "acc *= 1.0",
        "VSA with two column groups-float32",
    ),
    (
        "the map of column groups before a greater maximum keeps its weight",
        FORWARD,
        "factor *= shrinks[later]",
        "factor *= 1.0",
        "VSA with two column groups-float32",
    ),
    (
        "columns behind the last value are stored",
        FORWARD,
        "mask = inside[:, None] if WHOLE else inside[:, None] & (cols < DV)",
        "mask = inside[:, None] & (cols < DV + 1)",
        "SSA-float32",
    ),
    (
        "the strides of images and heads are swapped",
        FORWARD,
        "q = row_pointers(q, at, first, q_b, q_h, q_l,",
        "q = row_pointers(q, at, first, q_h, q_b, q_l,",
        "heads, shared keys-float32",
    ),
    (
        "survivors of dropout are not scaled",
        FORWARD,
        "inverse *= keep_scale",
        "inverse *= 1.0",
        "RSA with dropout-float32",
    ),
    (
        "the lanes of a Philox word are out of order",
        BLOCKS,
        "tl.join(tl.join(w0, w2), tl.join(w1, w3))",
        "tl.join(tl.join(w0, w1), tl.join(w2, w3))",
        "RSA with dropout-float32",
    ),
    (
        "a bias that every row has of its own is read as one row",
        "launch.py",
        "and bias.shape[2] == 1",
        "and bias.shape[2] >= 1",
        "RSA-float32",
    ),
    ("the row sum is missing in dS", BACKWARD, ".to(tl.float32) - delta)", ".to(tl.float32))", "SSA-float32"),
    (
        "the mask is missing in dP",
        BACKWARD,
        "x = tl.where(p > 0.0, x * keep_scale, 0.0)",
        "x = x * 1.0",
        "RSA with dropout-float32",
    ),
    (
        "the map's gradient enters once for every image",
        BACKWARD,
        "owner = inside & (first_b | (dw_b != 0)) & (first_h | (dw_h != 0))",
        "owner = inside",
        "the map shared, values per image-float32",
    ),
    (
        "the residual's gradient is lost where the query is the residual",
        BACKWARD,
        "    if QUERY_IS_RESIDUAL:\n        out +=",
        "    if False:\n        out +=",
        "SSA absorbed, the query is the residual-float32",
    ),
    (
        "the query's gradient is left out where it is the row kernel's",
        BACKWARD,
        "if SHARED_QUERY == 0:",
        "if SHARED_QUERY == 1:",
        "SSA-float32",
    ),
    (
        "dropped weights enter dV",
        "sums.py",
        "a_tile = tl.maximum(a_tile, 0.0)",
        "a_tile = tl.abs(a_tile)",
        "RSA with dropout-float32",
    ),
    (
        "of two terms the first loses its factor",
        "sums.py",
        "(first.alpha / second.alpha, second.alpha)",
        "(1.0, second.alpha)",
        "RSA-float32",
    ),
    (
        "only the last rows are summed",
        "sums.py",
        "acc += tl.sum(tile_x",
        "acc = tl.sum(tile_x",
        "SSA of several tiles-float32",
    ),
    (
        "the second pass forgets the first",
        "residual_attention_long.py",
        "total = total * tl.exp2(top - reference) + ",
        "total = total + ",
        "long score rows-float32",
    ),
]


@pytest.mark.parametrize(
    ("file", "original", "mutant", "form"), [m[1:] for m in MUTATIONS], ids=[m[0] for m in MUTATIONS]
)
def test_mutation_is_noticed(file, original, mutant, form, tmp_path):
    ignored = shutil.ignore_patterns("__pycache__")
    for folder, copy in (("bda_fused", "bda_fused"), ("kernels", "bda_fused/kernels"), ("tests", "tests")):
        shutil.copytree(ROOT / folder, tmp_path / copy, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    source = tmp_path / "bda_fused/kernels" / file
    text = source.read_text()
    assert text.count(original) == 1, f"{file} no longer has exactly one {original!r}: the mutation tests nothing"
    source.write_text(text.replace(original, mutant))
    test = f"tests/interpreted_kernels.py::test_form[{form}]"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--tb=no", "-p", "no:cacheprovider", test]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 1, f"nothing noticed the edit:\n{result.stdout[-2000:]}{result.stderr[-2000:]}"
    assert f"FAILED {test}" in result.stdout
