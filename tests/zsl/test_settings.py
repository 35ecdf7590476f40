"""Settings: presets, files and options, and the sentence that refuses each wrong value."""

import json

import pytest

from bda_fused.zsl.settings import make_settings


def test_options_win_over_the_file_which_wins_over_the_preset(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model": "full", "epochs": 3, "seed": 7}))
    settings = make_settings({"seed": 9}, file)
    assert (settings.model, settings.epochs, settings.seed) == ("full", 3, 9)
    assert settings.batch_size == make_settings({"model": "full"}).batch_size


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("flat.json", '{"epochs": 3, "ssa": false}'),
        ("wrapped.json", '{"epochs": {"value": 3}, "ssa": {"desc": null, "value": false}}'),
        ("flat.yaml", "epochs: 3\nssa: false\n"),
        ("wrapped.yml", "epochs:\n  value: 3\nssa:\n  value: false\n"),
    ],
)
def test_files_in_every_accepted_form(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    settings = make_settings({}, tmp_path / name)
    assert (settings.epochs, settings.ssa) == (3, False)


def test_the_demo_is_the_outline_of_the_paper_and_full_the_released_stack():
    demo = make_settings({}).bda_config(100, 20)
    full = make_settings({"model": "full"}).bda_config(100, 20)
    blocks = ("use_rsa", "geometry", "use_ssa", "attribute_attention", "ffn_between")
    assert all(getattr(full, name) for name in blocks)
    assert (full.residual, full.positions) == ("double", "none")
    assert (demo.use_rsa, demo.use_ssa, demo.attribute_attention, demo.ffn_between) == (False, True, False, False)
    assert (demo.residual, demo.positions) == ("single", "learned")


def test_ablations_and_bda_fields_reach_the_model():
    config = make_settings({"order": "vsa-ssa", "ssa": False, "bda": {"dim": 48, "dropout": 0.2}}).bda_config(100, 20)
    assert (config.order, config.use_ssa, config.dim, config.dropout) == ("vsa-ssa", False, 48, 0.2)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"model": "large"}, ValueError, "model must be one of demo, full, got 'large'"),
        ({"model": ["demo"]}, ValueError, "model must be one of demo, full, got ['demo']"),
        ({"seed": True}, TypeError, "seed must be an integer, got True"),
        ({"seed": 2**63}, ValueError, "seed must be at most 9223372036854775807, got 9223372036854775808"),
        ({"batch_size": 3201}, ValueError, "batch_size must be at most the 3200 training images, got 3201"),
        (
            {"batch_size": 2401, "validation": True},
            ValueError,
            "batch_size must be at most the 2400 training images, got 2401",
        ),
        ({"threads": 1025}, ValueError, "threads must be at most 1024, got 1025"),
        ({"threads": 0}, ValueError, "threads must be at least 1, got 0"),
        ({"batch_size": 6.4}, TypeError, "batch_size must be an integer, got 6.4"),
        ({"lr": 0}, ValueError, "lr must lie between 0 and 1, got 0"),
        ({"lr": float("nan")}, ValueError, "lr must lie between 0 and 1, got nan"),
        ({"weight_decay": "small"}, TypeError, "weight_decay must be a number, got 'small'"),
        ({"ssa": "False"}, TypeError, "ssa must be true or false, got 'False'"),
        ({"validation": 1}, TypeError, "validation must be true or false, got 1"),
        ({"device": None}, TypeError, "device must be a string, got None"),
        ({"bda": [1]}, TypeError, "bda must be a mapping of BDAConfig fields, got [1]"),
        ({"bda": {"stem_channels": 5}}, TypeError, "stem_channels must be 3 integers, got 5"),
        ({"bda": {"depth": 2}}, ValueError, "unknown field 'depth' of BDAConfig"),
        ({"bda": {"grid": [14, 14]}}, ValueError, "bda must leave grid to the data set, got [14, 14]"),
        (
            {"bda": {"stem_channels": [3, 32, 64]}},
            ValueError,
            "stem_channels must begin with 1, as the images are grey",
        ),
        ({"speed": 2}, ValueError, "there is no setting 'speed'; known are model, seed"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_wrong_values_are_refused_in_one_sentence(given, error, message):
    with pytest.raises(error) as refusal:
        make_settings(given)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", "{", "config.json is not valid JSON"),
        ("config.yaml", "a: [1, ", "config.yaml is not valid YAML"),
        ("config.yaml", "- 1", "must hold a mapping of settings, got list"),
        ("config.json", '{"training": [1]}', "config.json: training must hold a mapping of settings, got [1]"),
        ("config.toml", "a = 1", "a configuration file ends in .json, .yaml or .yml"),
    ],
)
def test_wrong_files_are_refused_in_one_sentence(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match="config") as refusal:
        make_settings({}, tmp_path / name)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)
