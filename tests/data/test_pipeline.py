"""From samples to batches: rows, packing, process counts, resume, the mesh."""

import dataclasses
import json
from collections import Counter

import jax
import numpy as np
import pytest
from small_data import GRIDS, VISUAL, make_tokenizer, make_volumes, open_dataset

from jaxmed.config import MeshConfig, VisualConfig
from jaxmed.data.conversation import encode_training
from jaxmed.data.embeddings import npz_name, pack_codes, write_npz
from jaxmed.data.pipeline import batches, evaluation_batches, local_rows
from jaxmed.data.plan import GlobalBatch
from jaxmed.data.rows import ALONG_T, build_rows, permute_batch
from jaxmed.errors import BadRecords, UserError
from jaxmed.sharding import Rules, balanced_order, make_mesh

TOKENIZER = make_tokenizer()
FIELDS = [*ALONG_T, "supervised", "labels", "images", "image_token_mask", "image_grid"]
PACKED = {"pack": True, "buckets": (199, 523), "supervised": 151, "visual": dataclasses.replace(VISUAL, images=5)}


def naive_segment(sample, places):
    """Splice and shift of one sample with lists: (token, image place or None), (t, token after t)."""
    example = encode_training(sample.record, TOKENIZER, "llama3")
    spliced, image = [], 0
    for token, label in zip(example.ids.tolist(), example.labels.tolist(), strict=True):
        if token == -200:
            spliced += [(0, (image, j), -100) for j in range(places[image])]
            image += 1
        else:
            spliced.append((token, None, label))
    targets = [(t - 1, label) for t, (_, _, label) in enumerate(spliced) if t > 0 and label != -100]
    return [(token, place) for token, place, _ in spliced], targets


def naive_row(dataset, batch, row, places_of, stride):
    """The row as nested lists, padding left out."""
    tokens, positions, segments, image_index, targets, images = [], [], [], [], [], 0
    before = sum(len(r) for r in batch.rows[:row])
    for number, index in enumerate(batch.rows[row]):
        sample = dataset.samples[index]
        spliced, shifted = naive_segment(sample, places_of(sample))
        targets += [(len(tokens) + t, label) for t, label in shifted]
        for position, (token, place) in enumerate(spliced):
            tokens.append(token)
            positions.append(position)
            segments.append(1 + before + number)
            image_index.append(-1 if place is None else (images + place[0]) * stride + place[1])
        images += len(sample.paths)
    return {"tokens": tokens, "positions": positions, "segment_ids": segments, "image_index": image_index}, targets, images


@pytest.mark.parametrize(
    ("settings", "pooled"), [({}, False), (PACKED, False), (PACKED, True)], ids=["plain", "packed", "packed and pooled"]
)
def test_rows_against_a_naive_splice(folder, settings, pooled):
    dataset = open_dataset(folder, pooled=pooled, **settings)
    stride = 7 if pooled else 31
    seen = 0
    for batch in dataset.plan().epoch(0):
        arrays, problems = build_rows(dataset, batch, range(len(batch.rows)))
        assert not problems
        for row in range(len(batch.rows)):
            places_of = (lambda s: [7] * len(s.tokens)) if pooled else (lambda s: list(s.tokens))
            expected, targets, images = naive_row(dataset, batch, row, places_of, stride)
            length = len(expected["tokens"])
            for name, values in expected.items():
                np.testing.assert_array_equal(arrays[name][row, :length], values, err_msg=name)
            padding = {"tokens": 0, "positions": 0, "segment_ids": 0, "image_index": -1}
            assert all((arrays[name][row, length:] == value).all() for name, value in padding.items())
            kept = arrays["supervised"][row] >= 0
            assert list(zip(arrays["supervised"][row][kept], arrays["labels"][row][kept], strict=True)) == targets
            assert kept[: len(targets)].all() and not arrays["labels"][row][~kept].any()
            assert arrays["image_token_mask"][row].any(axis=-1).sum() == images
            seen += len(batch.rows[row])
    assert seen == 40


def test_a_cut_goes_by_each_images_own_tokens(folder):
    """Images of 24 and 30 tokens: what is left of a sample is what its own places leave."""
    dataset = open_dataset(folder, max_length=150, on_bad_record="skip")
    assert len({s.size.length for s in dataset.samples}) > 3 and max(s.size.length for s in dataset.samples) == 150
    for index, sample in enumerate(dataset.samples):
        spliced, targets = naive_segment(sample, list(sample.tokens))
        kept = [(t, label) for t, label in targets if t + 1 < 150]
        assert (sample.size.length, sample.size.supervised) == (min(len(spliced), 150), len(kept)), sample.record.id
        arrays, _ = build_rows(dataset, GlobalBatch(151, ((index,),)), [0])
        assert (arrays["segment_ids"][0] > 0).sum() == sample.size.length
        assert (arrays["supervised"][0] >= 0).sum() == len(kept)


def test_image_values_stand_where_image_index_points(folder):
    volumes = make_volumes(folder / "again", 5)
    dataset = open_dataset(folder, **PACKED)
    batch = next(b for b in dataset.plan().epoch(0) if max(len(r) for r in b.rows) > 1)
    arrays, _ = build_rows(dataset, batch, [2, 0])
    checked = 0
    for place, row in enumerate((2, 0)):
        values = arrays["images"][place].reshape(-1, 18)
        exists = arrays["image_token_mask"][place].reshape(-1)
        for segment, index in enumerate(batch.rows[row], 1 + batch.offsets[row]):
            own = (arrays["segment_ids"][place] == segment) & (arrays["image_index"][place] >= 0)
            at = arrays["image_index"][place][own]
            names = [int(image[1]) for image in dataset.samples[index].record.images]
            wanted = [volumes[n].transpose(1, 2, 3, 0).reshape(-1, 18) for n in names]
            assert exists[at].all()
            if names:
                np.testing.assert_array_equal(values[at], np.concatenate(wanted))
                checked += 1
        grids = [GRIDS[int(image[1]) % 3] for i in batch.rows[row] for image in dataset.samples[i].record.images]
        np.testing.assert_array_equal(arrays["image_grid"][place][: len(grids)], np.reshape(grids, (-1, 3)))
        assert not values[~exists].any() and exists.sum() == sum(np.prod(g) for g in grids)
    assert checked


def test_packed_and_unpacked_rows_hold_the_same_segments(folder):
    def segments(dataset):
        found = {}
        for batch in dataset.plan().epoch(0):
            arrays, _ = build_rows(dataset, batch, range(3))
            for row in range(3):
                values = arrays["images"][row].reshape(-1, 18)
                for segment, index in enumerate(batch.rows[row], 1 + batch.offsets[row]):
                    own = np.flatnonzero(arrays["segment_ids"][row] == segment)
                    images = arrays["image_index"][row][own]
                    targets = [
                        (t - own[0], label)
                        for t, label in zip(arrays["supervised"][row], arrays["labels"][row], strict=True)
                        if own[0] <= t <= own[-1]
                    ]
                    found[index] = (
                        arrays["tokens"][row][own].tolist(),
                        arrays["positions"][row][own].tolist(),
                        (images >= 0).tolist(),
                        values[images[images >= 0]].tolist(),
                        targets,
                    )
        return found

    plain, packed = open_dataset(folder), open_dataset(folder, **PACKED)
    assert len(packed.plan().epoch(0)) < len(plain.plan().epoch(0))
    assert packed.plan().efficiency() > plain.plan().efficiency()
    assert segments(plain) == segments(packed)


def test_codes(folder):
    grids = VisualConfig(kind="codes", images=3, tokens=30, features=18, grid=(3, 5, 2))
    volumes = make_volumes(folder / "codes", 5, codes=True)
    with pytest.raises(BadRecords, match="token grid"):
        open_dataset(folder, visual=grids, embeddings=str(folder / "codes"))
    dataset = open_dataset(folder, visual=grids, embeddings=str(folder / "codes"), on_bad_record="skip")
    assert {image for s in dataset.samples for image in s.record.images} == {"v0.nii.gz", "v3.nii.gz"}
    index = next(i for i, s in enumerate(dataset.samples) if s.record.images == ("v3.nii.gz",))
    arrays, _ = build_rows(dataset, GlobalBatch(269, ((index,), ())), [0, 1])
    assert arrays["images"].shape == (2, 3, 30) and arrays["images"].dtype == np.uint32
    np.testing.assert_array_equal(arrays["images"][0, 0], pack_codes(volumes[3]).reshape(-1))
    assert arrays["image_token_mask"].sum() == 30


def test_text_alone_has_no_images(folder, tmp_path):
    records = [r for r in json.loads((folder / "r.json").read_text()) if "image" not in r]
    (tmp_path / "r.json").write_text(json.dumps(records))
    dataset = open_dataset(tmp_path, visual=VisualConfig(kind="none"), embeddings="")
    arrays, _ = build_rows(dataset, dataset.plan()[0], [0, 2])
    assert arrays["images"].shape == (2, 0, 0, 18) and arrays["image_token_mask"].shape == (2, 0, 0)
    assert (arrays["image_index"] == -1).all() and arrays["supervised"].max() > 0


@pytest.mark.parametrize("context", [2, 3])
def test_balanced_order_moves_everything_along(folder, context):
    dataset = open_dataset(folder, **PACKED | {"buckets": (204, 528)})
    batch = dataset.plan()[0]
    arrays, _ = build_rows(dataset, batch, range(3))
    order = balanced_order(batch.bucket, context)
    moved = permute_batch(arrays, order)
    assert not np.array_equal(moved["tokens"], arrays["tokens"])
    for name in ALONG_T:
        back = np.empty_like(arrays[name])
        back[:, order] = moved[name]
        np.testing.assert_array_equal(back, arrays[name])
    kept = arrays["supervised"] >= 0
    np.testing.assert_array_equal(moved["supervised"] >= 0, kept)
    rows = np.nonzero(kept)[0]
    for name in ALONG_T:
        here = moved[name][rows, moved["supervised"][kept]]
        np.testing.assert_array_equal(here, arrays[name][rows, arrays["supervised"][kept]])
    np.testing.assert_array_equal(moved["labels"], arrays["labels"])


def process_rows(mesh_shape, processes, batch):
    """Rows of each process, were the devices of the mesh dealt to that many processes in order."""
    mesh = make_mesh(MeshConfig(*mesh_shape), jax.devices()[: int(np.prod(mesh_shape))])
    index_map = Rules().sharding(mesh, "batch").devices_indices_map((batch,))
    groups = np.array_split(mesh.devices.reshape(-1), processes)
    return [local_rows({device: index_map[device] for device in group}, batch) for group in groups]


@pytest.mark.parametrize("mesh_shape", [(4, 1, 1, 1), (2, 2, 1, 1), (1, 2, 2, 1), (1, 1, 2, 2)])
@pytest.mark.parametrize("settings", [{}, PACKED], ids=["plain", "packed"])
def test_same_rows_in_the_same_places_at_any_process_count(folder, mesh_shape, settings):
    dataset = open_dataset(folder, **settings | {"batch": 4})
    batch = dataset.plan()[1]
    whole, _ = build_rows(dataset, batch, range(4))
    for processes in (1, 2, 4):
        groups = process_rows(mesh_shape, processes, 4)
        assert set().union(*groups) == set(range(4))
        for rows in groups:
            part, _ = build_rows(dataset, batch, rows)
            for name in FIELDS:
                np.testing.assert_array_equal(part[name], whole[name][rows], err_msg=name)
    # Processes that are joined by context or tensor load the same rows.
    if mesh_shape == (1, 1, 2, 2):
        assert process_rows(mesh_shape, 4, 4) == [[0, 1, 2, 3]] * 4
    if mesh_shape == (1, 2, 2, 1):
        assert process_rows(mesh_shape, 4, 4) == [[0, 1], [0, 1], [2, 3], [2, 3]]


def test_local_rows_takes_jaxs_own_index_map():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    index_map = Rules().sharding(mesh, "batch").addressable_devices_indices_map((5,))
    assert local_rows(index_map, 5) == [0, 1, 2, 3, 4]


def compare(batch, arrays):
    for name in FIELDS:
        np.testing.assert_array_equal(np.asarray(getattr(batch, name)), arrays[name], err_msg=name)


@pytest.mark.parametrize("threads", [0, 3])
def test_batches_resume_by_step(folder, threads):
    dataset = open_dataset(folder, threads=threads)
    plan, mesh = dataset.plan(), make_mesh(MeshConfig(), jax.devices()[:1])
    steps = plan.steps_per_epoch() + 3
    with jax.set_mesh(mesh):
        run = list(batches(dataset, plan, 0, mesh, Rules(), steps))
        assert [b for b, _ in run] == [plan[step] for step in range(steps)]
        later = batches(dataset, dataset.plan(), steps - 2, mesh, Rules(), steps)
        for step in (steps - 2, steps - 1):
            assert later.step == step
            global_batch, batch = next(later)
            assert global_batch == run[step][0] and later.data_wait > 0
            compare(batch, {name: np.asarray(getattr(run[step][1], name)) for name in FIELDS})
            compare(batch, build_rows(dataset, global_batch, range(3))[0])
        with pytest.raises(StopIteration):
            next(later)


@pytest.mark.parametrize("shape", [(8, 1, 1, 1), (2, 2, 1, 2), (1, 1, 4, 1), (1, 2, 2, 2)])
def test_the_same_batch_on_every_mesh(folder, shape):
    data, fsdp, context, tensor = shape
    devices = jax.devices()[: int(np.prod(shape))]
    mesh = make_mesh(MeshConfig(data, fsdp, context, tensor), devices)
    dataset = open_dataset(folder, batch=8, buckets=(200, 272))
    with jax.set_mesh(mesh):
        loader = batches(dataset, dataset.plan(), 2, mesh, Rules())
        global_batch, batch = next(loader)
        loader.close()
    arrays, _ = build_rows(dataset, global_batch, range(8))
    if context > 1:
        arrays = permute_batch(arrays, balanced_order(global_batch.bucket, context))
    assert batch.order == ("balanced" if context > 1 else "natural")
    compare(batch, arrays)
    assert batch.tokens.sharding.shard_shape(batch.tokens.shape) == (8 // (data * fsdp), global_batch.bucket // context)
    assert batch.images.sharding.shard_shape(batch.images.shape)[0] == 8 // (data * fsdp)


def test_a_bucket_that_context_does_not_divide_is_refused(folder):
    mesh = make_mesh(MeshConfig(context=2), jax.devices()[:2])
    dataset = open_dataset(folder)
    with pytest.raises(UserError, match=r"\[151, 199, 269\] are not multiples of 2 x mesh.context = 4"):
        batches(dataset, dataset.plan(), 0, mesh, Rules())


def test_evaluation_takes_every_sample_once(folder):
    dataset = open_dataset(folder)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        found = list(evaluation_batches(dataset, mesh, Rules()))
    assert Counter(s for b, _ in found for s in b.samples) == Counter(range(40))
    assert any(() in b.rows for b, _ in found)
    for global_batch, batch in found:
        empty = [row for row, samples in enumerate(global_batch.rows) if not samples]
        assert not np.asarray(batch.segment_ids)[empty].any() and (np.asarray(batch.supervised)[empty] == -1).all()


def spoil_values(own, name="v1"):
    path = own / "tokens" / npz_name(name + ".npz")
    values = np.ones((18, *GRIDS[1]), np.float32)
    values[3, 1, 2, 3] = np.nan
    write_npz(str(path), values, "test 7")


def test_nan_found_at_load_stops_with_file_and_record(own):
    dataset = open_dataset(own)
    spoil_values(own)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh), pytest.raises(UserError) as error:
        list(batches(dataset, dataset.plan(), 0, mesh, Rules(), 20))
    message = str(error.value)
    assert "v1.nii_embedded.npz" in message and "r.json: record " in message and "NaN" in message
    assert "--on-bad-record skip" in message and "\n" not in message


@pytest.mark.parametrize("settings", [{}, PACKED], ids=["plain", "packed"])
def test_nan_found_at_load_is_skipped_and_reported(own, settings):
    dataset = open_dataset(own, on_bad_record="skip", **settings)
    spoil_values(own)
    affected = {i for i, s in enumerate(dataset.samples) if "v1.nii.gz" in s.record.images}
    mesh, heard, left_out = make_mesh(MeshConfig(), jax.devices()[:1]), [], set()
    plan = dataset.plan()
    with jax.set_mesh(mesh):
        for global_batch, batch in batches(dataset, plan, 0, mesh, Rules(), plan.steps_per_epoch(), heard.append):
            for row, samples in enumerate(global_batch.rows):
                ids = np.asarray(batch.segment_ids)[row]
                wanted = {1 + k + global_batch.offsets[row] for k, s in enumerate(samples) if s not in affected}
                left_out |= set(samples) & affected
                assert set(ids[ids > 0].tolist()) == wanted
                after = np.asarray(batch.supervised)[row]
                assert (ids[after[after >= 0]] > 0).all() and np.isfinite(np.asarray(batch.images)[row]).all()
    assert left_out == affected and len(heard) == len(affected) > 0
    assert {p.where for p in heard} == {f"{own}/r.json: record {i} (id 'case {i}')" for i in affected}


def test_a_file_that_changed_its_size_under_way(own):
    dataset = open_dataset(own)
    write_npz(str(own / "tokens" / "v1.nii_embedded.npz"), np.ones((18, 2, 3, 3), np.float32), "test 7")
    index = next(i for i, s in enumerate(dataset.samples) if "v1.nii.gz" in s.record.images)
    with pytest.raises(UserError, match="had 24 tokens when it was checked and has 18 now"):
        build_rows(dataset, GlobalBatch(269, ((index,),)), [0])
