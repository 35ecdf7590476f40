"""Seeded edits of the sources, each of which a named test must notice: the tests' own test."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OPTIONS = "test_modules.py::test_every_option_under_every_plan_that_is_exact_for_it"

# What is wrong, file, what the file says, what it says instead, the test that must fail.
MUTATIONS = [
    ("b_q is dropped", "fold.py", "self._key_bias(projected, self.b_q)", "None", OPTIONS),
    (
        "the folded key bias is not scaled",
        "fold.py",
        "bias = self.module.scale * self.module.kv_scale * (",
        "bias = (",
        OPTIONS,
    ),
    (
        "kv_scale does not reach the scores",
        "fold.py",
        "scale=module.scale * module.kv_scale",
        "scale=module.scale",
        OPTIONS,
    ),
    (
        "the values' bias ignores the row sums",
        "fold.py",
        "row_sum[..., None] * row_bias",
        "row_bias",
        OPTIONS,
    ),
    (
        "b_o rides in values whose map is dropped",
        "fold.py",
        "(None, self.b_o) if self.map_dropped else (self.b_o, None)",
        "(self.b_o, None)",
        OPTIONS,
    ),
    (
        "b_k is cut off from the graph",
        "fold.py",
        "self.b_q + 0.0 * self.b_k",
        "self.b_q",
        "test_modules.py::test_the_key_bias_cannot_matter_and_gets_a_zero_gradient_never_none",
    ),
    (
        "RSA loses its geometry",
        "modules.py",
        "fold.attend(self, x, y, attn_bias=attn_bias,",
        "fold.attend(self, x, y,",
        "test_modules.py::test_the_whole_model",
    ),
    (
        "the second LayerNorm is not the shared one",
        "reference.py",
        "self.block_norm(x + self.dropout(y))",
        "norm(x + self.dropout(y))",
        "test_released.py",
    ),
    (
        "a stale fold survives a change of the weights",
        "memo.py",
        "if same and states == states_then:",
        "if same:",
        "test_modules.py::test_frozen_computes_once_what_no_image_changes",
    ),
    (
        "the mask is missing in dV",
        "backends/eager.py",
        "dropped = p if mask is None else p * mask",
        "dropped = p",
        "test_autograd.py::test_derivatives_through_dropout",
    ),
    (
        "the mask is missing in dP",
        "backends/eager.py",
        "            dp = dp * mask",
        "            dp = dp * 1",
        "test_autograd.py::test_derivatives_through_dropout",
    ),
    (
        "the row sums' gradient is lost",
        "backends/eager.py",
        "dp = dp + grad_row_sum[..., None]",
        "dp = dp + 0",
        "test_autograd.py::test_derivatives_through_dropout",
    ),
    (
        "dK is not scaled",
        "backends/eager.py",
        "add=grad_v if key_is_value else None, alpha=scale",
        "add=grad_v if key_is_value else None, alpha=1.0",
        "test_functional.py::test_every_sharing_of_operands",
    ),
    (
        "the residual's gradient is lost where the query is the residual",
        "backends/eager.py",
        "add=dy if residual_is_query else None",
        "add=None",
        "test_autograd.py::test_first_and_second_derivatives",
    ),
    (
        "a fully masked row is not zeroed",
        "backends/eager.py",
        "return weights if dead is None else weights.masked_fill(dead, 0.0)",
        "return weights",
        "test_functional.py::test_masked_keys_and_rows",
    ),
    (
        "the second derivative forgets the map's gradient",
        "autograd.py",
        "dp = dp + grad_weights",
        "dp = dp + 0",
        "test_autograd.py::test_both_ways_of_computing_the_backward_agree",
    ),
    (
        "the Philox counter takes the row's high word first",
        "dropout.py",
        "row & _WORD, row >> 32",
        "row >> 32, row & _WORD",
        "test_dropout.py::test_philox_mask_is_the_documented_function_of_row_and_column",
    ),
    (
        "a rounded map is not normalised again",
        "backends/eager.py",
        "p = p / p.sum(-1, keepdim=True)",
        "p = p / p.new_ones(())",
        "test_functional.py::test_gradients_of_peaked_rows_by_the_one_rule",
    ),
    (
        "a residual enters a narrow GEMM",
        "backends/_gemm.py",
        "and fits and shape[3] >= _NARROW",
        "and fits",
        "test_functional.py::test_a_residual_stays_out_of_a_narrow_gemm",
    ),
    (
        "a fold of other attributes is taken for this one",
        "memo.py",
        "all(a is b for a, b in zip(then, tensors, strict=True))",
        "True",
        "test_modules.py::test_frozen_asks_for_the_same_attributes",
    ),
    (
        "a hook on a projection is ignored",
        "fold.py",
        "if projection._forward_hooks or projection._forward_pre_hooks:",
        "if False:",
        "test_modules.py::test_a_projection_that_is_more_than_its_weight_is_called",
    ),
]


@pytest.mark.parametrize(
    ("file", "original", "mutant", "test"), [m[1:] for m in MUTATIONS], ids=[m[0] for m in MUTATIONS]
)
def test_mutation_is_noticed(file, original, mutant, test, tmp_path):
    for folder in ("bda_fused", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    source = tmp_path / "bda_fused" / file
    text = source.read_text()
    assert text.count(original) == 1, f"{file} no longer has exactly one {original!r}: the mutation tests nothing"
    source.write_text(text.replace(original, mutant))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--tb=no", "-p", "no:cacheprovider", f"tests/{test}"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 1, f"nothing noticed the edit:\n{result.stdout[-2000:]}{result.stderr[-2000:]}"
    assert f"FAILED tests/{test}" in result.stdout
