"""Data sets whose images a tower reads, through scan, rows and batches: pixels, slices, volumes; the cut at data.max_length."""

import dataclasses
import json
import re

import jax
import nibabel
import numpy as np
import pytest
from PIL import Image
from small_data import GOLDEN, make_tokenizer

from jaxmed.config import (
    AggregatorConfig,
    DataConfig,
    Experiment,
    FusionConfig,
    MeshConfig,
    ModelConfig,
    PixelConfig,
    ProjectorConfig,
    VisualConfig,
)
from jaxmed.data.conversation import Example, encode_training, text_options
from jaxmed.data.dataset import scan
from jaxmed.data.images import load_pixels
from jaxmed.data.pipeline import batches
from jaxmed.data.plan import GlobalBatch
from jaxmed.data.rows import build_rows, permute_batch, splice
from jaxmed.data.slices import load_slices
from jaxmed.data.tokenizer import Tokenizer
from jaxmed.errors import BadRecords, UserError
from jaxmed.models.presets import TINY
from jaxmed.sharding import Rules, balanced_order, make_mesh

VISUAL = VisualConfig(
    kind="pixels", images=3, tokens=13, grid=(1, 3, 4), features=5, pixels=PixelConfig("pad", 24, 21, pad_grey=True)
)
VOLUME = (2, 9, 8)


def experiment(folder, visual=VISUAL, model=None, **data):
    settings = {"images": str(folder), "volumes": str(folder), "batch": 4, "buckets": (160, 480), "supervised": 50}
    model = model or ModelConfig(dataclasses.replace(TINY, vocab=432), projector=ProjectorConfig("mlp2x_gelu"))
    return Experiment(model, visual=visual, data=DataConfig(**(settings | {"threads": 2} | data)))


def record(name, question, answer, *images):
    made = {"id": name, "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}
    return made | ({"image": images[0] if len(images) == 1 else list(images)} if images else {})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path, rng = tmp_path_factory.mktemp("pixels"), np.random.default_rng(11)
    Image.fromarray(rng.integers(0, 256, (40, 31, 3), dtype=np.uint8)).save(path / "wide.png")
    Image.fromarray(rng.integers(0, 256, (28, 50), dtype=np.uint8)).save(path / "grey.jpg")
    records = [
        record("a", "What is seen? <image>", "No effusion, clear lung.", "wide.png"),
        record("b", "no picture here", "none"),
        record("c", "<image> heart small?", "The heart is small and the left lung is clear.", "grey.jpg"),
        record("d", "<image>\nright <image> or left", "left", "grey.jpg", "wide.png"),
    ]
    (path / "r.json").write_text(json.dumps(records))
    return path


def open_pixels(folder, **settings):
    return scan(experiment(folder, **settings), make_tokenizer(), str(folder / "r.json"))


def spliced(dataset, index, tokens=13):
    """Token, image place (image of the sample, token of it) or None, label; with lists."""
    example = encode_training(dataset.samples[index].record, dataset.tokenizer, "llama3")
    out, image = [], 0
    for token, label in zip(example.ids.tolist(), example.labels.tolist(), strict=True):
        if token == -200:
            out += [(0, (image, j), -100) for j in range(tokens)]
            image += 1
        else:
            out.append((token, None, label))
    return out


def check_row(arrays, row, samples, stride=13):
    """One row against lists of spliced samples [(first image, spliced), ...], padding included."""
    at, targets = 0, []
    for first, tokens in samples:
        span = slice(at, at + len(tokens))
        assert arrays["tokens"][row, span].tolist() == [token for token, _, _ in tokens]
        assert arrays["positions"][row, span].tolist() == list(range(len(tokens)))
        assert len(set(arrays["segment_ids"][row, span].tolist())) == 1 and arrays["segment_ids"][row, at] > 0
        places = [-1 if p is None else (first + p[0]) * stride + p[1] for _, p, _ in tokens]
        assert arrays["image_index"][row, span].tolist() == places
        targets += [(at + t - 1, label) for t, (_, _, label) in enumerate(tokens) if t and label != -100]
        at += len(tokens)
    kept = arrays["supervised"][row] >= 0
    assert list(zip(arrays["supervised"][row][kept], arrays["labels"][row][kept], strict=True)) == targets and targets
    assert not arrays["segment_ids"][row, at:].any() and (arrays["image_index"][row, at:] == -1).all()


def test_two_formats_and_text_alone(folder):
    dataset = open_pixels(folder)
    assert [s.size.images for s in dataset.samples] == [1, 0, 1, 2] and dataset.notices == () and dataset.encoder == ""
    assert [s.tokens for s in dataset.samples] == [(13,), (), (13,), (13, 13)]
    arrays, problems = build_rows(dataset, GlobalBatch(160, ((0,), (1,), (2,), (3,))), range(4))
    assert not problems
    images = arrays["images"]
    assert images.shape == (4, 3, 21, 21, 3) and images.dtype == np.float32
    wide, grey = (load_pixels(folder / name, VISUAL.pixels) for name in ("wide.png", "grey.jpg"))
    for row, wanted in enumerate([[wide], [], [grey], [grey, wide]]):
        np.testing.assert_array_equal(images[row, : len(wanted)], np.reshape(wanted, (-1, 21, 21, 3)))
        assert not images[row, len(wanted) :].any()
        assert arrays["image_token_mask"][row].sum(axis=-1).tolist() == [13] * len(wanted) + [0] * (3 - len(wanted))
        assert arrays["image_grid"][row].tolist() == [[1, 3, 4]] * len(wanted) + [[0, 0, 0]] * (3 - len(wanted))
        check_row(arrays, row, [(0, spliced(dataset, row))])
        assert dataset.samples[row].size.length == len(spliced(dataset, row))


def test_packed_rows_count_images_on(folder):
    dataset = open_pixels(folder, pack=True, batch=1, buckets=(480,))
    row = (1, 2, 3)
    arrays, _ = build_rows(dataset, GlobalBatch(480, (row,)), [0])
    check_row(arrays, 0, [(0, spliced(dataset, 1)), (0, spliced(dataset, 2)), (1, spliced(dataset, 3))])
    wide, grey = (load_pixels(folder / name, VISUAL.pixels) for name in ("wide.png", "grey.jpg"))
    np.testing.assert_array_equal(arrays["images"][0], [grey, grey, wide])
    packed = [len(r) for b in dataset.plan().epoch(0) for r in b.rows]
    assert sum(packed) == 4 and max(packed) > 1
    assert all(sum(dataset.samples[i].size.images for i in r) <= 3 for b in dataset.plan().epoch(0) for r in b.rows)


def test_a_projector_that_joins_tokens_and_a_class_token(folder):
    """13 tokens leave the tower, of which vanilla makes 3 places; the mask still counts the tower's."""
    model = ModelConfig(dataclasses.replace(TINY, vocab=432), projector=ProjectorConfig("vanilla"))
    dataset = open_pixels(folder, model=model)
    assert dataset.samples[3].places == (3, 3) and dataset.samples[3].tokens == (13, 13)
    arrays, _ = build_rows(dataset, GlobalBatch(160, ((3,),)), [0])
    check_row(arrays, 0, [(0, spliced(dataset, 3, 3))], stride=3)
    assert arrays["image_token_mask"][0].sum(axis=-1).tolist() == [13, 13, 0]


@pytest.mark.parametrize("context", [1, 2])
def test_batches_on_a_mesh(folder, context):
    dataset = open_pixels(folder, shuffle=False)
    mesh = make_mesh(MeshConfig(2, 1, context, 1), jax.devices()[: 2 * context])
    with jax.set_mesh(mesh):
        loader = batches(dataset, dataset.plan(), 0, mesh, Rules())
        global_batch, batch = next(loader)
        loader.close()
    arrays, _ = build_rows(dataset, global_batch, range(4))
    if context > 1:
        arrays = permute_batch(arrays, balanced_order(global_batch.bucket, context))
    for name, array in arrays.items():
        np.testing.assert_array_equal(np.asarray(getattr(batch, name)), array, err_msg=name)
    assert batch.images.sharding.shard_shape(batch.images.shape) == (2, 3, 21, 21, 3)


def test_the_cut_in_the_middle_of_an_image(folder, tmp_path):
    """An image of a later round at the end of what is kept: its first tokens stay, so do the labels before it."""
    turns = ["heart small?", "The heart is small.", "<image>\nand here?", "No effusion."]
    made = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(turns)]
    records = [{"id": "e", "image": "grey.jpg", "conversations": made}, record("b", "no picture here", "none")]
    (tmp_path / "r.json").write_text(json.dumps(records))
    settings = {"images": str(folder)}
    full = spliced(open_pixels(tmp_path, **settings), 0)
    image = [t for t, (_, place, _) in enumerate(full) if place is not None]
    answered = [t for t, (_, _, label) in enumerate(full) if label != -100]
    assert answered[0] < image[0] < answered[-1]
    for limit in (image[0] + 5, image[0], image[-1] + 1, answered[-1]):
        dataset = open_pixels(tmp_path, **settings, max_length=limit, on_bad_record="skip")
        sample = dataset.samples[0]
        assert sample.record.id == "e" and sample.size.length == limit
        assert sample.size.supervised == sum(t < limit for t in answered) < len(answered)
        arrays, _ = build_rows(dataset, GlobalBatch(160, ((0,),)), [0])
        check_row(arrays, 0, [(0, full[:limit])])
    with pytest.raises(
        UserError, match=rf"no record can be trained on.*it is cut at {answered[0]} tokens \(data\.max_length\)"
    ):
        open_pixels(tmp_path, **settings, max_length=answered[0])


def test_splice_at_image_ids_is_cut():
    ids = np.array([7, -200, 8, -200, 9, 6])
    example = Example(ids, np.array([-100, -100, 8, -100, 9, 6]), "")
    tokens, labels, index = splice(example, [3, 4], 10, 2, 0)
    assert tokens.tolist() == [7, 0, 0, 0, 8, 0, 0, 0, 0, 9, 6] and tokens.dtype == labels.dtype == index.dtype == np.int32
    assert index.tolist() == [-1, 20, 21, 22, -1, 30, 31, 32, 33, -1, -1]
    assert labels.tolist() == [-100] * 4 + [8] + [-100] * 4 + [9, 6]
    for limit in (2, 7, 10, 50):
        cut = splice(example, [3, 4], 10, 2, limit)
        assert [a.tolist() for a in cut] == [a[:limit].tolist() for a in (tokens, labels, index)]
    # The text itself was cut before its second image.
    assert splice(Example(ids[:3], example.labels[:3], ""), [3, 4], 10, 2, 0)[2].tolist() == [-1, 20, 21, 22, -1]


def test_splice_on_positions_that_the_text_has():
    """Ids stay, the one at position 1 too, which is no placeholder; nothing becomes longer."""
    ids = np.array([5, 9, 9, 9, 3, 4])
    example = Example(ids, np.array([-100] * 4 + [3, 4]), "", image_start=1)
    tokens, labels, index = splice(example, [3], 4, 1, 0)
    assert tokens.tolist() == ids.tolist() and labels.tolist() == [-100] * 4 + [3, 4]
    assert index.tolist() == [-1, 4, 5, 6, -1, -1]
    assert [a.tolist() for a in splice(example, [3], 4, 1, 3)] == [[5, 9, 9], [-100] * 3, [-1, 4, 5]]


def slices_model():
    fusion = FusionConfig("samf", 12, 6)
    return ModelConfig(
        dataclasses.replace(TINY, vocab=432),
        projector=ProjectorConfig("aggregator"),
        aggregator=AggregatorConfig(),
        fusion=fusion,
        added_tokens=("<im_patch>",),
    )


def test_slices_behind_placeholders(folder, tmp_path):
    """One vector on six places, at positions 1 to 6 whatever the tokenizer puts first; rows filled up to the cut."""
    volume = np.random.default_rng(2).integers(-50, 400, (12, 15, 20)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), tmp_path / "v.nii.gz")
    long = record("long", "Describe it.", "clear lung, " * 30, "v.nii.gz")
    (tmp_path / "r.json").write_text(json.dumps([record("x", "Is it?", "No.", "v.nii.gz"), long]))
    visual = VisualConfig(
        kind="slices", images=1, tokens=5, grid=(5, 1, 1), features=40, slices=5, pixels=PixelConfig(shortest=14, crop=14)
    )
    tokenizer = Tokenizer.from_folder(str(GOLDEN / "base"), ("<im_patch>",))
    settings = experiment(tmp_path, visual, slices_model(), template="m3d", max_length=60, buckets=(64,))
    dataset = scan(settings, tokenizer, str(tmp_path / "r.json"))
    arrays, _ = build_rows(dataset, GlobalBatch(64, ((0,), (1,))), [0, 1])
    assert arrays["images"].shape == (2, 1, 5, 14, 14)
    np.testing.assert_array_equal(arrays["images"][1, 0], load_slices(volume, 5, 14))
    assert arrays["image_token_mask"].shape == (2, 1, 5) and arrays["image_token_mask"].all()
    assert arrays["image_grid"].tolist() == [[[5, 1, 1]]] * 2
    for row, sample in enumerate(dataset.samples):
        example = encode_training(sample.record, tokenizer, "m3d", text_options(settings))
        length = len(example.ids)
        assert sample.size.length == length == 60 and sample.places == (6,)
        assert arrays["tokens"][row, :length].tolist() == example.ids.tolist()
        assert arrays["image_index"][row].tolist() == [-1, 0, 1, 2, 3, 4, 5] + [-1] * 57
        placeholder = tokenizer.token_id("<im_patch>")
        assert (example.ids == placeholder).sum() == 6
        assert (arrays["segment_ids"][row] > 0).sum() == length


def test_volumes(folder, tmp_path):
    values = np.random.default_rng(6).normal(size=(2, *VOLUME)).astype(np.float32)
    np.save(tmp_path / "a.npy", values[:1])
    np.save(tmp_path / "b.npy", values[1])
    names = ("a.npy", "b.npy")
    (tmp_path / "r.json").write_text(json.dumps([record(n, "<image> clear?", "no effusion", n) for n in names]))
    visual = VisualConfig(kind="volumes", images=1, tokens=12, grid=(2, 2, 3), features=5, volume=VOLUME)
    model = ModelConfig(dataclasses.replace(TINY, vocab=432), projector=ProjectorConfig("spp", spp_size=2))
    dataset = scan(experiment(tmp_path, visual, model), make_tokenizer(), str(tmp_path / "r.json"))
    assert [s.places for s in dataset.samples] == [(1,), (1,)]
    arrays, _ = build_rows(dataset, GlobalBatch(160, ((0,), (1,))), [0, 1])
    np.testing.assert_array_equal(arrays["images"], values[:, None, ..., None])
    check_row(arrays, 0, [(0, spliced(dataset, 0, 1))], stride=1)


def test_everything_wrong_with_images_is_listed_at_once(folder, tmp_path):
    (tmp_path / "bad.png").write_text("text")
    whole = (folder / "wide.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    records = [record(name, "<image> clear?", "no", f"{name}.png") for name in ("bad", "gone", "cut")]
    (tmp_path / "r.json").write_text(json.dumps([*records, record("t", "a", "b")]))
    with pytest.raises(UserError, match=r"3 records have images; give the folder of their files, --data\.images"):
        open_pixels(tmp_path, images="")
    with pytest.raises(BadRecords) as error:
        open_pixels(tmp_path)
    assert [re.search(r"id '(\w+)'", p.where)[1] for p in error.value.problems] == ["bad", "gone"]
    # What the head does not show is found as the file is read.
    dataset = open_pixels(tmp_path, on_bad_record="skip")
    batch = GlobalBatch(160, ((0, 1),))
    assert [s.record.id for s in dataset.samples] == ["cut", "t"]
    arrays, problems = build_rows(dataset, batch, [0])
    assert [p.where.split("(")[1] for p in problems] == ["id 'cut')"] and "cut.png: the image is cut short" in problems[0].what
    assert set(arrays["segment_ids"][0].tolist()) == {0, 2} and not arrays["images"].any()
    stopping = dataclasses.replace(dataset, experiment=experiment(tmp_path))
    with pytest.raises(UserError, match=r"record 2 \(id 'cut'\).*is cut short.*--on-bad-record skip"):
        build_rows(stopping, batch, [0])
