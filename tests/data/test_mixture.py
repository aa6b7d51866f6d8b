"""Mixtures: how many samples of each set an epoch has, that the draw is pure and goes on by step, and bad descriptions."""

import dataclasses
import hashlib
import json
from collections import Counter

import numpy as np
import pytest
from small_data import make_experiment, make_tokenizer, make_volumes

from jaxmed.config import DataConfig
from jaxmed.data.asking import drawn
from jaxmed.data.dataset import scan
from jaxmed.data.mixture import GroupDraw, Member, Mixture, digest, every_sample, group_draw, read_mixture
from jaxmed.data.plan import Plan, SampleSize
from jaxmed.data.records import Reading, load_records
from jaxmed.data.rows import build_rows
from jaxmed.errors import UserError

SIZES = {"a": 7, "b": 30, "c": 4}
KEYS = [(name, "") for name, size in SIZES.items() for _ in range(size)]


def counts(*members: Member, epoch: str = "largest", keys=KEYS, weights=()) -> dict[str, int]:
    found = group_draw(keys, Mixture(members, epoch) if members else None, weights)
    return {group.name: group.count for group in found.groups} if found else {}


def members(*weights: float, cap: int = 0) -> list[Member]:
    return [Member(name, "", weight=w, cap=cap) for name, w in zip(SIZES, weights, strict=True)]


def test_weights_are_shares_of_an_epoch():
    assert counts(*members(0, 0, 0)) == {}  # every sample once
    assert counts(*members(1, 1, 1)) == {"a": 30, "b": 30, "c": 30}
    assert counts(*members(1, 2, 1)) == {"a": 15, "b": 30, "c": 15}
    assert counts(*members(1, 1, 1), epoch="smallest") == {"a": 4, "b": 4, "c": 4}
    assert counts(*members(2, 3, 1), epoch="a") == {"a": 7, "b": 11, "c": 4}
    assert counts(*members(1, 2, 1), epoch="100") == {"a": 25, "b": 50, "c": 25}
    assert counts(*members(1, 1, 1), epoch="a") == {"a": 7, "b": 7, "c": 7}
    assert counts(*members(1, 1, 1, cap=-1), epoch="a") == {"a": 7, "b": 7, "c": 4}  # 1:1, nothing twice
    assert counts(*members(0, 0, 0, cap=6)) == {"a": 6, "b": 6, "c": 4}
    assert counts(*members(1, 1, 1), epoch="100") == {"a": 34, "b": 33, "c": 33}  # a number is that number


REGIONAL = [("", "chest")] * 4 + [("", "abdomen")] * 13 + [("", "pelvis")] * 9


def test_regions_by_weight():
    assert counts(keys=REGIONAL) == {}
    assert every_sample(REGIONAL).describe() == "an epoch has 26 samples: chest 4, abdomen 13, pelvis 9"
    assert counts(keys=REGIONAL, weights=(1, 1, 1)) == {"abdomen": 13, "chest": 13, "pelvis": 13}
    assert counts(keys=REGIONAL, weights=(2, 4, 0)) == {"abdomen": 13, "chest": 7}
    assert counts(keys=REGIONAL[4:], weights=(1, 1, 1)) == {"abdomen": 13, "pelvis": 13}  # there is no chest
    assert counts(keys=[("", "")] * 5, weights=(1, 1, 1)) == {}
    with pytest.raises(UserError, match=r"\[0, 1, 1\] leave no record, there are reports of chest alone"):
        counts(keys=REGIONAL[:4], weights=(0, 1, 1))
    keys = [("amos", region) for _, region in REGIONAL] + [("ct", "")] * 100
    pair = [Member("amos", "", weight=1.0, region_weights=(1, 1, 1)), Member("ct", "", weight=1.0, cap=-1)]
    assert counts(*pair, keys=keys, epoch="amos") == {"amos/chest": 13, "amos/abdomen": 13, "amos/pelvis": 13, "ct": 39}
    capped = Member("amos", "", cap=11, region_weights=(1, 1, 1))  # no more than the cap
    assert counts(capped, Member("ct", ""), keys=keys) == {"amos/abdomen": 4, "amos/chest": 4, "amos/pelvis": 3, "ct": 100}
    once = Member("amos", "", cap=-1, region_weights=(1, 1, 1))  # once is once, for every region
    assert counts(once, Member("ct", "", cap=50), keys=keys) == {
        "amos/abdomen": 13,
        "amos/chest": 4,
        "amos/pelvis": 9,
        "ct": 50,
    }


def test_weights_of_the_run_repeat_no_nearly_empty_region_of_another_set(tmp_path):
    (tmp_path / "reports.csv").write_text("")
    split = Member("ct", f"{tmp_path}/reports.csv:regions")
    keys = [("amos", region) for _, region in REGIONAL] + [("ct", "chest")] * 20 + [("ct", "pelvis")]
    natural = {"ct/chest": 20, "ct/pelvis": 1}
    even = {f"amos/{region}": 13 for region in ("chest", "abdomen", "pelvis")}
    assert counts(Member("amos", ""), split, keys=keys, weights=(1, 1, 1)) == even | natural
    own = Member("amos", "", region_weights=(1, 1, 1))  # what one set says of itself is of no other
    assert counts(own, Member("ct", "split_before.json"), keys=keys, weights=(3, 2, 1)) == even | natural
    asked = dataclasses.replace(split, region_weights=(1, 0, 1))
    assert counts(own, asked, keys=keys, weights=(1, 1, 1)) == even | {"ct/chest": 20, "ct/pelvis": 20}
    whole = Member("ct", "split_before.json")
    assert counts(Member("amos", ""), whole, keys=keys, weights=(1, 0, 1))["ct/pelvis"] == 20


def test_all_samples_of_a_group_come_equally_often():
    draw = group_draw(KEYS, Mixture(tuple(members(2, 3, 1)), "a"))
    assert isinstance(draw, GroupDraw)
    seen: Counter[int] = Counter()
    for epoch in range(30):
        now = draw.epoch(5, epoch, True)
        assert Counter(KEYS[i][0] for i in now) == {"a": 7, "b": 11, "c": 4}
        assert max(Counter(i for i in now if KEYS[i][0] == "b").values()) == 1  # 11 of 30: none twice
        seen.update(now)
    for name, times in (("a", 30), ("b", 11), ("c", 30)):
        assert {seen[i] for i, key in enumerate(KEYS) if key[0] == name} == {times}
    assert draw.epoch(5, 3, True) == draw.epoch(5, 3, True) != draw.epoch(6, 3, True) != draw.epoch(5, 4, True)
    first = group_draw(KEYS, Mixture(tuple(members(1, 1, 1)), "largest")).epoch(0, 1, False)
    assert first[:30] == [i % 7 for i in range(30, 60)]


def test_a_plan_of_a_draw_goes_on_by_step_and_numbers_repeats():
    draw = group_draw(KEYS, Mixture(tuple(members(1, 2, 3)), "b"))
    sizes = [SampleSize(5 + i % 23, 1, 0, 1) for i in range(len(KEYS))]
    for pack in (False, True):
        data = DataConfig(batch=5, buckets=(11, 41), pack=pack, supervised=41)
        plan, again = Plan(sizes, data, 0, 3, draw), Plan(sizes, data, 0, 3, draw)
        steps = [plan[step] for step in range(60)]
        assert again[47] == steps[47] and again[47].epoch == steps[47].epoch  # without the steps before
        epochs = sorted({batch.epoch for batch in steps})
        for epoch in epochs[:-1]:
            own = [batch for batch in steps if batch.epoch == epoch]
            taken = [sample for batch in own for sample in batch.samples]
            assert sorted(taken) == sorted(draw.epoch(3, epoch, True)) and len(own) == plan.steps_per_epoch(epoch)
            keys = [batch.key(place) for batch in own for place in range(len(batch.samples))]
            assert len(set(keys)) == len(keys) == 15 + 30 + 45
            assert max(key[2] for key in keys) == 11  # 45 draws of 4 samples


def amos(folder, name, cases):
    """Cases with these regions, and a token file each."""
    (folder / name / "tokens").mkdir(parents=True)
    make_volumes(folder / name / "tokens", len(cases), seed=len(name))
    rows = [
        {"image": f"v{n}.nii.gz", "labels": {"report": {"findings": {r: f"{name} {n} {r} " + "word " * n for r in regions}}}}
        for n, regions in enumerate(cases)
    ]
    (folder / name / "dataset.json").write_text(json.dumps({"training": rows}))


def describe(folder, **changed):
    sets = [
        {
            "name": "one",
            "records": "first/dataset.json:training",
            "embeddings": "first/tokens",
            "weight": 1,
            "region_weights": [1, 1, 0],
        },
        {"name": "two", "records": "second/dataset.json", "embeddings": "second/tokens", "weight": 2, "cap": "once"},
    ]
    (folder / "mix.json").write_text(json.dumps({"sets": sets, "epoch": "one"} | changed))
    return str(folder / "mix.json")


@pytest.fixture
def mixed(tmp_path):
    amos(tmp_path, "first", [("chest", "abdomen"), ("abdomen",), ("abdomen", "pelvis")])
    amos(tmp_path, "second", [("chest",)] * 9)
    return tmp_path


def test_a_mixture_is_read_measured_and_planned(mixed):
    path = describe(mixed)
    experiment = make_experiment(mixed, missing_image_token="prepend", embeddings="")
    dataset = scan(experiment, make_tokenizer(), path)
    assert [s.record.id for s in dataset.samples][:3] == ["one/v0/chest", "one/v0/abdomen", "one/v1/abdomen"]
    assert {s.record.dataset for s in dataset.samples} == {"one", "two"}
    assert dataset.samples[0].paths == (f"{mixed}/first/tokens/v0.nii_embedded.npz",)
    assert dataset.draw.describe() == ("an epoch has 15 samples: one/chest 3 (of 1, each 3 times), one/abdomen 3, two/chest 9")
    plan = dataset.plan()
    epoch = [sample for batch in plan.epoch(2) for sample in batch.samples]
    assert Counter(dataset.samples[i].record.region for i in epoch) == {"chest": 12, "abdomen": 3}
    assert [b.samples for b in scan(experiment, make_tokenizer(), path).plan().epoch(2)] == [b.samples for b in plan.epoch(2)]
    assert sorted(i for batch in dataset.evaluation_plan() for i in batch.samples) == list(range(14))
    for rows in ([0], [1, 2], [0, 1, 2]):  # what a process loads of a batch is the same whoever loads the rest
        arrays, problems = build_rows(dataset, plan[7], rows)
        whole, _ = build_rows(dataset, plan[7], [0, 1, 2])
        assert problems == []
        for name, array in arrays.items():
            np.testing.assert_array_equal(array, whole[name][rows])


def test_a_set_may_take_the_runs_folder_and_yaml_serves(mixed):
    (mixed / "mix.yaml").write_text(
        "sets:\n  - records: first/dataset.json:training:abdomen\n  - {name: b, records: second/dataset.json, images: first}\n"
    )
    records, problems = load_records(str(mixed / "mix.yaml"), Reading(placeholders=True))
    assert problems == []
    assert [r.id for r in records[:4]] == ["dataset/v0/abdomen", "dataset/v1/abdomen", "dataset/v2/abdomen", "b/v0/chest"]
    assert (records[0].images, records[3].images) == (("v0.nii.gz",), (f"{mixed}/first/v0.nii.gz",))


def test_prompts_are_drawn_by_epoch_sample_and_repeat(mixed):
    (mixed / "prompts.txt").write_text(
        "Say it of the {region}.\nWhat, please, do you find in the {region} here?\n\nFindings, {region}:\n"
    )
    experiment = make_experiment(mixed, missing_image_token="prepend", embeddings="", prompts=str(mixed / "prompts.txt"))
    dataset = scan(experiment, make_tokenizer(), describe(mixed))
    sample = dataset.samples[0]
    assert sample.record.turns[0].value == "<image>\nSay it of the chest."
    assert drawn(sample.record, 1, (-1, 0, 0)) is sample.record  # evaluation
    texts = [
        drawn(sample.record, seed, (epoch, 0, repeat)).turns[0].value
        for seed in (1, 2)
        for epoch in range(8)
        for repeat in (0, 1)
    ]
    assert set(texts) == {
        f"<image>\n{p}" for p in ("Say it of the chest.", "Findings, chest:", "What, please, do you find in the chest here?")
    }
    assert texts[:16] != texts[16:] and texts[0::2] != texts[1::2]
    assert texts == [drawn(sample.record, s, (e, 0, r)).turns[0].value for s in (1, 2) for e in range(8) for r in (0, 1)]
    rows = [build_rows(dataset, dataset.plan()[step], range(3))[0]["tokens"] for step in range(30)]
    read = " ".join(make_tokenizer().decode(row) for batch in rows for row in batch.tolist())
    assert all(
        read.count(text) > 3 for text in ("Say it of the abdomen.", "do you find in the chest here?", "Findings, chest:")
    )
    held_out = dataset.evaluation_plan()[0]
    again, _ = build_rows(dataset, held_out, range(3))
    np.testing.assert_array_equal(again["tokens"], build_rows(dataset, held_out, range(3))[0]["tokens"])


def test_a_digest_is_of_all_files_and_of_how_they_are_read(mixed):
    path = describe(mixed)
    first, plain = digest(path), digest(str(mixed / "first/dataset.json"))
    assert plain == hashlib.sha256((mixed / "first/dataset.json").read_bytes()).hexdigest()
    names = ["first/dataset.json:vqa", "first/dataset.json:training", "first/dataset.json:training:vqa"]
    found = {digest(str(mixed / name)) for name in names} | {plain, first}
    assert len(found) == 5
    assert digest(str(mixed / "first/dataset.json:vqa:training")) == digest(str(mixed / names[2]))
    amos(mixed / "x", "second", [("pelvis",)])
    (mixed / "second/dataset.json").write_bytes((mixed / "x/second/dataset.json").read_bytes())
    assert digest(path) not in found


BAD = [
    ({"sets": []}, "has no sets"),
    ({"sets": [{"name": "x"}]}, "set 1 has no `records`"),
    ({"epochs": 3}, "the unknown keys epochs"),
    ({"epoch": "three"}, "epoch is 'three'; it must be largest, smallest, a number of samples, or one of one, two"),
    ({"sets": [{"records": "none.json"}]}, "none.json: no such file"),
    ({"sets": [{"records": "first/dataset.json", "volumes": "none"}]}, "none: no such folder"),
    ({"sets": [{"records": "first/dataset.json", "volumes": "first", "images": "first"}]}, "names 2 folders"),
    ({"sets": [{"records": "first/dataset.json", "weights": 1}]}, "unknown keys weights; known are name, records"),
    ({"sets": [{"records": "first/dataset.json", "weight": "1"}]}, "weight is '1'"),
    ({"sets": [{"records": "first/dataset.json", "weight": 0}]}, "weight is 0"),
    ({"sets": [{"records": "first/dataset.json", "cap": "twice"}]}, "cap is 'twice'"),
    ({"sets": [{"records": "first/dataset.json", "region_weights": [1, 1]}]}, "a number for each of chest, abdomen, pelvis"),
    ({"sets": [{"records": "first/dataset.json"}, {"records": "second/dataset.json"}]}, "two sets have one name"),
    (
        {"sets": [{"records": "first/dataset.json", "weight": 1}, {"name": "b", "records": "first/dataset.json"}]},
        "b has no weight",
    ),
    ({"sets": [{"records": "mix.json"}]}, "is a mixture itself"),
    ({"sets": [{"records": "first/dataset.json"}], "epoch": "smallest"}, "no set has one; give weights"),
]


@pytest.mark.parametrize(("changed", "what"), BAD)
def test_a_bad_description_is_named(mixed, changed, what):
    describe(mixed)
    (mixed / "bad.json").write_text(json.dumps(json.loads((mixed / "mix.json").read_text()) | changed))
    with pytest.raises(UserError) as caught:
        read_mixture(str(mixed / "bad.json"))
    assert what in str(caught.value) and "bad.json" in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_no_mixture_is_left_to_its_reader(mixed):
    for name, text in (("r.json", "[]"), ("broken.json", "{")):
        (mixed / name).write_text(text)
    assert (
        read_mixture(str(mixed / "r.json"))
        is read_mixture(str(mixed / "broken.json"))
        is read_mixture(str(mixed / "no.json"))
        is None
    )
    with pytest.raises(UserError, match=r"mix\.json is a mixture; how a set is read stands behind its own `records`"):
        load_records(f"{describe(mixed)}:training")
    for name, text in (("a.yaml", "- 1"), ("b.yml", "a: [")):
        (mixed / name).write_text(text)
        with pytest.raises(UserError, match=name):
            read_mixture(str(mixed / name))
