"""The order of the data: once an epoch, pure in (seed, epoch), buckets, packing, LLaVA's grouping."""

import dataclasses
import itertools
import random
from collections import Counter

import numpy as np
import pytest

from jaxmed.config import DataConfig, TrainConfig
from jaxmed.data import pack as packing
from jaxmed.data.plan import (
    Plan,
    SampleSize,
    capacity,
    efficiency,
    epoch_plan,
    evaluation_plan,
    llava_order,
    random_order,
)
from jaxmed.errors import UserError


def make_sizes(count: int, seed: int = 0, longest: int = 70) -> list[SampleSize]:
    rng = random.Random(seed)
    return [SampleSize(rng.randint(3, longest), rng.randint(1, 3), rng.randint(0, 2), rng.randint(1, 30)) for _ in range(count)]


KINDS = {
    "plain": DataConfig(batch=5, buckets=(19, 41, 73)),
    "pack": DataConfig(batch=5, buckets=(19, 41, 73), pack=True, supervised=11),
    "grouped": DataConfig(batch=5, buckets=(19, 41, 73), group_by_modality_length=True),
    "file order": DataConfig(batch=5, buckets=(19, 41, 73), shuffle=False),
    "packed file order": DataConfig(batch=5, buckets=(19, 41, 73), shuffle=False, pack=True, supervised=11),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 4, 203])
def test_every_sample_once_in_rows_that_hold_it(kind, count):
    data, sizes = KINDS[kind], make_sizes(count)
    batches = epoch_plan(sizes, data, 3, seed=7, epoch=2)
    assert Counter(s for b in batches for s in b.samples) == Counter(range(count))
    for batch in batches:
        assert batch.bucket in data.buckets and len(batch.rows) == 5 and batch.samples
        room = capacity(data, 3, batch.bucket)
        for row in batch.rows:
            used = [sum(getattr(sizes[s], name) for s in row) for name in ("length", "supervised", "images")]
            assert all(u <= r for u, r in zip(used, room, strict=True))
            assert data.pack or len(row) <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_pure_function_of_seed_and_epoch(kind):
    data, sizes = KINDS[kind], make_sizes(61)
    first = epoch_plan(sizes, data, 3, 7, 2)
    assert first == epoch_plan(list(sizes), data, 3, 7, 2)
    same = data.shuffle is False
    assert (first == epoch_plan(sizes, data, 3, 7, 3)) is same
    assert (first == epoch_plan(sizes, data, 3, 8, 2)) is same


def test_shuffling_does_not_depend_on_numpys_own_shuffles():
    """Recorded: a plan must be the same on another machine and years later."""
    assert random_order(11, 42, 3).tolist() == [3, 4, 5, 0, 10, 1, 6, 2, 7, 8, 9]


def test_unpacked_samples_go_to_the_shortest_bucket_and_only_last_batches_have_empty_rows():
    data, sizes = KINDS["plain"], make_sizes(203)
    batches = epoch_plan(sizes, data, 3, 7, 0)
    for batch in batches:
        for sample in batch.samples:
            shorter = [b for b in data.buckets if b < batch.bucket]
            assert sizes[sample].length <= batch.bucket and all(sizes[sample].length > b for b in shorter)
    for bucket in data.buckets:
        own = [b for b in batches if b.bucket == bucket]
        assert len(own) == -(-sum(len(b.samples) for b in own) // 5)
        assert sum(len(b.samples) < 5 for b in own) <= 1
    switches = sum(a.bucket != b.bucket for a, b in itertools.pairwise(batches))
    assert switches > len(data.buckets)  # buckets come mixed, not one after the other


def test_file_order_without_shuffle():
    sizes = [SampleSize(n, 1, 0, 1) for n in (10, 60, 11, 61, 12, 62, 13)]
    batches = epoch_plan(sizes, DataConfig(batch=2, buckets=(19, 73), shuffle=False), 0, 1, 5)
    assert [(b.bucket, b.rows) for b in batches] == [
        (19, ((0,), (2,))),
        (73, ((1,), (3,))),
        (19, ((4,), (6,))),
        (73, ((5,), ())),
    ]
    assert evaluation_plan(sizes, DataConfig(batch=2, buckets=(19, 73)), 0) == batches


def test_offsets_number_the_samples_over_rows():
    batch = epoch_plan(make_sizes(40, longest=20), KINDS["pack"], 3, 1, 0)[0]
    for row, offset in zip(batch.rows, batch.offsets, strict=True):
        assert batch.samples[offset : offset + len(row)] == row


def test_packing_fills_rows(monkeypatch):
    monkeypatch.setattr(packing, "WINDOW", 64)
    sizes = [dataclasses.replace(s, images=0, supervised=0) for s in make_sizes(1501, longest=60)]
    data = DataConfig(batch=5, buckets=(128,), pack=True)
    packed = epoch_plan(sizes, data, 0, 1, 0)
    assert efficiency(packed, sizes) > 0.95
    unpacked = epoch_plan(sizes, dataclasses.replace(data, pack=False), 0, 1, 0)
    assert efficiency(unpacked, sizes) < 0.3
    used = sum(s.length for s in sizes)
    assert efficiency(packed, sizes) == pytest.approx(used / (len(packed) * 5 * 128))


def test_packing_gives_room_of_long_rows_to_short_samples():
    """Two rows of 100 tokens hold 90 each: the short samples ride there, and none of the short bucket is compiled."""
    sizes = [SampleSize(n, 0, 0, 1) for n in (90, 9, 90, 10, 8)]
    data = DataConfig(batch=3, buckets=(12, 100), pack=True)
    batches = epoch_plan(sizes, data, 0, 1, 0)
    assert len(batches) == 1 and batches[0].bucket == 100
    assert Counter(batches[0].samples) == Counter(range(5))


def test_packing_honours_supervised_and_images():
    data = DataConfig(batch=2, buckets=(100,), pack=True, supervised=7)
    batches = epoch_plan([SampleSize(10, 4, 0, 1)] * 4, data, 1, 1, 0)
    assert [len(row) for b in batches for row in b.rows] == [1, 1, 1, 1]
    batches = epoch_plan([SampleSize(10, 1, 2, 1)] * 4, data, 5, 1, 0)
    assert [len(row) for b in batches for row in b.rows] == [2, 2]
    # A row without room for another image still takes text.
    batches = epoch_plan([SampleSize(10, 1, 1, 1), SampleSize(10, 1, 0, 1)], data, 1, 1, 0)
    assert sorted(len(row) for b in batches for row in b.rows) == [0, 2]


def test_a_sample_that_fits_nowhere_is_an_error_not_lost():
    for pack in (False, True):
        with pytest.raises(ValueError, match="74"):
            epoch_plan([SampleSize(74, 1, 0, 1)], DataConfig(batch=1, buckets=(73,), pack=pack), 0, 1, 0)
    with pytest.raises(ValueError, match="images"):
        epoch_plan([SampleSize(7, 1, 3, 1)], DataConfig(batch=1, buckets=(73,), pack=True), 2, 1, 0)


def injected(count: int) -> list[int]:
    """A permutation both sides can make: steps of a size that does not divide `count`."""
    step = next(k for k in (7, 5, 3, 11, 13) if count % k) if count > 1 else 1
    return [(i * step + 3) % count for i in range(count)]


@pytest.mark.parametrize(
    ("lengths", "batch", "chunks", "expected"),
    [  # recorded from the original sampler
        ([9, 4, 4, 7, 1, 12, 5, 4, 8, 3, 6, 2], 2, 3, [5, 2, 0, 7, 3, 10, 8, 4, 6, 11, 1, 9]),
        ([9, 4, 4, 7, 1, 12, 5, 4, 8, 3, 6], 2, 2, [3, 2, 10, 6, 5, 9, 8, 1, 0, 4, 7]),
        ([-3, -8, -8, -1, -5, -2, -7], 1, 3, [3, 6, 1, 0, 4, 2, 5]),
        (
            [5, -2, 9, -7, 4, -4, 8, 3, -1, 6, -9, 2, 7, -3, -5, 1, -6],
            2,
            2,
            [2, 15, 6, 11, 12, 7, 0, 4, 3, 8, 5, 1, 9, 10, 13, 14, 16],
        ),
        ([5, -2, 9, -7, 4, 4, 8, 3, -1, 6], 1, 4, [2, 6, 9, 5, 0, 1, 3, 4, 7, 8]),
    ],
)
def test_llavas_sampler(lengths, batch, chunks, expected):
    assert llava_order(lengths, batch, chunks, injected) == expected


def test_grouped_plan_is_the_samplers_order_cut_into_batches():
    sizes = make_sizes(23, seed=4)
    batches = epoch_plan(sizes, KINDS["grouped"], 3, 5, 1)
    kinds = [{sizes[s].images > 0 for s in b.samples} for b in batches]
    with_images = sum(s.images > 0 for s in sizes)
    # All full megabatches are of one modality; what is left of both comes last, in order.
    pure = (with_images - 1) // 5 + (23 - with_images - 1) // 5
    assert all(len(kind) == 1 for kind in kinds[:pure])
    rest = [s for b in batches[pure:] for s in b.samples]
    assert rest == sorted(rest)
    for batch in batches[:pure]:
        words = [sizes[s].words for s in batch.samples]
        assert words == sorted(words, reverse=True)
        assert batch.bucket == min(b for b in (19, 41, 73) if b >= max(sizes[s].length for s in batch.samples))


def test_grouping_refuses_samples_without_words_and_packing():
    with pytest.raises(UserError, match="sample 1 has no words"):
        llava_order([3, 0], 1, 2, injected)
    with pytest.raises(UserError, match="cannot be combined"):
        epoch_plan(make_sizes(3), dataclasses.replace(KINDS["grouped"], pack=True), 3, 1, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_plan_by_step_runs_through_the_epochs(kind):
    data, sizes = KINDS[kind], make_sizes(61)
    plan = Plan(sizes, data, 3, seed=7)
    expected = [b for epoch in range(5) for b in epoch_plan(sizes, data, 3, 7, epoch)]
    assert [plan[step] for step in range(len(expected))] == expected
    # A later step can be asked first, and an earlier one again after its epoch was dropped.
    fresh = Plan(sizes, data, 3, seed=7)
    for step in (len(expected) - 1, 0, len(expected) // 2):
        assert fresh[step] == expected[step]
    assert fresh.steps_per_epoch(3) == len(epoch_plan(sizes, data, 3, 7, 3))
    with pytest.raises(IndexError):
        plan[-1]


def test_total_steps_as_hugging_face_counts():
    plan = Plan(make_sizes(23, longest=10), DataConfig(batch=5, buckets=(19,)), 3, seed=1)
    assert plan.steps_per_epoch() == 5
    assert plan.total_steps(TrainConfig(epochs=3)) == 15
    assert plan.total_steps(TrainConfig(epochs=2.1)) == 11
    assert plan.total_steps(TrainConfig(epochs=3, steps=4)) == 4


def test_no_sample_is_an_error():
    with pytest.raises(UserError, match="no sample"):
        Plan([], DataConfig(records="x.json"), 1, 0)


def test_large_plans_take_seconds():
    count = 20000
    lengths = np.random.default_rng(0).lognormal(5, 0.6, count).clip(20, 2000).astype(int)
    sizes = [SampleSize(int(n), 5, 0, 1) for n in lengths]
    plan = Plan(sizes, DataConfig(batch=8, buckets=(512, 2048), pack=True), 0, seed=1)
    assert plan.efficiency() > 0.97
