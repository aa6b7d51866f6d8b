"""One reader for every kind of image: values, grids, shapes of the batch's array, paths, heads of files."""

import dataclasses
import re

import nibabel
import numpy as np
import pytest
from PIL import Image

from jaxmed.config import DataConfig, PixelConfig, VisualConfig
from jaxmed.data.embeddings import pack_codes, write_npz
from jaxmed.data.images import load_pixels
from jaxmed.data.input_files import check_files
from jaxmed.data.inputs import (
    check_header,
    image_array_shape,
    image_ndim,
    input_folder,
    input_path,
    read_input,
    token_count,
)
from jaxmed.data.slices import load_slices
from jaxmed.errors import UserError

PIXELS = VisualConfig(kind="pixels", tokens=13, grid=(1, 3, 4), features=5, pixels=PixelConfig(shortest=24, crop=21))
VOLUMES = VisualConfig(kind="volumes", tokens=12, grid=(1, 3, 4), features=5, volume=(2, 9, 8))
SLICES = VisualConfig(
    kind="slices", tokens=7, grid=(7, 1, 1), slices=7, window=(-9.0, 99.0), pixels=PixelConfig(shortest=11, crop=0)
)
TOKENS = VisualConfig(tokens=30, grid=(2, 3, 5), features=18)
CODES = dataclasses.replace(TOKENS, kind="codes")
RNG = np.random.default_rng(8)
VOLUME = RNG.normal(size=(2, 9, 8)).astype(np.float32)
SCAN = RNG.integers(-99, 200, (13, 12, 9)).astype(np.int16)
PICTURE = RNG.integers(0, 256, (30, 17, 3), dtype=np.uint8)
SIGNS = np.where(RNG.random((18, 2, 3, 5)) < 0.5, -1, 1).astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("inputs")
    np.save(path / "v.npy", VOLUME[None])
    np.save(path / "half.npy", np.asfortranarray(VOLUME.astype(np.float16)))
    Image.fromarray(PICTURE).save(path / "p.png")
    nibabel.save(nibabel.Nifti1Image(SCAN, np.eye(4)), path / "s.nii.gz")
    write_npz(str(path / "t.nii_embedded.npz"), SIGNS, "")
    return path


def test_every_kind_from_a_file_and_from_an_array(folder):
    cases = [
        (PIXELS, "p.png", PICTURE, load_pixels(PICTURE, PIXELS.pixels), (1, 3, 4)),
        (VOLUMES, "v.npy", VOLUME, VOLUME[..., None], (1, 3, 4)),
        (VOLUMES, "half.npy", VOLUME.astype(np.float16), VOLUME.astype(np.float16)[..., None], (1, 3, 4)),
        (SLICES, "s.nii.gz", SCAN, load_slices(SCAN, 7, 11, (-9.0, 99.0)), (7, 1, 1)),
        (TOKENS, "t.nii.gz", SIGNS[None], SIGNS.reshape(18, -1).T, (2, 3, 5)),
        (CODES, "t.npz", pack_codes(SIGNS), pack_codes(SIGNS).reshape(-1), (2, 3, 5)),
    ]
    for visual, name, array, values, grid in cases:
        for source in (input_path(str(folder), name, visual), array):
            found = read_input(source, visual)
            np.testing.assert_array_equal(found.values, values, err_msg=name)
            assert found.grid == grid
            shape, dtype = image_array_shape(visual, 1, 1, visual.tokens)
            assert shape[2:] == values.shape and dtype == found.values.dtype
            assert image_ndim(visual) == values.ndim + 2 and token_count(grid, visual) == visual.tokens
        assert check_header(input_path(str(folder), name, visual), visual) == ""


def test_shapes_of_batches():
    assert image_array_shape(PIXELS, 4, 2, 13) == ((4, 2, 21, 21, 3), np.float32)
    assert image_array_shape(VOLUMES, 4, 2, 12) == ((4, 2, 2, 9, 8, 1), np.float32)
    assert image_array_shape(SLICES, 4, 2, 7) == ((4, 2, 7, 11, 11), np.float32)
    assert image_array_shape(TOKENS, 4, 2, 29) == ((4, 2, 29, 18), np.float32)
    merged = dataclasses.replace(CODES, merge=(1, 2, 2), features=72)
    assert image_array_shape(merged, 4, 2, 29) == ((4, 2, 116), np.uint32)
    assert image_array_shape(dataclasses.replace(PIXELS, kind="none"), 4, 0, 0) == ((4, 0, 0, 5), np.float32)


def test_folders_and_paths():
    data = DataConfig(embeddings="e", images="i", volumes="v")
    folders = [input_folder(data, visual) for visual in (TOKENS, CODES, PIXELS, VOLUMES, SLICES, VisualConfig(kind="none"))]
    assert folders == ["e", "e", "i", "v", "v", ""]
    assert input_path("e", "/a/x.nii.gz", TOKENS) == "e/a/x.nii_embedded.npz"
    assert input_path("i", "a/x.png", PIXELS) == "i/a/x.png" and input_path("i", "/a/x.png", PIXELS) == "/a/x.png"
    assert input_path("v", "a/x.nii.gz", SLICES) == "v/a/x.nii.gz" and input_path("", "x.npy", VOLUMES) == "x.npy"


class Hostile:
    def __reduce__(self):
        return (print, ("executed",))


def test_volumes_that_cannot_be_used(tmp_path, capsys):
    np.save(tmp_path / "shape.npy", np.zeros((2, 9, 7), np.float32))
    np.save(tmp_path / "whole.npy", np.zeros((2, 9, 8), np.int16))
    np.save(tmp_path / "objects.npy", np.array([Hostile()]), allow_pickle=True)
    (tmp_path / "text.npy").write_text("no numbers")
    (tmp_path / "scan.nii.gz").write_bytes(b"")
    np.save(tmp_path / "cut.npy", VOLUME)
    (tmp_path / "cut.npy").write_bytes((tmp_path / "cut.npy").read_bytes()[:-5])
    for name, message in {
        "shape.npy": "shape (2, 9, 7); the model reads (1, 2, 9, 8) or (2, 9, 8)",
        "whole.npy": "values of type int16",
        "objects.npy": "shape (1,)",
        "text.npy": "not a readable .npy file",
        "scan.nii.gz": "not a readable NIfTI file",
        "cut.npy": "is cut short",
        "gone.npy": "no such file",
    }.items():
        path = str(tmp_path / name)
        assert message in check_header(path, VOLUMES)
        with pytest.raises(UserError, match=re.escape(path)) as error:
            read_input(path, VOLUMES)
        assert message in str(error.value) and "\n" not in str(error.value)
    assert capsys.readouterr().out == ""
    for value in (np.nan, 1e39):
        spoilt = VOLUME.astype(np.float64)
        spoilt[1, 2, 3] = value
        np.save(tmp_path / "spoilt.npy", spoilt)
        assert check_header(str(tmp_path / "spoilt.npy"), VOLUMES) == ""
        for source in (tmp_path / "spoilt.npy", spoilt):
            with pytest.raises(UserError, match="1 of 144 values are NaN or infinite"):
                read_input(source, VOLUMES)


def test_other_kinds_are_checked_by_their_heads_too(folder, tmp_path):
    assert "not an image file" in check_header(str(folder / "v.npy"), PIXELS)
    assert "not a readable NIfTI" in check_header(str(folder / "p.png"), SLICES)
    assert "30 tokens, visual.tokens is 29" in check_header(
        str(folder / "t.nii_embedded.npz"), dataclasses.replace(TOKENS, tokens=29)
    )
    with pytest.raises(UserError, match=r"p\.png: the model reads no images"):
        read_input(folder / "p.png", VisualConfig(kind="none"))


def test_files_that_did_not_change_are_not_opened_again(folder, tmp_path, monkeypatch):
    records = str(tmp_path / "r.json")
    Image.fromarray(PICTURE).save(tmp_path / "own.png")
    paths = [str(folder / "p.png"), str(tmp_path / "own.png"), str(tmp_path / "gone.png"), str(folder / "p.png")]
    first = check_files(paths, PIXELS, records)
    assert len(first) == 3 and "no such file" in first[paths[2]].problem and first[paths[0]].grid == (1, 3, 4)
    opened = []
    monkeypatch.setattr(
        "jaxmed.data.input_files.check_header", lambda path, visual: opened.append(path) or check_header(path, visual)
    )
    assert check_files(paths, PIXELS, records) == first and opened == [paths[2]]
    (tmp_path / "own.png").write_bytes(b"spoilt")
    assert "not an image" in check_files(paths, PIXELS, records)[paths[1]].problem and set(opened[1:]) == set(paths[1:3])
    assert check_files(paths, VisualConfig(kind="none"), records) == {}
