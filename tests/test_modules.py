"""The fused modules against the reference model."""

import copy
import itertools
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.nn.utils import prune

from bda_fused import fold, modules, plan, reference
from bda_fused.config import BDAConfig
from bda_fused.memo import is_frozen
from bda_fused.testing import assert_close
from tests.parity import assert_same, both, recorded_dropout, replayed_dropout, results, twins

SSA, VSA, RSA = "SemanticSynthesisAttention", "VisualSynthesisAttention", "RegionSelfAttention"


def inputs_for(kind, images, regions, attributes, dim, *, shared=True, dtype=torch.float64):
    visual = torch.randn(images, regions, dim, dtype=dtype)
    if kind == RSA:
        return (visual,)
    return visual, torch.randn(*(() if shared else (images,)), attributes, dim, dtype=dtype)


OPTIONS = [
    dict(zip(("out_proj", "bias", "residual", "kv_scale", "dropout", "kv_dropout", "num_heads"), values, strict=True))
    for values in itertools.product((False, True), (False, True), (False, True), (1.0, 0.3), (0.0, 0.4), (0.0, 0.3), (1, 2))
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "shared"), [(SSA, True), (SSA, False), (VSA, True), (VSA, False), (RSA, True)], ids=str
)
def test_every_option_under_every_plan_that_is_exact_for_it(kind, shared):
    """Both sides of every decision of the plan, with every option of the constructor, in training."""
    torch.manual_seed(0)
    extra = {"grid": (2, 3)} if kind == RSA else {}
    inputs = inputs_for(kind, 2, 6, 5, 8, shared=shared)
    for options in OPTIONS:
        algebras = plan.allowed(
            out_proj=options["out_proj"], heads=options["num_heads"], kv_dropout=options["kv_dropout"] > 0
        )
        for scores, values in itertools.product(*algebras):
            with plan.force(scores=scores, values=values):
                fused, expected = both(kind, 8, inputs, **options, **extra)
            assert_same(fused, expected)


# Every C of the issue once with a small and once with a real set, every (HW, A) at an odd and at an even C: the dims act
# on GEMM shapes alone, so their product would repeat itself.
SIZES = [
    (1, 49, 85), (7, 196, 7), (64, 49, 312), (300, 49, 85), (350, 1, 1), (350, 49, 1), (350, 1, 85), (350, 49, 85),
    (350, 196, 85), (350, 49, 312), (350, 196, 312), (377, 49, 7), (377, 49, 312), (377, 196, 85), (512, 49, 85), (2048, 1, 7),
    (2048, 49, 7),
]  # fmt: skip
GRIDS = {1: (1, 1), 49: (7, 7), 196: (14, 14)}


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(("dim", "regions", "attributes"), SIZES)
def test_sizes(dim, regions, attributes, train):
    torch.manual_seed(0)
    for kind in (SSA, VSA, RSA):
        extra = {"grid": GRIDS[regions], "kv_dropout": 0.2} if kind == RSA else {}
        inputs = inputs_for(kind, 2, regions, attributes, dim)
        fused, expected = both(
            kind, dim, inputs, train=train, out_proj=True, dropout=0.35, residual=kind != RSA, **extra
        )
        assert_same(fused, expected)


@pytest.mark.parametrize("upstream", ["expanded", "transposed"])
def test_upstream_gradients_in_any_layout(upstream):
    torch.manual_seed(0)
    visual, attributes = inputs_for(SSA, 3, 6, 5, 8)
    grad = {
        "expanded": torch.randn((), dtype=torch.float64).expand(3, 6, 8),
        "transposed": torch.randn(8, 6, 3, dtype=torch.float64).permute(2, 1, 0),
    }[upstream]
    assert_same(*both(SSA, 8, (visual, attributes), upstream=grad))


@pytest.mark.parametrize("frozen_side", [0, 1])
def test_inputs_that_need_no_gradient(frozen_side):
    """Frozen attributes or regions: the other gradients are the same."""
    torch.manual_seed(0)
    inputs = inputs_for(SSA, 3, 6, 5, 8)
    for kind in (SSA, VSA):
        natural, fused = twins(kind, 8)
        grads = []
        for module in (natural, fused):
            leaves = [x.clone().requires_grad_(i != frozen_side) for i, x in enumerate(inputs)]
            module(*leaves).square().sum().backward()
            assert leaves[frozen_side].grad is None
            parameters = {f"gradient of {n}": p.grad for n, p in module.named_parameters()}
            grads.append({"gradient of the input": leaves[1 - frozen_side].grad} | parameters)
        assert_same(grads[1], grads[0])


@pytest.mark.parametrize("kind", [SSA, VSA, RSA])
def test_the_key_bias_cannot_matter_and_gets_a_zero_gradient_never_none(kind):
    torch.manual_seed(0)
    extra = {"grid": (2, 3)} if kind == RSA else {}
    for scores in plan.get_args(plan.Scores):
        module = twins(kind, 8, **extra)[1]
        with plan.force(scores=scores):
            module(*inputs_for(kind, 2, 6, 5, 8)).square().sum().backward()
        largest = max(p.grad.abs().max() for p in module.parameters())
        assert module.k_proj.bias.grad is not None
        assert module.k_proj.bias.grad.abs().max() <= 1e-14 * largest


def test_the_key_bias_matters_under_key_dropout():
    torch.manual_seed(0)
    module = twins(SSA, 8, kv_dropout=0.5)[1].train()
    module(*inputs_for(SSA, 2, 6, 5, 8)).square().sum().backward()
    assert module.k_proj.bias.grad.abs().max() > 1e-3


LOW_PRECISION_CASES = [
    (SSA, {}, 2, 49, 85, 350),
    (SSA, {"out_proj": True, "dropout": 0.35}, 2, 49, 85, 64),
    (VSA, {}, 2, 49, 85, 350),
    (VSA, {"out_proj": True, "dropout": 0.35}, 2, 49, 102, 64),
    (VSA, {"out_proj": True}, 4, 196, 85, 64),
    (RSA, {"grid": (7, 7), "out_proj": True}, 2, 49, 0, 350),
    (RSA, {"grid": (7, 7), "out_proj": True, "kv_dropout": 0.2, "dropout": 0.35}, 2, 49, 0, 64),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", range(len(LOW_PRECISION_CASES)))
def test_precision_by_the_one_rule(case, dtype, slow_gemm):
    """Errors against the reference in float64, measured by those of the reference in the same dtype."""
    kind, options, images, regions, attributes, dim = LOW_PRECISION_CASES[case]
    torch.manual_seed(case)
    natural, fused = twins(kind, dim, dtype, **options)
    truth = twins(kind, dim, **options)[0]
    truth.load_state_dict(natural.state_dict())
    inputs = inputs_for(kind, images, regions, attributes, dim, dtype=dtype)
    upstream = torch.randn(images, attributes if kind == VSA else regions, dim).to(dtype)
    for module in (natural, fused, truth):
        module.train()
    with recorded_dropout() as (masks, seeds):
        ours = results(fused, inputs, upstream)
    with replayed_dropout(masks, seeds):
        yardstick = results(natural, inputs, upstream)
    with replayed_dropout(masks, seeds):
        expected = results(truth, tuple(x.double() for x in inputs), upstream.double())
    for name, x in expected.items():
        if name != "gradient of k_proj.bias" or options.get("kv_dropout"):
            assert_close(ours[name], x, yardstick[name], gradient="gradient" in name, name=name)


@pytest.fixture(params=[False, True], ids=["as here", "slow low-precision GEMM"])
def slow_gemm(request, monkeypatch):
    """The same on a CPU without fast low-precision products, where everything inside is float32."""
    if request.param:
        monkeypatch.setattr("bda_fused.numerics.has_fast_gemm", lambda dtype, device: dtype == torch.float32)


@pytest.mark.parametrize("kind", [SSA, VSA])
def test_large_query_bias_in_bfloat16(kind):
    """Folds in float32, rounded once, keep the rule where b_q is large."""
    torch.manual_seed(0)
    natural, fused = twins(kind, 64, torch.bfloat16)
    for module in (natural, fused):
        torch.nn.init.constant_(module.q_proj.bias, 8.0)
    truth = twins(kind, 64)[0]
    truth.load_state_dict(natural.state_dict())
    inputs = inputs_for(kind, 4, 49, 85, 64, dtype=torch.bfloat16)
    expected = truth(*(x.double() for x in inputs))
    assert_close(fused(*inputs), expected, natural(*inputs))


def test_autocast_gives_the_dtypes_of_the_reference():
    torch.manual_seed(0)
    for kind, options in ((SSA, {}), (VSA, {"residual": False}), (RSA, {"grid": (7, 7), "out_proj": True})):
        natural, fused = twins(kind, 64, torch.float32, **options)
        inputs = inputs_for(kind, 2, 49, 85, 64, dtype=torch.float32)
        truth = twins(kind, 64, **options)[0]
        truth.load_state_dict(natural.state_dict())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            yardstick, (y, weights) = natural(*inputs), fused(*inputs, need_weights=True)
        assert y.dtype == yardstick.dtype
        assert weights.dtype == torch.bfloat16
        assert_close(y.bfloat16(), truth(*(x.double() for x in inputs)), yardstick.bfloat16())


def test_inputs_of_another_dtype_are_refused_in_one_sentence():
    module = twins(SSA, 8, torch.float32)[1]
    with pytest.raises(
        TypeError, match=r"must have the parameters' dtype torch\.float32 outside autocast, got torch\.bf"
    ):
        module(*inputs_for(SSA, 2, 6, 5, 8, dtype=torch.bfloat16))


SMALL = {
    "num_classes": 6,
    "num_attributes": 7,
    "image_dim": 9,
    "attribute_dim": 5,
    "dim": 8,
    "ffn_dim": 11,
    "grid": (2, 3),
}


def models(**options):
    config = BDAConfig(**SMALL | options)
    natural = reference.BDA(config, torch.rand(6, 7), [4, 5]).double()
    for parameter in natural.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    fused = modules.BDA(config, torch.rand(6, 7), [4, 5]).double()
    fused.load_state_dict(natural.state_dict())
    return natural, fused


MODEL_OPTIONS = [
    dict(zip(("residual", "order", "attribute_attention", "dropout", "kv_dropout", "num_heads"), values, strict=True))
    for values in itertools.product(
        ("double", "single"), ("ssa-vsa", "vsa-ssa"), (True, False), (0.0, 0.35), (0.0, 1.0), (1, 2)
    )
] + [
    {"use_rsa": False},
    {"use_ssa": False},
    {"geometry": False},
    {"ffn_between": False},
    {"layer_norm": False, "residual": "single"},
    {"positions": "learned", "vce_from": "attributes", "vce_bias_quirk": True},
    {"normalize_visual": False, "normalize_attributes": False, "tgt_weight": 0.5, "weight": 0.01, "gamma": 0.5},
]


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_the_whole_model(train):
    """Class scores, attribute scores, regions, maps, losses and every parameter's gradient, for every flag."""
    torch.manual_seed(0)
    feature_map, labels = torch.randn(3, 9, 2, 3, dtype=torch.float64), torch.tensor([0, 1, 2])
    for options in MODEL_OPTIONS:
        natural, fused = (model.train(train) for model in models(**options))
        outputs = []
        with recorded_dropout() as (masks, seeds):
            outputs.append(fused(feature_map, need_weights=True))
        with replayed_dropout(masks, seeds):
            outputs.append(natural(feature_map, need_weights=True))
        found = []
        for model, out in zip((fused, natural), outputs, strict=True):
            losses = model.losses(out, labels)
            losses["total"].backward()
            found.append(
                {name: x.detach() for name, x in (out._asdict() | losses).items() if x is not None}
                | {f"gradient of {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
            )
        assert found[0].keys() == found[1].keys(), options
        assert_same(*found)


def test_fuse_replaces_in_place_and_says_what():
    natural, _ = models()
    parameters, keys = list(natural.parameters()), list(natural.state_dict())
    handle_calls = []
    natural.bdan.ssa.register_forward_hook(lambda *_: handle_calls.append(1))
    replaced = modules.fuse(natural)
    assert replaced == {
        "": "BDA",
        "bdan": "BDAN",
        "bdan.rsa": RSA,
        "bdan.ssa": SSA,
        "bdan.attribute_attention": "AttributeSelfAttention",
        "bdan.vsa": VSA,
    }
    assert isinstance(natural, modules.BDA)
    assert all(x is y for x, y in zip(parameters, natural.parameters(), strict=True))
    assert keys == list(natural.state_dict())
    natural(torch.randn(1, 9, 2, 3, dtype=torch.float64))
    assert handle_calls == [1], "hooks stay"
    assert modules.fuse(natural) == {}, "nothing is left to replace"


def test_fuse_leaves_subclasses_and_refuses_what_is_no_module():
    class Mine(reference.SemanticSynthesisAttention):
        pass

    assert modules.fuse(torch.nn.Sequential(Mine(4))) == {}
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got dict"):
        modules.fuse({})


def test_frozen_computes_once_what_no_image_changes(monkeypatch):
    _, model = models()
    model.eval()
    feature_map = torch.randn(3, 9, 2, 3, dtype=torch.float64)
    expected = model(feature_map).class_scores
    rows = []
    linear = fold._Fold.linear
    monkeypatch.setattr(fold._Fold, "linear", lambda self, x, *rest: rows.append(x.dim()) or linear(self, x, *rest))
    with modules.frozen(model):
        first = model(feature_map).class_scores
        assert 2 in rows
        rows.clear()
        second = model(feature_map).class_scores
        assert 2 not in rows, "a shared operand was projected again"
        with torch.no_grad():
            model.bdan.ssa.q_proj.weight.mul_(1.5)
        third = model(feature_map).class_scores
    torch.testing.assert_close(first, expected)
    assert torch.equal(first, second)
    assert not first.requires_grad
    assert not torch.equal(first, third), "a changed parameter was not noticed"
    torch.testing.assert_close(model(feature_map).class_scores, third)
    assert not any(is_frozen(module) for module in model.modules()), "nothing is kept afterwards"


@pytest.fixture
def frozen_ssa():
    """A frozen SSA module that has been called once, its inputs, and a plain twin."""
    torch.manual_seed(0)
    natural, fused = (module.eval() for module in twins(SSA, 8))
    inputs = inputs_for(SSA, 2, 6, 5, 8)
    with modules.frozen(fused):
        fused(*inputs)
        yield fused, natural, inputs


def test_frozen_asks_for_the_same_attributes(frozen_ssa):
    fused, natural, (visual, attributes) = frozen_ssa
    for others in (attributes[:3], 2 * attributes):  # in the same memory, and in other
        torch.testing.assert_close(fused(visual, others), natural(visual, others))
    attributes.mul_(3)
    torch.testing.assert_close(fused(visual, attributes), natural(visual, attributes))


def test_frozen_asks_for_the_same_dtype(frozen_ssa):
    fused, natural, inputs = frozen_ssa
    for module in (fused, natural):
        module.float()
    inputs = tuple(x.float() for x in inputs)
    torch.testing.assert_close(fused(*inputs), natural(*inputs), rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fused(*inputs)
    torch.testing.assert_close(fused(*inputs), natural(*inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        lambda module: setattr(module.q_proj.weight, "data", 2 * module.q_proj.weight.data),
        lambda module: setattr(module, "scale", 3 * module.scale),
        lambda module: setattr(module, "kv_scale", 0.5),
    ],
    ids=["data", "scale", "kv_scale"],
)
def test_frozen_notices_a_change(frozen_ssa, change):
    fused, natural, inputs = frozen_ssa
    change(fused)
    change(natural)
    torch.testing.assert_close(fused(*inputs), natural(*inputs))


def test_frozen_keeps_nothing_that_is_trained_differentiated_compiled_or_copied(frozen_ssa):
    fused, natural, inputs = frozen_ssa
    with torch.enable_grad():
        for _ in range(2):
            fused(*inputs).sum().backward()
    assert fused.v_proj.weight.grad is not None
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), natural(*inputs))
    duplicate = pickle.loads(pickle.dumps(copy.deepcopy(fused)))
    duplicate.q_proj.weight.data.mul_(2)
    assert not is_frozen(duplicate)
    assert not torch.equal(duplicate(*inputs), fused(*inputs))
    fused.train()
    assert not is_frozen(fused)


def test_frozen_holds_for_its_own_thread(frozen_ssa):
    fused, _, _ = frozen_ssa
    with ThreadPoolExecutor(1) as pool:
        assert not pool.submit(is_frozen, fused).result()
    assert is_frozen(fused)


def test_frozen_nests(frozen_ssa):
    fused, _, _ = frozen_ssa
    with modules.frozen(fused):
        assert is_frozen(fused)
    assert is_frozen(fused), "the inner context ended the outer one"


class Adapted(torch.nn.Linear):
    """A linear layer that does more than its weight and bias say, as adapters do."""

    def forward(self, x):
        return 2 * super().forward(x) + x


def doubled(module):
    module.v_proj.register_forward_hook(lambda layer, args, output: 2 * output)


def adapted(module):
    layer = Adapted(8, 8, dtype=torch.float64)
    layer.load_state_dict(module.q_proj.state_dict())
    module.q_proj = layer


@pytest.mark.parametrize("kind", [SSA, VSA, "AttributeSelfAttention"])
@pytest.mark.parametrize(
    "change", [doubled, adapted, lambda module: prune.l1_unstructured(module.k_proj, "weight", 0.5)],
    ids=["hook", "subclass", "pruned"],
)  # fmt: skip
def test_a_projection_that_is_more_than_its_weight_is_called(kind, change):
    torch.manual_seed(0)
    natural, fused = twins(kind, 8)
    inputs = inputs_for(SSA, 2, 6, 5, 8)[1:] if kind == "AttributeSelfAttention" else inputs_for(kind, 2, 6, 5, 8)
    found = []
    for module in (natural, fused):
        change(module)
        optimiser = torch.optim.SGD(module.parameters(), 0.1)
        for _ in range(2):
            optimiser.zero_grad()
            y = module(*inputs)
            y.square().mean().backward()
            optimiser.step()
        found.append(y)
    torch.testing.assert_close(*found)


def test_a_parametrised_projection_is_folded():
    torch.manual_seed(0)
    natural, fused = twins(SSA, 8)
    for module in (natural, fused):
        torch.nn.utils.parametrizations.weight_norm(module.q_proj)
    assert fold.is_plain(fused)
    inputs = inputs_for(SSA, 2, 6, 5, 8)
    assert_same(results(fused, inputs), results(natural, inputs))


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        (((2, 6, 8), (5, 7)), ValueError, r"must be \(rows, 8\) or \(B, rows, 8\), got shape \(5, 7\)"),
        (((2, 6, 8), (8,)), ValueError, r"must be \(rows, 8\) or \(B, rows, 8\), got shape \(8,\)"),
        (((2, 3, 6, 8), (5, 8)), ValueError, r"must be \(rows, 8\) or \(B, rows, 8\), got shape \(2, 3, 6, 8\)"),
        (
            ((2, 6, 8), (3, 5, 8)),
            ValueError,
            r"must have equal batch sizes, or 1, got shapes \(2, 6, 8\) and \(3, 5, 8\)",
        ),
    ],
)
def test_inputs_that_do_not_fit_are_refused(inputs, error, message):
    module = twins(SSA, 8)[1]
    with pytest.raises(error, match=message):
        module(*(torch.randn(shape, dtype=torch.float64) for shape in inputs))


def test_both_inputs_have_the_parameters_dtype():
    visual, attributes = inputs_for(SSA, 2, 6, 5, 8)
    for kind in (SSA, VSA):
        module = twins(kind, 8)[1]
        for inputs in ((visual.float(), attributes), (visual, attributes.float()), (visual.long(), attributes)):
            with pytest.raises(TypeError, match=r"must have the parameters' dtype torch\.float64 outside autocast"):
                module(*inputs)
        with torch.autocast("cpu"), pytest.raises(TypeError, match="must be floating-point tensors, got torch.int64"):
            module.float()(visual.float(), attributes.long())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
def test_shared_rows_and_the_folded_key_bias_stay_in_float32(dtype):
    """Rounding them early is what breaks the rule: they reach the operator in float32."""
    _, fused = twins(SSA, 64, dtype)
    visual, attributes = inputs_for(SSA, 2, 49, 85, 64, dtype=dtype)
    seen = {}
    with torch.no_grad():
        dtypes = fold.Dtypes.of(fused, visual)
        algebra = fold._Fold(fused, dtypes, map_dropped=False)
        for scores in ("fold_key", "merge_key"):
            _, key, seen[scores] = algebra.scores(scores, visual, attributes)
            assert key.dtype == torch.float32, "rounded once, after the fold"
    assert {bias.dtype for bias in seen.values()} == {torch.float32}


def test_rsa_comes_from_the_meta_device():
    with torch.device("meta"):
        module = modules.RegionSelfAttention(8, grid=(2, 3))
    expected = modules.RegionSelfAttention(8, grid=(2, 3))
    module = module.to_empty(device="cpu")
    module.load_state_dict(expected.state_dict())
    visual = torch.randn(2, 6, 8)
    torch.testing.assert_close(module(visual), expected(visual))


def test_frozen_refusals():
    natural, fused = models()
    with pytest.raises(ValueError, match="must be in eval mode to be frozen"), modules.frozen(fused):
        pass
    with pytest.raises(ValueError, match="no fused module to freeze"), modules.frozen(natural.eval()):
        pass
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got NoneType"), modules.frozen(None):
        pass


def test_the_model_compiles_to_one_graph_with_one_recompilation_for_any_batch():
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    _, model = models()
    compiled = torch.compile(model.train(), fullgraph=True, backend=counter)
    plain = models()[1]
    plain.load_state_dict(model.state_dict())
    plain.eval(), model.eval()
    for images in range(1, 9):
        feature_map = torch.randn(images, 9, 2, 3, dtype=torch.float64)
        out, expected = compiled(feature_map), plain(feature_map)
        torch.testing.assert_close(out.class_scores, expected.class_scores)
        torch.testing.assert_close(
            torch.autograd.grad(out.class_scores.sum(), model.attribute_vectors),
            torch.autograd.grad(expected.class_scores.sum(), plain.attribute_vectors),
        )
    assert counter.frame_count <= 2


def test_a_gradient_penalty_through_the_model_equals_the_references():
    natural, fused = (model.eval() for model in models())
    penalties = []
    for model in (natural, fused):
        feature_map = torch.linspace(-1, 1, 2 * 9 * 6, dtype=torch.float64).view(2, 9, 2, 3).requires_grad_()
        (grad,) = torch.autograd.grad(
            model(feature_map).class_scores.logsumexp(-1).sum(), feature_map, create_graph=True
        )
        penalty = (grad.flatten(1).norm(dim=1) - 1).square().mean()
        parameters = [p for n, p in model.named_parameters() if not n.endswith("k_proj.bias") and "class_head" not in n]
        penalties.append([penalty, *torch.autograd.grad(penalty, parameters)])
    torch.testing.assert_close(*penalties)
