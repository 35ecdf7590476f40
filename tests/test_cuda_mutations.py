"""Seeded edits of the CUDA sources, each of which the parity tests' cases must notice, or the simulator."""

import functools
import re
import shutil

import pytest
import torch

from bda_fused.backends import cuda_plan
from tests import cuda_device, ptxsim
from tests.attention_cases import assert_parity, rsa, ssa, vsa
from tests.cuda_device import simulated


def with_nan_behind(x, pitch=41):
    """Rows with NaN behind them."""
    wide = torch.full((*x.shape[:-1], pitch), torch.nan, dtype=x.dtype)
    wide[..., : x.shape[-1]] = x
    return wide[..., : x.shape[-1]]


def aligned_with_nan_behind(x):
    """The same, such that keys and values are not packed."""
    return with_nan_behind(x, 48)


SSA = ssa(2, 21, 13, 23)
DROPOUT = ssa(2, 21, 13, 20, dropout_p=0.4, need_row_sum=True)
GAPS = ssa(2, 21, 13, 23, layout={"residual": with_nan_behind})
STAYING = ssa(2, 21, 13, 23, dropout_p=0.4).but(residual="query")
MAP = vsa(2, 13, 21, 20, need_weights=True)
LEAST = rsa(2, 13, 20, masked=1.0, mask=torch.finfo(torch.float32).min)

# What is wrong, file, what the file says, what it says instead, the case that must fail, and how.
MUTATIONS = [
    ("keys behind the last are not masked", "softmax.cuh", "key >= args.keys ? -INFINITY", "key < 0 ? -INFINITY", SSA, AssertionError),
    ("a warp overtakes another", "products.cuh", "    meet();\n", "", ssa(2, 21, 13, 200), ptxsim.Fault),
    ("the map is read before it is complete", "row_kernel.cuh", "  __syncthreads();  // the map is complete\n", "", SSA, ptxsim.Fault),
    ("rows of odd address lose their shift", "copy.cuh", "8 * (shift & 3)", "0", SSA, AssertionError),
    ("what lies behind a row is multiplied", "products.cuh", "if (valid < 16) x = cut(x, valid);", "", ssa(2, 21, 13, 23, layout={"query": with_nan_behind}), AssertionError),
    ("a slice is overwritten while it is read", "store.cuh", "row_tile % 2 * shared.kSlice", "0 * row_tile", SSA, ptxsim.Fault),
    ("the last column of a run spills into the next row", "store.cuh", "column + column_in_unit + k < size", "true", SSA, (AssertionError, ptxsim.Fault)),
    ("Philox has a round too few", "philox.cuh", "round < 10", "round < 9", DROPOUT, AssertionError),
    ("the mask is missing in dP", "gradient.cuh", "keep.x[e] ? scores[i][j][e] * args.keep_scale : 0.f", "scores[i][j][e]", DROPOUT, AssertionError),
    ("dS forgets the row's mean", "gradient.cuh", "scores[i][j][2 * half] - mean", "scores[i][j][2 * half]", SSA, AssertionError),
    ("a bias's gradient misses rows", "reduce.cuh", "sum += x[i][j][e] + x[i][j][2 + e]", "sum += x[i][j][e]", ssa(2, 21, 13, 20, bias=(13,)), AssertionError),
    ("groups of keys overwrite each other", "softmax.cuh", "args.group == 0 ? 0.f : *target", "0.f", ssa(1, 5, 600, 20, dropout_p=0.4, need_row_sum=True), AssertionError),
]  # fmt: skip

# The same, for the tests marked slow: each compiles both kernels anew.
MORE = [
    ("the scale is lost", "softmax.cuh", "args.scale * kLog2e", "kLog2e", SSA, AssertionError),
    ("rows that stay are added from the row above", "store.cuh", "Shared::kLeftPitch * row;", "Shared::kLeftPitch * (row ^ 8);", STAYING, AssertionError),
    ("a lane is left out of the row's maximum and sum", "reduce.cuh", "x[i][half], 2)", "x[i][half], 0)", SSA, AssertionError),
    ("the bias is not in units of log 2", "softmax.cuh", "+= in_log2(bias[key])", "+= bias[key]", rsa(2, 13, 20), AssertionError),
    ("the least float becomes -inf", "softmax.cuh", "__fmul_rz(bias, kLog2e)", "bias * kLog2e", LEAST, AssertionError),
    ("a row without a key divides by 0", "softmax.cuh", "sum[i][half] == 0.f ? 0.f : 1.f", "1.f", rsa(2, 13, 20, masked_row=True), AssertionError),
    ("stages are read before they arrive", "products.cuh", "    wait_for_copies<2>();\n", "", ssa(2, 21, 13, 200), ptxsim.Fault),
    ("words are shifted before they arrive", "products.cuh", "    wait_for_copies<1>();\n", "", SSA, ptxsim.Fault),
    ("what lies behind a key is multiplied", "products.cuh", "right.template cut_last<BLOCKS>(now, position);", "", ssa(2, 21, 13, 23, layout={"key": aligned_with_nan_behind}), AssertionError),
    ("rows behind the last value are multiplied", "products.cuh", "WHOLE || distance(i) < own_rest", "true", ssa(2, 21, 13, 23, layout={"value": aligned_with_nan_behind}), ptxsim.Fault),
    ("what is added is scaled", "store.cuh", "x = fmaf(x, factor, widen(left[k]))", "x = factor * (x + widen(left[k]))", STAYING, AssertionError),
    ("a run loses the columns before its first vector", "store.cuh", "index < begin ? index : size", "size", GAPS, AssertionError),
    ("a run loses the columns behind its last vector", "store.cuh", "end + index - kSize", "size", GAPS, AssertionError),
    ("what is added loses its shift", "store.cuh", "shifted(words[0], words[1], shift)", "words[0]", GAPS, AssertionError),
    ("what is added in another type is lost", "store.cuh", "store_element(i, load_element(added, kind, i))", "store_element(i, 0.f)", ssa(2, 21, 13, 23, residual_dtype=torch.float16), AssertionError),
    ("neighbouring lanes do not swap their words", "philox.cuh", "return {{got0, got1, words.z, words.w}}", "return {{words.x, words.y, words.z, words.w}}", DROPOUT, AssertionError),
    ("what survives is not scaled", "residual_attention_forward.cu", "args.seed == nullptr ? 1.f : args.keep_scale", "1.f", DROPOUT, AssertionError),
    ("the row sums' gradient is lost", "gradient.cuh", "scores[i][j][2 * half] += gradient;", "", DROPOUT, AssertionError),
    ("the map's gradient is lost", "gradient.cuh", "scores[i][j][2 * half] += x.x;", "", MAP, AssertionError),
    ("a rounded map is taken for P", "gradient.cuh", "total[i][half] == 0.f ? 0.f : 1.f / total[i][half]", "1.f", rsa(2, 33, 20, scale=0.01, bias_size=8.0), AssertionError),
]  # fmt: skip


@pytest.fixture
def copied_sources(tmp_path, monkeypatch):
    """The CUDA sources in a folder, with one row kernel of each direction; sums are taken from where they were."""
    folder, sums = tmp_path / "cuda", cuda_device.module
    shutil.copytree(cuda_device.SOURCES, folder)
    header = folder / "kernels.h"
    header.write_text(re.sub(r"  DO\(NAME, ELEMENT, (?!32x512).*\n", "", header.read_text()))
    for direction in ("forward", "backward"):
        source = folder / f"residual_attention_{direction}.cu"
        source.write_text(re.sub(r"  BDA_FUSED_\w+_TILES\(DO, (?!bf16).*\n", "", source.read_text()))
        monkeypatch.setitem(cuda_plan.TILES["bf16"], direction, (cuda_plan.TILES["bf16"][direction][-1],))

    @functools.cache
    def module(source):
        return ptxsim.compile_cuda(folder / source) if source.startswith("residual_attention") else sums(source)

    monkeypatch.setattr(cuda_device, "module", module)
    return folder


def test_without_an_edit_every_case_passes(copied_sources):
    for case in {id(m[4]): m[4] for m in MUTATIONS + MORE}.values():
        with simulated():
            assert_parity(case, "cuda")


def must_be_noticed(file, original, mutant, case, error, folder):
    source = folder / file
    text = source.read_text()
    assert text.count(original) == 1, f"{file} no longer has exactly one {original!r}: the mutation tests nothing"
    source.write_text(text.replace(original, mutant))
    with simulated(), pytest.raises(error):
        assert_parity(case, "cuda")


@pytest.mark.parametrize("mutation", [m[1:] for m in MUTATIONS], ids=[m[0] for m in MUTATIONS])
def test_mutation_is_noticed(mutation, copied_sources):
    must_be_noticed(*mutation, copied_sources)


@pytest.mark.slow
@pytest.mark.parametrize("mutation", [m[1:] for m in MORE], ids=[m[0] for m in MORE])
def test_every_other_mutation_is_noticed(mutation, copied_sources):
    must_be_noticed(*mutation, copied_sources)
