"""The reference model: its symmetries, its geometry, its flags and its refusals."""

import math

import numpy
import pytest
import torch

from bda_fused import reference
from bda_fused.config import BDAConfig
from bda_fused.reference import BDA, FeedForward, RegionSelfAttention, SemanticSynthesisAttention

SMALL = {
    "num_classes": 6,
    "num_attributes": 7,
    "image_dim": 9,
    "attribute_dim": 5,
    "dim": 8,
    "ffn_dim": 11,
    "grid": (2, 3),
}
FEATURES = torch.linspace(-2, 3, 3 * 9 * 6, dtype=torch.float64).sin().view(3, 9, 2, 3)


def model(**options):
    torch.manual_seed(0)
    made = BDA(BDAConfig(**SMALL | options), torch.rand(6, 7), [4, 5]).double().eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return made


def test_permuting_the_batch_permutes_the_results():
    order = torch.tensor([2, 0, 1])
    out, permuted = model()(FEATURES, need_weights=True), model()(FEATURES[order], need_weights=True)
    for x, y in zip(out, permuted, strict=True):
        torch.testing.assert_close(x[order], y)


def test_permuting_the_attributes_permutes_their_scores_and_maps():
    order = torch.randperm(7)
    original, permuted = model(), model()
    with torch.no_grad():
        permuted.attribute_vectors.copy_(original.attribute_vectors[order])
        permuted.sven.class_attributes.copy_(original.sven.class_attributes[:, order])
    x, y = original(FEATURES, need_weights=True), permuted(FEATURES, need_weights=True)
    torch.testing.assert_close(x.class_scores, y.class_scores)
    torch.testing.assert_close(x.attribute_scores[:, order], y.attribute_scores)
    torch.testing.assert_close(x.vsa_map[:, order], y.vsa_map)
    torch.testing.assert_close(x.ssa_map[..., order], y.ssa_map)


def test_maps_are_distributions():
    out = model()(FEATURES, need_weights=True)
    assert out.ssa_map.shape == (3, 6, 7)
    assert out.vsa_map.shape == (3, 7, 6)
    for weights in (out.ssa_map, out.vsa_map):
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1], dtype=torch.float64))
    assert model()(FEATURES).ssa_map is None


def test_shared_attributes_are_the_expanded_ones():
    ssa = SemanticSynthesisAttention(8).double()
    visual, attributes = torch.randn(3, 6, 8, dtype=torch.float64), torch.randn(7, 8, dtype=torch.float64)
    torch.testing.assert_close(ssa(visual, attributes), ssa(visual, attributes.expand(3, -1, -1)))


@pytest.mark.parametrize("cut", ["bdan.ssa", "bdan.vsa", "readout"])
def test_the_attribute_vectors_learn_through_ssa_vsa_and_the_read_out(cut):
    """Each of the three ways carries a part of the gradient: it changes when one is cut."""
    whole, partial = model(), model()
    if cut == "readout":
        vectors = partial.normalized_attribute_vectors
        calls = []
        partial.normalized_attribute_vectors = lambda: (
            calls.append(1) or (vectors().detach() if len(calls) == 1 else vectors())
        )
    else:
        index = 1 if cut == "bdan.ssa" else 0
        attention = partial.get_submodule(cut)
        attend = attention.attend

        def cut_attend(x, y, **kwargs):
            operands = [x, y]
            operands[index] = operands[index].detach()
            return attend(*operands, **kwargs)

        attention.attend = cut_attend
    grads = []
    for made in (whole, partial):
        out = made(FEATURES)
        out.class_scores.square().sum().backward()
        grads.append(made.attribute_vectors.grad)
    assert not torch.allclose(*grads)


@pytest.mark.parametrize("grid", [(14, 14), (2, 3), (1, 1)])
def test_geometry_against_the_literal_formula(grid):
    height, width = grid
    rsa = RegionSelfAttention(4, grid=grid).double()
    torch.nn.init.normal_(rsa.geometry.weight)
    regions = [(r // width, r % width) for r in range(height * width)]
    expected = torch.empty(len(regions), len(regions), dtype=torch.float64)
    weight, bias = rsa.geometry.weight[0].tolist(), rsa.geometry.bias.item()
    for a, (i, j) in enumerate(regions):
        for b, (k, m) in enumerate(regions[: len(regions) if a < 20 else 20]):
            dx = math.log(max(abs((i - k) / height) / (1 / height + 1), 1e-3))
            dy = math.log(max(abs((j - m) / width) / (1 / width + 1), 1e-3))
            angles = [100 * p * 1000 ** (-f / 8) for p in (dx, dy, 0.0, 0.0) for f in range(8)]
            features = [math.sin(x) for x in angles] + [math.cos(x) for x in angles]
            expected[a, b] = -max(0.0, sum(w * x for w, x in zip(weight, features, strict=True)) + bias)
    found = rsa.geometry_bias().detach()
    torch.testing.assert_close(found[:20], expected[:20])
    torch.testing.assert_close(found[:, :20], expected[:, :20])


def test_geometry_survives_casts():
    rsa = RegionSelfAttention(4, grid=(3, 3)).double()
    assert torch.equal(rsa.float().double().geometry_table, RegionSelfAttention(4, grid=(3, 3)).geometry_table)


def test_one_region_and_one_attribute():
    config = BDAConfig(**SMALL | {"grid": (1, 1), "num_attributes": 1})
    made = BDA(config, torch.rand(6, 1), [5]).eval()
    out = made(torch.randn(2, 9, 1, 1), need_weights=True)
    assert out.ssa_map.eq(1).all()
    assert out.vsa_map.eq(1).all()


def test_both_encoder_blocks_share_the_second_layer_norm():
    made, calls = model(), []
    made.bdan.block_norm.register_forward_hook(lambda *_: calls.append(1))
    made(FEATURES)
    assert calls == [1, 1]
    assert model(residual="single").bdan.block_norm is None


def test_in_the_reversed_order_ssa_does_not_reach_the_scores():
    outputs, memories = [], []
    for scale in (1.0, 2.0):
        made = model(order="vsa-ssa")
        with torch.no_grad():
            made.bdan.ssa.v_proj.weight.mul_(scale)
        out = made(FEATURES)
        outputs.append(out.class_scores)
        memories.append(out.visual)
    assert torch.equal(*outputs)
    assert not torch.allclose(*memories)


def test_small_images_and_learned_positions():
    config = BDAConfig(**SMALL | {"stem": "conv", "stem_channels": (1, 3, 9), "positions": "learned", "use_rsa": False})
    made = BDA(config, torch.rand(6, 7), torch.tensor([False] * 4 + [True] * 2))
    assert made(torch.rand(2, 1, 6, 9)).visual.shape == (2, 6, 8)
    assert made.positions.shape == (6, 8)


def test_dropout_separates_the_attributes_of_the_images_in_training():
    made = model(dropout=0.5).train()
    assert made.bdan.attribute_queries(made.attribute_embedding(), images=3).shape == (3, 7, 8)
    assert made.eval().bdan.attribute_queries(made.attribute_embedding(), images=3).shape == (7, 8)


def test_class_attributes_are_clamped_and_normalised():
    found = reference.class_attribute_matrix(torch.tensor([[3.0, -1.0, 4.0]]))
    torch.testing.assert_close(found, torch.tensor([[0.6, 0.0, 0.8]]))


SMALL_CONFIG = BDAConfig(**SMALL)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SemanticSynthesisAttention(0), "dim must be at least 1, got 0"),
        (lambda: SemanticSynthesisAttention(8, num_heads=-2), "num_heads must be at least 1, got -2"),
        (lambda: SemanticSynthesisAttention(8, num_heads=3), "dim must be a multiple .* got dim=8, num_heads=3"),
        (lambda: SemanticSynthesisAttention(8, scale=10**400), "scale must be a finite float or None, got 1000"),
        (lambda: SemanticSynthesisAttention(8, scale=1e39), r"scale must be in the range of float32, got 1e\+39"),
        (lambda: SemanticSynthesisAttention(8, kv_scale=math.inf), "kv_scale must be a finite float, got inf"),
        (lambda: FeedForward(8, 0), "hidden_dim must be at least 1, got 0"),
        (lambda: SemanticSynthesisAttention(8, dropout=1.1), r"dropout must be in \[0, 1\], got 1.1"),
        (lambda: SemanticSynthesisAttention(8, kv_dropout=-1), r"kv_dropout must be in \[0, 1\], got -1"),
        (lambda: RegionSelfAttention(8, grid=(0, 3)), r"grid must be \(H, W\) of at least \(1, 1\), got \(0, 3\)"),
        (lambda: RegionSelfAttention(8, grid=(9, 10**9)), r"\(H, W\) of at most \(65536, 65536\), got \(9, 10{9}\)"),
        (lambda: RegionSelfAttention(8, grid=(2, 3))(torch.rand(1, 5, 8)), "visual must have 2 x 3 = 6 regions, got 5"),
        (
            lambda: BDA(SMALL_CONFIG, torch.rand(7, 6), [5]),
            r"class_attributes must be .* = \(6, 7\), got shape \(7, 6\)",
        ),
        (
            lambda: BDA(SMALL_CONFIG, torch.rand(6, 7), [5], torch.rand(7, 4)),
            r"attribute_vectors must be .* = \(7, 5\), got shape \(7, 4\)",
        ),
        (lambda: BDA(SMALL_CONFIG, torch.rand(6, 7), [6]), r"unseen must hold classes 0 to 5, got \[6\]"),
        (lambda: BDA(SMALL_CONFIG, torch.rand(6, 7), []), "unseen must leave seen and unseen classes, got 0 of 6"),
        (
            lambda: BDA(SMALL_CONFIG, torch.rand(6, 7), torch.ones(5, dtype=torch.bool)),
            "unseen must be a mask of 6 classes",
        ),
        (lambda: model()(torch.rand(3, 8, 2, 3).double()), r"the input must be \(B, 9, height, width\), got shape"),
        (lambda: model()(torch.rand(3, 9, 3, 2).double()), r"the grid of regions must be \(2, 3\), got \(3, 2\)"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SemanticSynthesisAttention("a"), "dim must be an integer, got 'a'"),
        (lambda: SemanticSynthesisAttention(8.0), "dim must be an integer, got 8.0"),
        (lambda: SemanticSynthesisAttention(8, num_heads=True), "num_heads must be an integer, got True"),
        (lambda: SemanticSynthesisAttention(8, scale="a"), "scale must be a finite float or None, got str"),
        (lambda: FeedForward(8, 16.0), "hidden_dim must be an integer, got 16.0"),
        (lambda: FeedForward(8, 16, dropout="a"), r"dropout must be a float in \[0, 1\], got str"),
        (lambda: SemanticSynthesisAttention(8, dropout="a"), r"dropout must be a float in \[0, 1\], got str"),
        (lambda: SemanticSynthesisAttention(8, kv_dropout=None), r"kv_dropout must be a float .*, got NoneType"),
        (lambda: RegionSelfAttention(8, grid=("a", "b")), r"grid must be \(H, W\), two integers, got \('a', 'b'\)"),
        (lambda: RegionSelfAttention(8, grid=(14,)), r"grid must be \(H, W\), two integers, got \(14,\)"),
        (lambda: RegionSelfAttention(8, grid=14), r"grid must be \(H, W\), two integers, got 14"),
        *(
            (lambda unseen=unseen: BDA(SMALL_CONFIG, torch.rand(6, 7), unseen), f"unseen must be a list .* got {shown}")
            for unseen, shown in (
                (torch.tensor([1.5]), "a torch.float32 tensor"),
                (torch.tensor(5), "a torch.int64 tensor"),
                (5, "5"),
                (numpy.array(5), r"array\(5\)"),
                ([1.0], r"\[1.0\]"),
                (["a"], r"\['a'\]"),
                ("a", r"\['a'\]"),
                (None, "None"),
                ([10**30], r"\[10+\]"),
            )
        ),
    ],
)
def test_what_is_of_another_type_is_refused(call, message):
    with pytest.raises(TypeError, match=message):
        call()


@pytest.mark.parametrize(
    "unseen", [[4, 5], range(4, 6), {4, 5}, torch.tensor([4, 5], dtype=torch.uint8), [False] * 4 + [True] * 2]
)
def test_unseen_classes_are_a_mask_or_indices(unseen):
    assert BDA(SMALL_CONFIG, torch.rand(6, 7), unseen).unseen.tolist() == [False] * 4 + [True] * 2
