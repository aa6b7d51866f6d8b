"""The checks of a data set before the first step, and their caches."""

import dataclasses
import json
import re

import numpy as np
import pytest
from small_data import GOLDEN, VISUAL, make_experiment, open_dataset

from jaxmed.config import VisualConfig
from jaxmed.data import sizes as sizes_module
from jaxmed.data.dataset import scan
from jaxmed.data.embeddings import write_npz
from jaxmed.data.tokenizer import Tokenizer
from jaxmed.errors import BadRecords, UserError


def turns(*texts):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


BAD = {
    "no turns": ({"conversations": []}, "no turns"),
    "roles": ({"conversations": [*turns("a"), *turns("b")]}, "do not alternate"),
    "missing file": ({"image": "gone.nii.gz", "conversations": turns("<image> a", "b")}, "gone.nii_embedded.npz: no such file"),
    "axes": ({"image": "axes.npz", "conversations": turns("<image> a", "b")}, r"axes.nii_embedded.npz: `arr` must be"),
    "channels": ({"image": "c20.npz", "conversations": turns("<image> a", "b")}, "20 channels, expected 18"),
    "too many tokens": ({"image": "big.npz", "conversations": turns("<image> a", "b")}, "32 tokens, visual.tokens is 31"),
    "encoder": ({"image": "other.npz", "conversations": turns("<image> a", "b")}, "encoder 'other 1', expected 'test 7'"),
    "place missing": ({"image": "v1.npz", "conversations": turns("a", "b")}, "place"),
    "too long": ({"conversations": turns("a", "lung " * 300)}, r"the largest bucket is 269; add one of \d+ to data.buckets"),
    "too many labels": ({"conversations": turns("a", "lung " * 25)}, r"supervised tokens, data.supervised is 61; raise it to"),
    "images": ({"image": ["v0.npz"] * 4, "conversations": turns("<image>" * 4, "b")}, "4 images, visual.images is 3"),
}


@pytest.fixture
def bad(own):
    records = json.loads((own / "r.json").read_text())[:4]
    for name, shape, encoder in (("c20", (20, 1, 2, 2), ""), ("big", (18, 4, 4, 2), ""), ("other", (18, 1, 2, 2), "other 1")):
        write_npz(str(own / "tokens" / f"{name}.nii_embedded.npz"), np.ones(shape, np.float32), encoder)
    np.savez(own / "tokens" / "axes.nii_embedded.npz", arr=np.ones((18, 1, 2, 2), np.float32))
    records += [{"id": name, **record} for name, (record, _) in BAD.items()]
    records.append({"id": "voided", "conversations": turns("a <|eot_id|> b", "c")})
    (own / "r.json").write_text(json.dumps(records))
    return own


def test_everything_wrong_is_listed_at_once_before_the_first_step(bad):
    with pytest.raises(BadRecords) as error:
        open_dataset(bad)
    problems = error.value.problems
    assert len(problems) == len(BAD)
    for name, (_, message) in BAD.items():
        own = [p for p in problems if f"(id '{name}')" in p.where]
        assert len(own) == 1, name
        assert re.search(message, own[0].what), (name, own[0].what)
        assert own[0].where.startswith(f"{bad}/r.json: record ")


def test_skipping_keeps_the_rest_and_the_list(bad):
    dataset = open_dataset(bad, on_bad_record="skip")
    assert [s.record.id for s in dataset.samples] == [f"case {i}" for i in range(4)]
    assert len(dataset.problems) == len(BAD)
    assert [v.where.split("(")[1] for v in dataset.voided] == ["id 'voided')"] and dataset.voided[0].what


def test_unsigned_files_pass_with_one_notice_and_the_encoder_is_named(own):
    assert open_dataset(own).encoder == "test 7" and open_dataset(own).notices == ()
    write_npz(str(own / "tokens" / "v1.nii_embedded.npz"), np.ones((18, 2, 3, 4), np.float32), "")
    dataset = open_dataset(own)
    assert len(dataset.samples) == 40 and len(dataset.notices) == 1 and "1 of 5" in dataset.notices[0]
    with pytest.raises(BadRecords, match="expected 'mine'"):
        open_dataset(own, visual=dataclasses.replace(VISUAL, encoder="mine"))


def test_what_is_missing_altogether(own):
    with pytest.raises(UserError, match=r"--data\.embeddings"):
        open_dataset(own, embeddings="")
    with pytest.raises(BadRecords, match=r"visual\.kind is none"):
        open_dataset(own, visual=VisualConfig(kind="none"))
    (own / "r.json").write_text(json.dumps([{"id": "v", "conversations": turns("a <|eot_id|> b", "c")}]))
    with pytest.raises(UserError, match=r"no record can be trained on \(0 cannot be used, 1 have no supervised token\)"):
        open_dataset(own)


def test_a_second_scan_tokenises_and_opens_nothing(own, monkeypatch):
    first = open_dataset(own)

    def never(*_):
        raise AssertionError("not cached")

    with monkeypatch.context() as patch:
        patch.setattr(sizes_module, "measure", never)
        patch.setattr(sizes_module, "read_header", never)
        assert open_dataset(own).samples == first.samples
        # Another projector changes the image tokens, not the texts.
        assert open_dataset(own, pooled=True).sizes != first.sizes
        with pytest.raises(AssertionError, match="not cached"):
            open_dataset(own, template="plain")
        with pytest.raises(AssertionError, match="not cached"):
            scan(make_experiment(own), Tokenizer.from_folder(str(GOLDEN / "base")), str(own / "r.json"))
    write_npz(str(own / "tokens" / "v1.nii_embedded.npz"), np.ones((18, 1, 3, 4), np.float32), "test 7")
    records = json.loads((own / "r.json").read_text())
    records[0]["conversations"][-1]["value"] += " one more sentence"
    (own / "r.json").write_text(json.dumps(records))
    changed = open_dataset(own)
    assert changed.samples[0].size.length > first.samples[0].size.length
    for before, after in zip(first.samples[1:], changed.samples[1:], strict=True):
        assert before.size.length - after.size.length == 12 * before.record.images.count("v1.nii.gz")


def test_a_folder_that_cannot_be_written_is_no_hindrance(own, tmp_path, monkeypatch):
    home = tmp_path / "home"
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    real = open

    def guarded(path, mode="r", *args, **kwargs):
        if "w" in mode and str(path).startswith(str(own / "r.json")):
            raise PermissionError(13, "Permission denied")
        return real(path, mode, *args, **kwargs)

    monkeypatch.setattr("builtins.open", guarded)
    first = open_dataset(own)
    assert len(list((home / "jaxmed").glob("*.npz"))) == 2 and not list(own.glob("r.json.*"))
    monkeypatch.setattr(sizes_module, "measure", None)
    assert open_dataset(own).samples == first.samples


def test_a_tokenizer_without_the_templates_tokens_is_refused(own):
    with pytest.raises(UserError, match=r"the tokenizer lacks </s>.*--data\.template"):
        open_dataset(own, template="v1")
