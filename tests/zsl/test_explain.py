"""Explanations on maps made by hand: what is chosen, what is measured, what is drawn."""

import numpy as np
import pytest
import torch

from bda_fused.zsl import pictures
from bda_fused.zsl.data import ATTRIBUTE_NAMES, TwoDigits, make_two_digits
from bda_fused.zsl.explain import Explanation, choose_images, explain, mass_in_own_half, spread
from bda_fused.zsl.models import build_model
from bda_fused.zsl.settings import make_settings


@pytest.fixture(scope="module")
def dataset() -> TwoDigits:
    return make_two_digits(0)


def explanation(dataset: TwoDigits, labels: list[int], vsa_map: torch.Tensor) -> Explanation:
    scores = torch.zeros(len(labels), 100)
    scores[:, 12], scores[:, 45], scores[:, 67] = 3, 2, 1
    return Explanation(
        images=torch.rand(len(labels), 12, 24),
        labels=torch.tensor(labels),
        class_scores=scores,
        attribute_scores=torch.zeros(len(labels), 20),
        ssa_map=None,
        vsa_map=vsa_map,
        grid=(4, 8),
        class_attributes=dataset.class_attributes,
        class_names=dataset.class_names,
        attribute_names=ATTRIBUTE_NAMES,
    )


def test_a_rival_shares_no_attribute_with_the_true_class(dataset):
    made = explanation(dataset, [12, 19, 42, 66], torch.full((4, 20, 32), 1 / 32))
    assert made.predictions.tolist() == [12, 12, 12, 12]
    assert made.rivals.tolist() == [45, 45, 67, 12]
    assert [ATTRIBUTE_NAMES[a] for a in made.attributes_of(42)] == ["left is 4", "right is 2"]


def test_mass_in_own_half(dataset):
    uniform = torch.full((1, 20, 32), 1 / 32)
    assert mass_in_own_half(explanation(dataset, [12], uniform)) == pytest.approx(50)
    maps = torch.zeros(1, 20, 4, 8)
    maps[0, 1, 0, 3] = 1  # "left is 1", all of it in the left half
    maps[0, 12, 3, 4], maps[0, 12, 3, 0] = 0.75, 0.25  # "right is 2", a quarter in the left half
    assert mass_in_own_half(explanation(dataset, [12], maps.flatten(2))) == pytest.approx(87.5)


def test_images_by_index_and_by_class(dataset):
    chosen = choose_images(dataset, indices=[800, 1399], classes=["37"])
    assert chosen.images[0].equal(dataset.test_unseen.images[0])
    assert chosen.images[1].equal(dataset.test_unseen.images[-1])
    assert chosen.labels[2] == 37
    with pytest.raises(ValueError, match="an index from 0 to 1399, got 1400"):
        choose_images(dataset, indices=[1400])
    with pytest.raises(ValueError, match="there is no class '137'; the classes are 00, 01"):
        choose_images(dataset, classes=["137"])


def test_the_default_is_spread_over_unseen_classes(dataset):
    chosen = choose_images(dataset)
    assert len(chosen.labels.unique()) == len(chosen) == 6
    assert torch.isin(chosen.labels, dataset.unseen).all()
    assert chosen.labels.equal(spread(dataset.test_unseen, 6).labels)


@pytest.mark.parametrize("heads", [1, 2])
def test_maps_of_a_model_have_one_row_of_weights_per_query(dataset, heads):
    model = build_model(make_settings({"bda": {"num_heads": heads}}), dataset)
    made = explain(model, dataset, spread(dataset.test_seen, 3))
    assert made.vsa_map.shape == (3, 20, 32)
    assert made.ssa_map.shape == (3, 32, 20)
    for weights in (made.vsa_map, made.ssa_map):
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))


def test_every_field_is_saved_under_its_own_name(dataset, tmp_path):
    made = explanation(dataset, [12, 19], torch.full((2, 20, 32), 1 / 32))
    made.save(tmp_path / "maps.npz")
    with np.load(tmp_path / "maps.npz") as arrays:
        assert set(arrays) == set(vars(made)) - {"ssa_map"}
        np.testing.assert_array_equal(arrays["images"], made.images)
        assert arrays["attribute_names"].tolist() == list(ATTRIBUTE_NAMES)
        assert arrays["grid"].tolist() == [4, 8]


def test_pictures_show_the_map_and_the_image(dataset, tmp_path):
    """The same images with other maps give another picture, and the same maps the same one."""
    made = explanation(dataset, [12, 19], torch.rand(2, 20, 32).softmax(-1))
    other = explanation(dataset, [12, 19], torch.rand(2, 20, 32).softmax(-1))
    other = Explanation(**{**vars(made), "vsa_map": other.vsa_map})
    for name, drawn in (("a", made), ("again", made), ("b", other)):
        pictures.draw_attribute_maps(drawn, "title", tmp_path / f"{name}.png")
        pictures.draw_mean_maps(drawn, "title", tmp_path / f"{name}_mean.png")
    for suffix in (".png", "_mean.png"):
        a, again, b = ((tmp_path / f"{name}{suffix}").read_bytes() for name in ("a", "again", "b"))
        assert a == again
        assert a != b
