"""Random changes of volumes: what each does, how often, from which key; and in which batches they are made."""

import dataclasses
import json

import numpy as np
import pytest
from small_data import make_tokenizer

from jaxmed.config import DataConfig, Experiment, ModelConfig, PrepareConfig, ProjectorConfig, TrainConfig, VisualConfig
from jaxmed.data.augment import augment
from jaxmed.data.dataset import scan
from jaxmed.data.rows import augmentation, build_rows
from jaxmed.models.presets import TINY

DRAWS = 10_000
VALUES = np.random.default_rng(3).permutation(8).reshape(2, 2, 2, 1).astype(np.float32) / 7


def changes(kind, seed=7):
    """Of each draw: the arrangement of the voxels, by their order, and (factor, offset)."""
    orders, lines = [], np.empty((DRAWS, 2))
    for sample in range(DRAWS):
        made = augment(VALUES, kind, seed, (0, sample, 0)).astype(np.float64)
        orders.append(tuple(np.argsort(made.ravel()).tolist()))
        lines[sample] = made.max() - made.min(), made.min()
    return orders, lines


@pytest.fixture(scope="module")
def m3d():
    return changes("m3d")


def within(count, p):
    """Three standard deviations of a share of DRAWS."""
    return abs(count / DRAWS - p) < 3 * np.sqrt(p * (1 - p) / DRAWS)


def test_how_often_volumes_are_turned_and_mirrored(m3d):
    """32 combinations make 16 arrangements: each comes as often as the probabilities of its two say."""
    wanted = {}
    for quarters, p in enumerate((0.5, 0.5 / 3, 0.5 / 3, 0.5 / 3)):
        for mirrors in np.ndindex(2, 2, 2):
            made = np.flip(np.rot90(VALUES, quarters, axes=(1, 2)), [axis for axis in range(3) if mirrors[axis]])
            order = tuple(np.argsort(made.ravel()).tolist())
            wanted[order] = wanted.get(order, 0) + p * 0.1 ** sum(mirrors) * 0.9 ** (3 - sum(mirrors))
    assert len(wanted) == 16 and abs(sum(wanted.values()) - 1) < 1e-9
    orders = m3d[0]
    assert set(orders) <= set(wanted)
    assert all(within(orders.count(order), p) for order, p in wanted.items())


@pytest.mark.parametrize("kind", ["m3d", "intensity"])
def test_how_often_values_are_scaled_and_shifted(m3d, kind):
    lines = m3d[1] if kind == "m3d" else changes(kind)[1]
    for column, rest in ((lines[:, 0] - 1, 0.0), (lines[:, 1], 0.0)):
        drawn = column[np.abs(column - rest) > 1e-6]
        assert within(len(drawn), 0.5)
        assert np.abs(drawn).max() <= 0.1 + 1e-6
        assert abs(drawn.mean()) < 3 * np.sqrt(0.2**2 / 12 / len(drawn))
        # of a uniform variable's square: mean r^2 / 3, variance 4 r^4 / 45
        assert abs((drawn**2).mean() - 0.01 / 3) < 3 * np.sqrt(4e-4 / 45 / len(drawn))
    scaled, shifted = np.abs(lines[:, 0] - 1) > 1e-6, np.abs(lines[:, 1]) > 1e-6
    assert within((scaled & shifted).sum(), 0.25)


def test_intensity_alone_keeps_left_left_and_values_are_not_clipped():
    made = [augment(VALUES, "intensity", 1, (0, sample, 0)) for sample in range(200)]
    assert all(np.array_equal(np.argsort(m.ravel()), np.argsort(VALUES.ravel())) for m in made)
    assert min(m.min() for m in made) < -0.05 and max(m.max() for m in made) > 1.1
    assert augment(VALUES, "none", 1, (0, 0, 0)) is VALUES and augment(VALUES, "m3d", 1, (-1, 0, 0)) is VALUES


def test_the_same_key_repeats_and_every_part_of_it_counts():
    key = (3, 11, 0)
    first = augment(VALUES, "intensity", 5, key, 1)
    np.testing.assert_array_equal(augment(VALUES, "intensity", 5, key, 1), first)
    others = [(5, (4, 11, 0), 1), (5, (3, 12, 0), 1), (5, (3, 11, 1), 1), (5, key, 0), (6, key, 1), (11, (3, 5, 0), 1)]
    assert sum(np.array_equal(augment(VALUES, "intensity", *other), first) for other in others) == 0


@pytest.fixture
def dataset(tmp_path):
    """Six records of one volume; the model's input is 2 x 6 x 6."""
    np.save(tmp_path / "v.npy", np.random.default_rng(1).random((2, 6, 6), np.float32))
    turns = [{"from": "human", "value": "<image> clear?"}, {"from": "gpt", "value": "no effusion"}]
    records = [{"id": f"r{i}", "conversations": turns, "image": "v.npy"} for i in range(6)]
    (tmp_path / "r.json").write_text(json.dumps(records))
    visual = VisualConfig(
        kind="volumes", tokens=8, grid=(2, 2, 2), features=5, volume=(2, 6, 6), prepare=PrepareConfig(augment="m3d")
    )
    model = ModelConfig(dataclasses.replace(TINY, vocab=432), projector=ProjectorConfig("spp", spp_size=2))
    data = DataConfig(volumes=str(tmp_path), batch=3, buckets=(160,), supervised=50)
    experiment = Experiment(model, visual=visual, data=data, train=TrainConfig(seed=9))
    return scan(experiment, make_tokenizer(), str(tmp_path / "r.json"))


def test_training_batches_are_changed_and_evaluation_is_not(dataset):
    plain = np.load(dataset.samples[0].paths[0])[..., None]
    plan = dataset.plan()
    steps = plan.steps_per_epoch()
    assert steps == 2
    seen = {}
    for step in range(4 * steps):
        arrays, _ = build_rows(dataset, plan[step], range(3))
        for row, (index,) in enumerate(plan[step].rows):
            made = arrays["images"][row, 0]
            np.testing.assert_array_equal(made, augment(plain, "m3d", 9, (step // steps, index, 0)))
            seen.setdefault(index, set()).add(made.tobytes())
        # one process or three: the row of a sample is the same
        for row in range(3):
            alone, _ = build_rows(dataset, plan[step], [row])
            np.testing.assert_array_equal(alone["images"][0], arrays["images"][row])
    assert all(len(found) >= 3 for found in seen.values())
    for batch in dataset.evaluation_plan():
        arrays, _ = build_rows(dataset, batch, range(3))
        np.testing.assert_array_equal(arrays["images"][:, 0], np.stack([plain] * 3))


def test_tokens_of_files_are_never_changed(dataset):
    """A config that augments, over token files that a tower has written."""
    visual = dataclasses.replace(dataset.experiment.visual, kind="embeddings")
    assert augmentation(dataset.experiment.visual) == "m3d" and augmentation(visual) == "none"
