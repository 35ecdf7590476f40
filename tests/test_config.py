"""The configuration: its refusals, the released runs, and its way through JSON."""

import json

import pytest

from bda_fused.config import BDAConfig

SMALL = {"num_classes": 6, "num_attributes": 7}


@pytest.mark.parametrize(
    ("field", "value", "error", "message"),
    [
        ("dim", 0, ValueError, "dim must be at least 1, got 0"),
        ("dim", 65537, ValueError, "dim must be at most 65536, got 65537"),
        ("dim", 3.5, TypeError, "dim must be 1 integer, got 3.5"),
        ("num_classes", True, TypeError, "num_classes must be 1 integer, got True"),
        ("grid", (14,), TypeError, r"grid must be 2 integers, got \(14,\)"),
        ("grid", None, TypeError, "grid must be 2 integers, got None"),
        ("grid", 14, TypeError, "grid must be 2 integers, got 14"),
        ("stem_channels", 5, TypeError, "stem_channels must be 3 integers, got 5"),
        ("grid", (14, 0), ValueError, r"grid must be at least 1, got \(14, 0\)"),
        ("grid", (14, 10**30), ValueError, r"grid must be at most 65536, got \(14, 10+\)"),
        ("num_heads", 3, ValueError, "num_heads must divide dim = 350, got 3"),
        ("num_layers", 2, ValueError, "num_layers must be 1, as in every released configuration, got 2"),
        ("dropout", 1.5, ValueError, r"dropout must be in \[0, 1\], got 1.5"),
        ("kv_dropout", -0.1, ValueError, r"kv_dropout must be in \[0, 1\], got -0.1"),
        ("fsqrt", 0, ValueError, "fsqrt must be positive, got 0"),
        ("weight", float("nan"), ValueError, "weight must be finite, got nan"),
        ("weight", 10**400, ValueError, "weight must be finite, got 1000"),
        ("gamma", "1", TypeError, "gamma must be a number, got '1'"),
        ("use_rsa", "False", TypeError, "use_rsa must be true or false, got 'False'"),
        ("order", "both", ValueError, "order must be one of ssa-vsa, vsa-ssa, got 'both'"),
        ("residual", "triple", ValueError, "residual must be one of double, single, got 'triple'"),
        ("stem", "conv", ValueError, "image_dim must be the stem's last width 64 with stem='conv', got 2048"),
    ],
)
def test_refusals(field, value, error, message):
    with pytest.raises(error, match=message):
        BDAConfig(**SMALL | {field: value})


def test_unknown_fields_are_refused_by_name():
    with pytest.raises(ValueError, match="unknown field 'tf_dropout' of BDAConfig, known are attribute_attention, "):
        BDAConfig.from_dict(SMALL | {"tf_dropout": 0.1})


def test_round_trip_through_json():
    config = BDAConfig(**SMALL, grid=(4, 8), stem="conv", image_dim=64, dropout=0.1)
    assert BDAConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (("CUB", "GZSL"), {"dim": 350, "ffn_dim": 2048, "num_attributes": 312, "fsqrt": 155, "kv_dropout": 0.0}),
        (("CUB", "CZSL"), {"dim": 437, "ffn_dim": 512, "dropout": 0.4, "lambda_cal": 0.25}),
        (("SUN", "CZSL"), {"num_classes": 717, "kv_dropout": 1.0, "lambda_vce": 1.2}),
        (("AWA2", "CZSL"), {"dim": 500, "weight": 0.01, "lambda_reg": 0.0001, "num_attributes": 85}),
    ],
)
def test_released_runs(run, expected):
    config = BDAConfig.released(*run)
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.vce_bias_quirk


def test_an_unknown_run_is_refused():
    with pytest.raises(ValueError, match="the released runs are CUB GZSL, .* got FLO GZSL"):
        BDAConfig.released("FLO")
