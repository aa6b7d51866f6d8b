"""Pairs of volumes and reports: which text a pair has, the arrays of a batch, records that are no pairs."""

import dataclasses
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from jaxmed.config import (
    ContrastiveConfig,
    DataConfig,
    Experiment,
    LoraConfig,
    ModelConfig,
    PrepareConfig,
    TextEncoderConfig,
    VisualConfig,
)
from jaxmed.data.pairs import PairSet, scan_pairs, shorten
from jaxmed.data.plan import GlobalBatch
from jaxmed.data.tokenizer import Tokenizer
from jaxmed.errors import BadRecords, UserError
from jaxmed.models.presets import NO_DECODER
from jaxmed.models.presets_towers import VIT3D

GOLDEN = Path(__file__).parents[1] / "golden" / "vit3d"
RECORDS = str(GOLDEN / "data" / "M3D_Cap_npy" / "M3D_Cap.json")
TOWER = dataclasses.replace(VIT3D, image=(8, 24, 21), patch=(4, 6, 7), width=30, heads=5, select_feature="cls_patch")


class Words:
    """A tokenizer of words, with two special tokens around them."""

    def encode(self, text: str) -> list[int]:
        return [0, *map(len, text.split()), 0]


def test_reports_that_fit_and_reports_without_a_full_stop_stay_as_they_are():
    assert shorten("One two. Three", Words(), 5, (1, 2)) == "One two. Three"
    assert shorten("one two three four", Words(), 5, (1, 2)) == "one two three four"


def test_the_first_sentence_stays_and_is_not_counted():
    """Of the others as many as fit, each with its two special tokens: here one of two; a last full stop leaves an empty
    sentence, which takes two tokens."""
    report = "A first sentence of eight words in all. b c. d e"
    found = {shorten(report, Words(), 7, (seed,)) for seed in range(20)}
    assert found == {f"A first sentence of eight words in all.{other}" for other in (" b c", " d e")}
    assert shorten("a b c d e f g.", Words(), 6, (0,)) == "a b c d e f g."


def test_sentences_are_drawn_without_repeats_as_long_as_they_fit():
    sentences = [f" s{i}" + " x" * (i % 4) for i in range(12)] + [" s3 x x x", "first"]
    report = ".".join(["first", *sentences])
    orders = set()
    for seed in range(30):
        first, *chosen = shorten(report, Words(), 21, (seed,)).split(".")
        used = sum(len(Words().encode(s)) for s in chosen)
        assert first == "first" and "first" not in chosen and len(set(chosen)) == len(chosen) and set(chosen) <= set(sentences)
        # what was left out did not fit
        left = [len(Words().encode(s)) for s in set(sentences) - {*chosen, "first"}]
        assert used <= 21 < used + min(left)
        orders.add(tuple(chosen))
        assert shorten(report, Words(), 21, (seed,)) == ".".join([first, *chosen])
    assert len(orders) > 25


def experiment(**data) -> Experiment:
    settings = {"batch": 3, "max_length": 64, "volumes": str(GOLDEN / "data"), "threads": 1, "records": RECORDS}
    return Experiment(
        ModelConfig(NO_DECODER, tower=TOWER, dtype="float32"),
        VisualConfig("volumes", tokens=TOWER.tokens, features=30, grid=TOWER.grid, volume=TOWER.image),
        LoraConfig(rank=0),
        data=DataConfig(**(settings | data)),
        task="contrastive",
        contrastive=ContrastiveConfig(TextEncoderConfig(vocab=131, width=30, layers=2, heads=3, mlp=44, positions=64)),
    )


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(str(GOLDEN / "m3d_clip"))


@pytest.fixture(scope="module")
def pairs(tokenizer: Tokenizer) -> PairSet:
    return scan_pairs(experiment(), tokenizer, f"{RECORDS}:test")


def test_tokens_are_upstreams(pairs: PairSet):
    golden = json.loads((GOLDEN / "golden" / "clip.json").read_text())
    assert [pair.text for pair in pairs.samples] == golden["texts"]
    batch = GlobalBatch(64, ((1,), (3,), (), (0,), (2,)), epoch=0)
    arrays, problems = pairs.build_rows(batch, [0, 1, 2, 3, 4])
    order = [1, 3, 0, 2]
    rest = [0, 1, 3, 4]
    np.testing.assert_array_equal(arrays["tokens"][rest], np.array(golden["input_ids"])[order])
    np.testing.assert_array_equal(arrays["mask"][rest], np.array(golden["attention_mask"])[order])
    np.testing.assert_array_equal(arrays["samples"], [1, 2, 0, 3, 4])
    volume = np.load(GOLDEN / "data" / golden_image(3))
    np.testing.assert_array_equal(arrays["images"][1, ..., 0], volume.reshape(TOWER.image))
    assert not arrays["images"][2].any() and arrays["mask"][2].sum() == 1 and not problems


def golden_image(number: int) -> str:
    return json.loads(Path(RECORDS).read_text())["test"][number]["image"]


def test_what_is_drawn_depends_on_epoch_and_sample(tokenizer: Tokenizer):
    """And on neither the row nor the others; nothing is drawn in evaluations."""
    visual = dataclasses.replace(experiment().visual, prepare=PrepareConfig(augment="intensity"))
    short = dataclasses.replace(experiment(max_length=40), visual=visual)
    found = scan_pairs(short, tokenizer, f"{RECORDS}:test")

    def row(epoch: int, rows: tuple[tuple[int, ...], ...], at: int) -> tuple[bytes, bytes]:
        arrays, _ = found.build_rows(GlobalBatch(40, rows, epoch=epoch), [at])
        return arrays["images"].tobytes(), arrays["tokens"].tobytes()

    assert row(3, ((2,), (0,)), 0) == row(3, ((1,), (2,), ()), 1)
    assert len({row(epoch, ((2,),), 0)[0] for epoch in range(8)}) > 3
    assert row(-1, ((2,),), 0)[0] == found.volume(found.samples[2].path, (-1, 0, 0)).tobytes()
    head = dataclasses.replace(short, contrastive=dataclasses.replace(short.contrastive, truncate="head"))
    assert dataclasses.replace(found, experiment=head).text(2, (3, 2, 0)) == found.samples[2].text
    assert len({found.text(3, (epoch, 3, 0)) for epoch in range(8)}) > 1


def test_values_travel_in_the_dtype_of_the_computation(pairs: PairSet):
    half = dataclasses.replace(experiment(), model=dataclasses.replace(experiment().model, dtype="bfloat16"))
    batch = GlobalBatch(64, ((1,),), epoch=-1)
    arrays, _ = dataclasses.replace(pairs, experiment=half).build_rows(batch, [0])
    assert arrays["images"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(arrays["images"], pairs.build_rows(batch, [0])[0]["images"].astype(ml_dtypes.bfloat16))


def test_the_last_answer_is_the_report_and_what_is_no_pair_is_told(tmp_path: Path, tokenizer: Tokenizer):
    image = golden_image(0)
    turns = [("human", "Is it big?"), ("gpt", "No."), ("human", "Report."), ("gpt", "Small cyst.")]
    good = {"id": "a", "image": image, "conversations": [{"from": who, "value": text} for who, text in turns]}
    blank = good | {"id": "b", "conversations": [*good["conversations"][:3], {"from": "gpt", "value": " "}]}
    (tmp_path / "r.json").write_text(json.dumps([good, blank, good | {"id": "c", "image": [image, image]}]))
    (tmp_path / "s.json").write_text(json.dumps([good | {"id": "d", "image": "absent.npy"}, good | {"id": "e", "image": []}]))
    with pytest.raises(BadRecords, match=r"(?s)2 records.*'b'.*no report.*'c'.*2 images"):
        scan_pairs(experiment(), tokenizer, str(tmp_path / "r.json"))
    with pytest.raises(BadRecords, match=r"(?s)'d'.*absent\.npy: no such file.*'e'.*0 images"):
        scan_pairs(experiment(), tokenizer, str(tmp_path / "s.json"))
    found = scan_pairs(experiment(on_bad_record="skip"), tokenizer, str(tmp_path / "r.json"))
    assert [pair.text for pair in found.samples] == ["Small cyst."] and len(found.problems) == 2
    with pytest.raises(UserError, match="no record is a pair"):
        scan_pairs(experiment(on_bad_record="skip"), tokenizer, str(tmp_path / "s.json"))
    with pytest.raises(UserError, match=r"--data\.volumes"):
        scan_pairs(experiment(volumes=""), tokenizer, str(tmp_path / "r.json"))
