"""Released checkpoints: conformance with the released model's results and gradients, and a round trip of every key.

A conformance file is a safetensors file with ``state_dict.*``, ``input.feature_map``, ``input.label``, ``output.*``,
``loss.*`` and ``grad.*``, and JSON metadata ``config``, ``seenclass`` and ``unseenclass``. Those in the folder
BDA_FUSED_GOLDEN are tested beside one made here, whose results come from an independent formulation.
"""

import json
import math
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from bda_fused import modules, reference
from bda_fused.config import BDAConfig

ENCODER, DECODER = "transformer.transformer_encoder.layers.0.", "transformer.transformer_decoder.layers.0."
OWN_CONFIG = {
    "dim_f": 12,
    "dim_v": 5,
    "tf_common_dim": 6,
    "tf_dim_feedforward": 9,
    "tf_ec_layer": 1,
    "tf_dc_layer": 1,
    "tf_heads": 1,
    "tf_dropout": 0.35,
    "tf_dropout1": 0.1,
    "fsqrt": 7,
    "sqrt": 3,
    "weight": 0.5,
    "weight_self": 0.8,
    "tgt_weight": 1,
    "tf_SAtt": True,
    "normalize_V": True,
    "lambda_": 0.3,
    "lambda_reg": 0.2,
    "lambda_CEVi": 0.1,
}
CLASSES, ATTRIBUTES, SIDE = 5, 4, 14


def own_checkpoint():
    """A state dict in the released key names, with random weights."""
    generator = torch.Generator().manual_seed(0)
    d, f, v, ffn = (OWN_CONFIG[key] for key in ("tf_common_dim", "dim_f", "dim_v", "tf_dim_feedforward"))

    def normal(*shape, std=0.5):
        return std * torch.randn(shape, generator=generator)

    linear = {
        "layer_se.2": (CLASSES, d),
        "transformer.embed_attr.0": (d, v),
        "transformer.embed_cv.0": (d, f),
        "transformer.embed_cv_aux.0": (d, f),
        "transformer.transformer_encoder.WGs.0": (1, 64),
        ENCODER + "pwff.fc1": (ffn, d),
        ENCODER + "pwff.fc2": (d, ffn),
        DECODER + "linear1": (ffn, d),
        DECODER + "linear2": (d, ffn),
        DECODER + "self_attn.out_proj": (d, d),
        DECODER + "multihead_attn.out_proj": (d, d),
    }
    linear |= {f"{ENCODER}{block}.attention.fc_{p}": (d, d) for block in ("mhatt", "mhatt2") for p in "qkvo"}
    state = {}
    for name, shape in linear.items():
        state |= {f"{name}.weight": normal(*shape), f"{name}.bias": normal(shape[0])}
    for attention in ("self_attn", "multihead_attn"):
        state[f"{DECODER}{attention}.in_proj_weight"] = normal(3 * d, d)
        state[f"{DECODER}{attention}.in_proj_bias"] = normal(3 * d)
    norms = [ENCODER + name for name in ("lnorm", "mhatt.layer_norm", "mhatt2.layer_norm", "pwff.layer_norm")]
    for name in norms + [f"{DECODER}norm{i}" for i in (1, 2, 3)]:
        state |= {f"{name}.weight": 1 + normal(d, std=0.1), f"{name}.bias": normal(d)}
    state |= {
        "V": normal(ATTRIBUTES, v),
        "W_1": normal(v, d),
        "weight_ce": torch.eye(CLASSES),
        "bias": torch.tensor(1.0),
    }
    state["att"] = nn.functional.normalize(torch.rand(CLASSES, ATTRIBUTES, generator=generator))
    state["mask_bias"] = torch.tensor([[-1.0, -1.0, 1.0, -1.0, 1.0]])
    return state


def literal_geometry_bias(state):
    """The released geometry, pair by pair: boxes, offsets, sines and cosines."""
    boxes = [(r // SIDE / SIDE, r % SIDE / SIDE, (r // SIDE + 1) / SIDE, (r % SIDE + 1) / SIDE) for r in range(SIDE**2)]
    rows = []
    for x0, y0, x1, y1 in boxes:
        for u0, v0, u1, v1 in boxes:
            w, h, w2, h2 = x1 - x0 + 1, y1 - y0 + 1, u1 - u0 + 1, v1 - v0 + 1
            dx = math.log(max(abs((x0 + x1) / 2 - (u0 + u1) / 2) / w, 1e-3))
            dy = math.log(max(abs((y0 + y1) / 2 - (v0 + v1) / 2) / h, 1e-3))
            rows.append((dx, dy, math.log(w / w2), math.log(h / h2)))
    frequencies = torch.tensor([1000 ** (-k / 8) for k in range(8)], dtype=torch.float64)
    angles = (100 * torch.tensor(rows, dtype=torch.float64)[..., None] * frequencies).flatten(1)
    features = torch.cat((angles.sin(), angles.cos()), -1)
    name = "transformer.transformer_encoder.WGs.0"
    g = torch.relu(features @ state[name + ".weight"].T + state[name + ".bias"])
    return g.view(SIDE**2, SIDE**2)


def literal_forward(state, config, feature_map):
    """The released model in eval mode, written out on its own keys, with torch's decoder layer for the decoder."""
    d = config["tf_common_dim"]

    def linear(x, name):
        return x @ state[name + ".weight"].T + state[name + ".bias"]

    def norm(x, name):
        return nn.functional.layer_norm(x, (d,), state[name + ".weight"], state[name + ".bias"])

    def block(x, y, name, scale, weight, bias):
        q, k, v = (linear(t, f"{ENCODER}{name}.attention.fc_{p}") for t, p in ((x, "q"), (y, "k"), (y, "v")))
        weights = torch.softmax(scale * torch.einsum("brd,bsd->brs", q, weight * k) - bias, -1)
        z = linear(torch.einsum("brs,bsd->brd", weights, weight * v), f"{ENCODER}{name}.attention.fc_o")
        return norm(x + norm(x + z, f"{ENCODER}{name}.layer_norm"), ENCODER + "lnorm")

    images = feature_map.shape[0]
    regions = feature_map.flatten(2).transpose(1, 2)
    regions = linear(regions / regions.norm(dim=-1, keepdim=True).clamp(min=1e-12), "transformer.embed_cv.0")
    vectors = state["V"] / state["V"].norm(dim=-1, keepdim=True)
    attributes = linear(vectors, "transformer.embed_attr.0").repeat(images, 1, 1)
    x = block(regions, regions, "mhatt", config["fsqrt"] ** -0.5, config["weight"], literal_geometry_bias(state))
    x = block(x, attributes, "mhatt2", config["sqrt"] ** -0.5, config["weight_self"], 0.0)
    hidden = torch.relu(linear(x, ENCODER + "pwff.fc1"))
    memory = norm(x + linear(hidden, ENCODER + "pwff.fc2"), ENCODER + "pwff.layer_norm")
    layer = nn.TransformerDecoderLayer(d, 1, config["tf_dim_feedforward"], batch_first=True).double().eval()
    weights = {name.removeprefix(DECODER): x for name, x in state.items() if name.startswith(DECODER)}
    features = torch.func.functional_call(layer, weights, (attributes, memory))
    embed = torch.einsum("iv,vf,bif->bi", vectors, state["W_1"], features)
    return embed, memory


def own_case():
    """A conformance case like the files, its expected values from ``literal_forward``."""
    state = own_checkpoint()
    generator = torch.Generator().manual_seed(1)
    feature_map = torch.randn(3, OWN_CONFIG["dim_f"], SIDE, SIDE, generator=generator, dtype=torch.float64)
    labels = torch.tensor([0, 3, 1])
    unused = {"att", "bias", "mask_bias", "weight_ce"}
    exact = {name: x.double().requires_grad_(name not in unused) for name, x in state.items()}
    embed, memory = literal_forward(exact, OWN_CONFIG, feature_map)
    att, calibration = exact["att"], exact["mask_bias"][0] * exact["bias"]
    unseen = calibration > 0
    scores = embed @ att.T
    cross_entropy = nn.functional.cross_entropy
    head = memory.mean(1) @ exact["layer_se.2.weight"].T + exact["layer_se.2.bias"]
    losses = {
        "loss_CE": cross_entropy(scores, labels),
        "loss_cal": -torch.softmax(scores + calibration, -1)[:, unseen].sum(-1).mean().log(),
        "loss_reg": ((embed - att[labels]) ** 2).mean(),
        "loss_CE_Ve": cross_entropy(head - calibration, labels),
    }
    losses["loss"] = (
        losses["loss_CE"]
        + OWN_CONFIG["lambda_"] * losses["loss_cal"]
        + OWN_CONFIG["lambda_reg"] * losses["loss_reg"]
        + OWN_CONFIG["lambda_CEVi"] * losses["loss_CE_Ve"]
    )
    losses["loss"].backward()
    tensors = {"input.feature_map": feature_map, "input.label": labels}
    tensors |= {f"state_dict.{name}": x for name, x in state.items()}
    tensors |= {
        "output.pred": scores + calibration,
        "output.embed": embed,
        "output.Vis_feature": memory.transpose(1, 2),
    }
    tensors |= {f"loss.{name}": x for name, x in losses.items()}
    tensors |= {f"grad.{name}": x.grad for name, x in exact.items() if x.grad is not None}
    return {name: x.detach() for name, x in tensors.items()}, OWN_CONFIG | {"unseenclass": [2, 4]}


def read_case(path):
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        config = json.loads(metadata["config"]) | {"unseenclass": json.loads(metadata["unseenclass"])}
        return {name: file.get_tensor(name) for name in file.keys()}, config  # noqa: SIM118


FOLDER = os.environ.get("BDA_FUSED_GOLDEN")
FILES = sorted(Path(FOLDER).glob("*.safetensors")) if FOLDER else []
CASES = {"our own": own_case} | {path.stem: (lambda path=path: read_case(path)) for path in FILES}


def part(tensors, prefix):
    return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}


def relative(x, y):
    return float((x - y).detach().norm() / y.norm())


def zero_part(name, d):
    """Where a gradient is zero by mathematics: the key biases, on their own or as the middle third of a stack."""
    if name.endswith("fc_k.bias"):
        return slice(None)
    return slice(d, 2 * d) if name.endswith("in_proj_bias") else slice(0)


@pytest.mark.parametrize("namespace", [reference, modules], ids=["reference", "fused"])
@pytest.mark.parametrize("case", CASES)
def test_conformance(case, namespace):
    """In float64, outputs and losses to 1e-9 and each gradient to 1e-9 of its norm."""
    tensors, config = CASES[case]()
    model = namespace.BDA.from_released(part(tensors, "state_dict."), config).double().eval()
    out = model(tensors["input.feature_map"].double())
    losses = model.losses(out, tensors["input.label"])
    found = {"pred": out.class_scores, "embed": out.attribute_scores, "Vis_feature": out.visual.mT}
    names = {"loss": "total", "loss_CE": "sce", "loss_cal": "cal", "loss_reg": "reg", "loss_CE_Ve": "vce"}
    errors = {name: relative(found[name], x) for name, x in part(tensors, "output.").items()}
    errors |= {name: relative(losses[names[name]], x) for name, x in part(tensors, "loss.").items()}
    losses["total"].backward()
    grads, expected = model.to_released(grads=True), part(tensors, "grad.")
    assert grads.keys() == expected.keys()
    largest = max(float(x.norm()) for x in expected.values())
    zeros = {}
    for name, x in expected.items():
        zero = zero_part(name, model.config.dim)
        zeros[name] = float(grads[name][zero].norm()) / largest
        keep = torch.ones(x.shape, dtype=torch.bool)
        keep[zero] = False
        if keep.any():
            errors[f"gradient of {name}"] = relative(grads[name][keep], x[keep])
    print(f"{case}: largest error {max(errors.values()):.1e}, of zero gradients {max(zeros.values()):.1e}")
    assert {name: error for name, error in errors.items() if not error < 1e-9} == {}
    assert {name: size for name, size in zeros.items() if not size < 1e-12} == {}


@pytest.mark.parametrize("namespace", [reference, modules], ids=["reference", "fused"])
@pytest.mark.parametrize("case", CASES)
def test_conformance_in_float32(case, namespace):
    tensors, config = CASES[case]()
    model = namespace.BDA.from_released(part(tensors, "state_dict."), config).float().eval()
    out = model(tensors["input.feature_map"].float())
    for found, name in ((out.class_scores, "pred"), (out.attribute_scores, "embed"), (out.visual.mT, "Vis_feature")):
        assert relative(found, tensors[f"output.{name}"]) < 2e-5
    losses = model.losses(out, tensors["input.label"])
    assert relative(losses["total"], tensors["loss.loss"]) < 2e-5
    losses["total"].backward()
    grads = model.to_released(grads=True)
    largest = max(float(x.norm()) for x in part(tensors, "grad.").values())
    for name, x in part(tensors, "grad.").items():
        assert (grads[name] - x).norm() < 2e-3 * x.norm() + 1e-6 * largest, name


@pytest.mark.parametrize("case", CASES)
def test_round_trip_is_bit_equal(case):
    tensors, config = CASES[case]()
    state = part(tensors, "state_dict.")
    written = reference.BDA.from_released(state, config).to_released()
    assert written.keys() == state.keys()
    for name, x in state.items():
        assert written[name].dtype == x.dtype, name
        assert torch.equal(written[name], x), name


def test_what_is_written_shares_no_memory_with_the_model():
    state = own_checkpoint() | {"unknown": torch.ones(2)}
    model = reference.BDA.from_released(state, OWN_CONFIG)
    for x in model.to_released().values():
        x.zero_()
    assert all(torch.equal(x, state[name]) for name, x in model.to_released().items())


@pytest.mark.parametrize("stored", [{}, {"bias": torch.tensor(0.7)}], ids=["bias 1", "bias 0.7"])
def test_a_changed_calibration_is_written(stored):
    state = own_checkpoint() | stored
    model = reference.BDA.from_released(state, OWN_CONFIG)
    model.sven.calibration.mul_(0.3)
    written = model.to_released()
    assert written["mask_bias"].shape == state["mask_bias"].shape
    assert torch.equal((written["mask_bias"] * written["bias"])[0], model.sven.calibration)
    loaded = reference.BDA.from_released(written, OWN_CONFIG)
    assert torch.equal(loaded.sven.calibration, model.sven.calibration)
    assert {name for name in state if not torch.equal(written[name], state[name])} <= {"mask_bias", "bias"}


def test_a_changed_calibration_adds_no_key():
    model = reference.BDA.from_released(without("bias"), OWN_CONFIG)
    model.sven.calibration.mul_(0.3)
    written = model.to_released()
    assert written.keys() == without("bias").keys()
    assert torch.equal(written["mask_bias"][0], model.sven.calibration)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_cast_changes_no_calibration(dtype):
    """The product of rounded factors is another than the rounded product."""
    state = own_checkpoint() | {"bias": torch.tensor(0.7), "mask_bias": torch.tensor([[-1.1, -1.3, 1.1, -0.9, 1.7]])}
    written = reference.BDA.from_released(state, OWN_CONFIG).to(dtype).to_released()
    for name in ("mask_bias", "bias"):
        assert torch.equal(written[name], state[name].to(dtype))


def test_the_gradient_of_a_stacked_projection_is_zero_where_it_is_frozen():
    tensors, config = own_case()
    model = reference.BDA.from_released(part(tensors, "state_dict."), config).double().eval()
    frozen, key = (model.bdan.vsa.q_proj, model.bdan.vsa.k_proj), DECODER + "multihead_attn.in_proj_"
    for projection in frozen:
        projection.requires_grad_(False)
    model.attribute_vectors.requires_grad_(False)
    model.losses(model(tensors["input.feature_map"].double()), tensors["input.label"])["total"].backward()
    grads = model.to_released(grads=True)
    assert "V" not in grads
    for leaf in ("weight", "bias"):
        *zeros, value = grads[key + leaf].tensor_split(3)
        assert all(not x.any() for x in zeros)
        assert torch.equal(value, getattr(model.bdan.vsa.v_proj, leaf).grad)


def test_a_fresh_model_writes_a_checkpoint_that_loads():
    config = BDAConfig(
        num_classes=5, num_attributes=4, image_dim=12, attribute_dim=5, dim=6, ffn_dim=9, vce_bias_quirk=True
    )
    model = reference.BDA(config, torch.rand(5, 4), [2, 4])
    released = {"tf_dropout": 0.35, "dim_f": 12, "dim_v": 5, "tf_common_dim": 6, "tf_dim_feedforward": 9}
    loaded = reference.BDA.from_released(model.to_released(), released)
    assert loaded.unseen.tolist() == model.unseen.tolist()
    feature_map = torch.randn(2, 12, 14, 14)
    assert torch.equal(loaded.eval()(feature_map).class_scores, model.eval()(feature_map).class_scores)


def test_wandb_configurations_and_strings():
    """Nested values, numbers as strings, and flags as strings, which the released code read as True."""
    state = own_checkpoint()
    nested = {key: {"value": value} for key, value in OWN_CONFIG.items()} | {"wandb_version": 1}
    nested["tf_dropout1"] = {"value": "0.1"}
    assert reference.BDA.from_released(state, nested).config == reference.BDA.from_released(state, OWN_CONFIG).config
    with pytest.warns(UserWarning, match="tf_SAtt is the string 'false', which the released code reads as True"):
        model = reference.BDA.from_released(state, OWN_CONFIG | {"tf_SAtt": "false"})
    assert model.config.attribute_attention


def test_without_classes_the_unseen_ones_come_from_mask_bias():
    assert reference.BDA.from_released(own_checkpoint(), OWN_CONFIG).unseen.nonzero().flatten().tolist() == [2, 4]


@pytest.mark.parametrize(
    "classes",
    [
        {"unseenclass": [0, 3]},
        {"unseenclass": {"value": [0, 3]}},
        {"unseenclass": torch.tensor([3, 0], dtype=torch.int16)},
        {"seenclass": [1, 2, 4]},
        {"seenclass": {"value": [1, 2, 4]}, "unseenclass": [0, 3]},
        {"seenclass": None, "unseenclass": [0, 3]},
    ],
    ids=str,
)
def test_the_configuration_says_which_classes_are_unseen(classes):
    model = reference.BDA.from_released(own_checkpoint(), OWN_CONFIG | classes)
    assert model.unseen.nonzero().flatten().tolist() == [0, 3]


def without(key):
    return {name: x for name, x in own_checkpoint().items() if name != key}


@pytest.mark.parametrize(
    ("state", "config", "message"),
    [
        (without("V"), OWN_CONFIG, "the checkpoint has no key 'V': it is not one of the released BDA model"),
        (without("W_1"), OWN_CONFIG, "the checkpoint has no key 'W_1'"),
        (
            own_checkpoint(),
            OWN_CONFIG | {"tf_common_dim": 7},
            r"W_1 must have shape \(5, 7\) by the configuration, got \(5, 6\)",
        ),
        (
            own_checkpoint(),
            OWN_CONFIG | {"tf_ec_layer": 2},
            "num_layers must be 1, as in every released configuration, got 2",
        ),
        (own_checkpoint(), OWN_CONFIG | {"fsqrt": "much"}, "fsqrt must be a number, got 'much'"),
        (own_checkpoint(), OWN_CONFIG | {"fsqrt": True}, "fsqrt must be a number, got True"),
        (own_checkpoint(), OWN_CONFIG | {"tf_heads": None}, "tf_heads must be a number, got None"),
        (own_checkpoint(), OWN_CONFIG | {"tf_common_dim": "8.7"}, "tf_common_dim must be a whole number, got '8.7'"),
        (own_checkpoint(), OWN_CONFIG | {"tf_dc_layer": 1.5}, "tf_dc_layer must be a whole number, got 1.5"),
        (own_checkpoint(), OWN_CONFIG | {"unseenclass": [7]}, r"unseenclass must hold classes 0 to 4, got \[7\]"),
        (own_checkpoint(), OWN_CONFIG | {"seenclass": [-1]}, r"seenclass must hold classes 0 to 4, got \[-1\]"),
        (own_checkpoint(), OWN_CONFIG | {"unseenclass": [1.5]}, r"must be a list of class indices, got \[1.5\]"),
        (own_checkpoint(), OWN_CONFIG | {"unseenclass": "2, 4"}, "must be a list of class indices, got '2, 4'"),
        (own_checkpoint(), OWN_CONFIG | {"unseenclass": []}, "unseen must leave seen and unseen classes, got 0 of 5"),
        (
            own_checkpoint(),
            OWN_CONFIG | {"seenclass": [0, 1], "unseenclass": [1, 2, 3, 4]},
            r"seenclass and unseenclass must share the classes 0 to 4 out between them, got \[0, 1\] and \[1, 2, 3, 4\]",
        ),
        (
            own_checkpoint(),
            OWN_CONFIG | {"seenclass": [0, 1], "unseenclass": [3, 4]},
            "seenclass and unseenclass must share the classes 0 to 4 out between them",
        ),
        (
            own_checkpoint() | {"mask_bias": torch.tensor([[1.0, -1.0]])},
            OWN_CONFIG | {"unseenclass": [2, 4]},
            r"mask_bias must hold a value for each of the 5 classes of att, got shape \(1, 2\)",
        ),
        (
            own_checkpoint() | {"att": torch.ones(5)},
            OWN_CONFIG,
            r"att must have shape \(classes, attributes\), got \(5,\)",
        ),
        (
            own_checkpoint() | {"V": torch.ones(ATTRIBUTES, 5, dtype=torch.int64)},
            OWN_CONFIG,
            "V must be a floating-point tensor, got torch.int64",
        ),
    ],
)
def test_refusals(state, config, message):
    with pytest.raises(ValueError, match=message):
        reference.BDA.from_released(state, config)
