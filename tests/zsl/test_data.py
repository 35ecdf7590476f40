"""Facts of the two-digit set: counts, disjointness, attributes and positions."""

import pytest
import torch

from bda_fused.zsl.data import ATTRIBUTE_NAMES, TwoDigits, make_two_digits, training_size


@pytest.fixture(scope="module", params=[False, True], ids=["test", "validation"])
def both(request) -> TwoDigits:
    return make_two_digits(0, validation=request.param)


@pytest.fixture(scope="module")
def dataset() -> TwoDigits:
    return make_two_digits(0)


def halves(images: torch.Tensor) -> torch.Tensor:
    """The 8x8 digits of (N, 1, 12, 24) images, (N, 2, 64), cut out at their first row and column with ink."""
    digits = []
    for half in images[:, 0].unflatten(-1, (2, 12)).transpose(1, 2).flatten(0, 1):
        ink = half > 0
        top, left = int(ink.any(1).int().argmax()), int(ink.any(0).int().argmax())
        cut = torch.zeros(8, 8)
        part = half[top : top + 8, left : left + 8]
        cut[: part.shape[0], : part.shape[1]] = part
        digits.append(cut.flatten())
    return torch.stack(digits).unflatten(0, (-1, 2))


def test_counts(dataset):
    assert (len(dataset.train), len(dataset.test_seen), len(dataset.test_unseen)) == (3200, 800, 600)
    assert (len(dataset.seen), len(dataset.unseen)) == (80, 20)
    for split, classes, per_class in [
        (dataset.train, dataset.seen, 40),
        (dataset.test_seen, dataset.seen, 10),
        (dataset.test_unseen, dataset.unseen, 30),
    ]:
        assert split.images.shape == (len(split), 1, 12, 24) and split.images.dtype == torch.float32
        values, counts = split.labels.unique(return_counts=True)
        assert values.equal(classes) and (counts == per_class).all()
        assert split.images.min() == 0 and split.images.max() == 1


@pytest.mark.parametrize("validation", [False, True])
def test_the_number_of_training_images_is_known_before_they_are_drawn(validation):
    assert training_size(validation=validation) == len(make_two_digits(0, validation=validation).train)


def test_every_digit_is_unseen_twice_on_each_side(both):
    unseen = torch.tensor([int(both.class_names[k]) for k in both.unseen])
    assert unseen.unique().numel() == 20
    assert (unseen // 10).bincount(minlength=10).eq(2).all()
    assert (unseen % 10).bincount(minlength=10).eq(2).all()


def test_seen_and_unseen_classes_part_the_label_space(both):
    assert torch.cat([both.seen, both.unseen]).sort().values.equal(torch.arange(len(both.class_names)))


def test_class_attributes_say_which_digits_the_class_shows(both):
    assert len(ATTRIBUTE_NAMES) == 20
    for name, row in zip(both.class_names, both.class_attributes, strict=True):
        held = {ATTRIBUTE_NAMES[a] for a in row.nonzero().flatten()}
        assert held == {f"left is {name[0]}", f"right is {name[1]}"}
    torch.testing.assert_close(both.class_attributes.norm(dim=1), torch.ones(len(both.class_names)))


def test_training_and_test_images_share_no_source_digit(both):
    train = {digit.numpy().tobytes() for digit in halves(both.train.images).flatten(0, 1)}
    for split in (both.test_seen, both.test_unseen):
        test = {digit.numpy().tobytes() for digit in halves(split.images).flatten(0, 1)}
        assert not train & test


def test_images_show_the_digits_of_their_class(dataset):
    """A nearest-neighbour classifier of the cut-out source digits, which knows no labels of the set, agrees."""
    from sklearn.datasets import load_digits
    from sklearn.neighbors import KNeighborsClassifier

    sources = load_digits()
    padded = torch.zeros(len(sources.images), 1, 12, 24)
    padded[:, 0, :8, :8] = torch.from_numpy(sources.images) / 16
    knn = KNeighborsClassifier(1).fit(halves(padded)[:, 0], sources.target)
    digits = halves(dataset.test_unseen.images[::10])
    names = [dataset.class_names[k] for k in dataset.test_unseen.labels[::10]]
    for side in (0, 1):
        assert knn.predict(digits[:, side]).tolist() == [int(name[side]) for name in names]


def test_the_validation_split_knows_nothing_of_the_test(dataset):
    validation = make_two_digits(0, validation=True)
    unseen_names = {dataset.class_names[k] for k in dataset.unseen}
    assert not unseen_names & set(validation.class_names)
    test = {digit.numpy().tobytes() for digit in halves(dataset.test_seen.images).flatten(0, 1)}
    for split in (validation.train, validation.test_seen, validation.test_unseen):
        assert not test & {digit.numpy().tobytes() for digit in halves(split.images).flatten(0, 1)}


def test_one_seed_decides_everything(dataset):
    again, other = make_two_digits(0), make_two_digits(1)
    assert again.train.images.equal(dataset.train.images) and again.unseen.equal(dataset.unseen)
    assert again.test_unseen.images.equal(dataset.test_unseen.images)
    assert not other.train.images.equal(dataset.train.images) and not other.unseen.equal(dataset.unseen)


def test_a_negative_seed_is_refused():
    with pytest.raises(ValueError, match="seed must be a non-negative integer, got -1"):
        make_two_digits(-1)
