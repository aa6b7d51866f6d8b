"""Contact sheets: components and similarity against numpy, planes in any orientation, what is drawn where, the command."""

from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image

from jaxmed.cli import view as command
from jaxmed.config import PrepareConfig, VisualConfig
from jaxmed.data.embeddings import write_npz
from jaxmed.data.prepare import prepare
from jaxmed.errors import UserError
from jaxmed.report import view_input, view_planes, view_sheet
from jaxmed.report.view_features import components, patch_place, similarity
from jaxmed.report.view_planes import Seen, patch_of, planes, slice_of
from jaxmed.report.view_sheet import MARGIN, Features

CLIP = Path(__file__).parents[1] / "golden" / "vit3d" / "m3d_clip"
GRID = (2, 4, 3)
CONFIG = """
import dataclasses
from jaxmed._configs import btb3d
from jaxmed.config import PrepareConfig, TowerConfig, VisualConfig

def get_config():
    base = btb3d.get_config()
    tower = TowerConfig("vit3d", (8, 24, 21), (4, 6, 7), 1, 30, 2, 5, 41, 1e-5, "gelu", class_position=False, pre_norm=False,
                        final_norm=True, patch_bias=True, qkv_bias=False, select_layer=-1)
    visual = VisualConfig("volumes", tokens=24, features=30, grid=(2, 4, 3), volume=(8, 24, 21),
                          prepare=PrepareConfig("hu_window", window=(-150.0, 250.0)))
    return dataclasses.replace(base, model=dataclasses.replace(base.model, tower=tower), visual=visual)
"""


def tokens_of(grid, features, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(int(np.prod(grid)), features)) @ rng.normal(size=(features, features)) + 3).astype(np.float32)


def test_components_are_those_of_a_singular_value_decomposition():
    tokens = tokens_of((3, 5, 4), 17)
    found = components(tokens, (3, 5, 4))
    left, values, right = np.linalg.svd(tokens.astype(np.float64) - tokens.mean(0, dtype=np.float64), full_matrices=False)
    np.testing.assert_allclose(found.shares, (values**2 / (values**2).sum())[:3], rtol=1e-9)
    signs = np.sign(right[np.arange(3), np.abs(right[:3]).argmax(1)])
    scores = (left * values)[:, :3] * signs
    np.testing.assert_allclose(found.scores, scores, atol=1e-9 * values[0])
    low, high = np.percentile(scores, (1, 99), axis=0)
    np.testing.assert_array_equal(found.colours.reshape(-1, 3), np.rint(np.clip((scores - low) / (high - low), 0, 1) * 255))
    # red is where the first component is large, whatever sign a solver gives it
    np.testing.assert_array_equal(components(tokens, (3, 5, 4)).colours, found.colours)
    assert components(-tokens, (3, 5, 4)).colours[..., 0].std() > 40


def test_components_of_tokens_that_hardly_differ():
    flat = components(np.full((12, 2), 0.37, np.float32), (1, 3, 4))
    assert flat.shares == (0, 0, 0) and (flat.colours == 128).all()
    two = components(tokens_of((1, 3, 4), 2), (1, 3, 4))
    assert two.shares[2] == 0 and sum(two.shares) == pytest.approx(1) and (two.colours[..., 2] == 128).all()


def test_similarity_is_the_cosine_and_one_at_the_patch():
    tokens = tokens_of(GRID, 7)
    tokens[0] = 0
    found = similarity(tokens, GRID, (1, 2, 1))
    chosen = tokens[1 * 12 + 2 * 3 + 1].astype(np.float64)
    lengths = np.linalg.norm(tokens, axis=1) * np.linalg.norm(chosen)
    np.testing.assert_allclose(found.reshape(-1)[1:], (tokens @ chosen / np.where(lengths, lengths, 1))[1:], atol=1e-6)
    assert found[1, 2, 1] == pytest.approx(1, abs=1e-6) and found[0, 0, 0] == 0
    assert patch_place("1,2,1", GRID) == (1, 2, 1)
    for wrong, why in (("1,2", "give its place"), ("1,2,3", "give 0,0,0 to 1,3,2"), ("-1,0,0", "the grid has 2 x 4 x 3")):
        with pytest.raises(UserError, match=why):
            patch_place(wrong, GRID)


@pytest.mark.parametrize("code", ["SPL", "IPR", "LSA", "PRI"])
def test_planes_show_the_patient_alike_however_the_axes_run(code):
    """Letters: where depth, rows and columns grow to."""
    body = np.random.default_rng(1).random((5, 6, 7)).astype(np.float32)  # to the feet, to the back, to the left
    own, new = (nibabel.orientations.axcodes2ornt(c) for c in ("IPL", code))
    stored = nibabel.orientations.apply_orientation(body, nibabel.orientations.ornt_transform(own, new))
    seen = Seen("x", stored, (0, 1), (), GRID, (1.0, 1.0, 1.0), tuple(code))
    axial, coronal, sagittal = planes(seen)
    assert (axial.letters, coronal.letters, sagittal.letters) == (tuple("RLAP"), tuple("RLSI"), tuple("APSI"))
    for plane, expected in ((axial, body), (coronal, body.swapaxes(0, 1)), (sagittal, body.transpose(2, 0, 1))):
        cuts = [plane.cut(stored, place) for place in range(stored.shape[plane.axis])]
        assert any(np.array_equal(cut, expected[1]) for cut in cuts)


def test_slices_and_patches():
    canvas = Seen("x", np.zeros((241, 16, 16), np.float32), (0, 1), (), (31, 2, 2), first_alone=True)
    assert [patch_of(p, 0, canvas) for p in (0, 1, 8, 9, 233, 240)] == [0, 1, 1, 2, 30, 30]
    assert slice_of(0, 0, canvas) == 0 and slice_of(30, 0, canvas) in (236, 237)
    volume = Seen("x", np.zeros((8, 24, 21), np.float32), (0, 1), (), GRID)
    assert [patch_of(p, 0, volume) for p in range(8)] == [0] * 4 + [1] * 4
    assert patch_of(slice_of(2, 2, volume), 2, volume) == 2
    assert view_planes.places(4, 8) == [1, 3, 5, 7] and view_planes.places(4, 8, [0]) == [0, 3, 5, 7]
    assert view_planes.places(9, 3) == [0, 1, 2]


def head_height(seen, features):
    return 32 + view_sheet.LINE * (len(seen.facts) + (3 if features else 0)) + 8


def test_what_is_drawn_where():
    values = np.random.default_rng(2).random((8, 24, 21)).astype(np.float32)
    seen = Seen("a volume", values, (0.25, 0.75), (("Preset", "m3d"),), GRID, (3.0, 1.0, 1.0), ())
    tokens = tokens_of(GRID, 5)
    features = Features(components(tokens, GRID), similarity(tokens, GRID, (1, 2, 0)), (1, 2, 0))
    sheet = view_sheet.draw(seen, features, 1)
    # extents 24, 24, 21 millimetres: 224 pixels a side and 196 of the columns; one slice of each plane, the patch's own
    top = MARGIN + head_height(seen, features) + view_sheet.LINE + view_sheet.TICKS
    place = slice_of(1, 0, seen)
    grey = np.rint(np.clip((values[place] - 0.25) / 0.5, 0, 1) * 255)
    picture = sheet[top : top + 224, MARGIN : MARGIN + 196]
    assert picture[3, 4].tolist() == [grey[0, 0]] * 3 and picture[220, 192].tolist() == [grey[23, 20]] * 3
    left = MARGIN + 196 + view_sheet.GAP // 2 + view_sheet.TICKS
    colours = sheet[top : top + 224, left : left + 196]
    for row in range(4):
        for column in range(3):
            block = colours[row * 56 + 3 : row * 56 + 53, column * 65 + 4 : column * 65 + 62].reshape(-1, 3)
            assert (block == features.components.colours[1, row, column]).all()  # a patch is one colour
    assert (colours[112, 5] == 255).all() and (colours[0, 5] != 255).any()  # the chosen patch is framed
    left += 196 + view_sheet.GAP // 2
    likeness = sheet[top : top + 224, left : left + 196].astype(int)
    bright = [likeness[row * 56 + 28, column * 65 + 33].sum() for row in range(4) for column in range(3)]
    assert np.argmax(bright) == 2 * 3 and np.argsort(bright).tolist() == np.argsort(features.similarity[1].reshape(-1)).tolist()
    # without the maps: as wide as four pictures, and lower
    plain = view_sheet.draw(seen, None, 8)
    assert plain.shape[1] == 2 * MARGIN + 4 * 196 + 3 * view_sheet.GAP + 4 * 28
    wide = view_sheet.draw(Seen("a volume", values, (0.25, 0.75), (), GRID, (3.0, 1.0, 1.0), tuple("SPL")), None, 8)
    amber = (wide == view_sheet.AMBER).all(-1)
    assert amber[:, : MARGIN + 20].any() and not (plain == view_sheet.AMBER).all(-1).any()


def phantom(path, code="RAS", shift=0):
    rng = np.random.default_rng(3)
    hu = np.full((14, 12, 10), -1000, np.int16)
    hu[2:12, 3:10, 1:9] = rng.integers(-200, 300, (10, 7, 8)) + shift
    affine = np.diag([2.0, 2.5, 4.0, 1.0])
    own, new = nibabel.io_orientation(affine), nibabel.orientations.axcodes2ornt(code)
    turn = nibabel.orientations.ornt_transform(own, new)
    stored = nibabel.orientations.apply_orientation(hu, turn)
    nibabel.save(nibabel.Nifti1Image(stored, affine @ nibabel.orientations.inv_ornt_aff(turn, hu.shape)), path)
    return str(path)


@pytest.fixture
def config(tmp_path):
    (tmp_path / "c.py").write_text(CONFIG)
    return ["--config", str(tmp_path / "c.py")]


def pixels(path):
    return np.asarray(Image.open(path))


def test_the_command_in_two_orientations(tmp_path, config, capsys):
    one, other = phantom(tmp_path / "v.nii.gz"), phantom(tmp_path / "w.nii", "IRP")
    flags = [*config, "--tower", str(CLIP), "--features", "--patch", "1,2,2"]
    assert command.run([one, *flags, "--out", str(tmp_path / "deep" / "v.png")]) == 0
    assert command.run([other, *flags, "--out", str(tmp_path / "w.png")]) == 0
    assert f"Wrote {tmp_path / 'w.png'}" in capsys.readouterr().out
    first, second = pixels(tmp_path / "deep" / "v.png"), pixels(tmp_path / "w.png")
    below = MARGIN + 32  # of the name
    np.testing.assert_array_equal(first[below:], second[below:])
    tokens = tmp_path / "v.npz"
    write_npz(str(tokens), np.zeros((30, 2, 4, 3), np.float32), "")
    assert command.run([one, *config, "--features", "--tokens", str(tokens), "--out", str(tmp_path / "of_file.png")]) == 0
    assert pixels(tmp_path / "of_file.png").shape[0] < first.shape[0]  # no line for a similarity
    write_npz(str(tokens), np.zeros((30, 2, 3, 3), np.float32), "")
    with pytest.raises(UserError, match=r"tokens on a grid \(2, 3, 3\), the tower of .* gives \(2, 4, 3\)"):
        command.run([one, *config, "--features", "--tokens", str(tokens)])
    assert command.run([one, *config, "--visual.prepare.window", "-50", "60", "--out", str(tmp_path / "narrow.png")]) == 0
    assert (pixels(tmp_path / "narrow.png").max(-1) > 0).any()
    assert command.run([one, other, *config, "--out", str(tmp_path / "both")]) == 0
    assert sorted(p.name for p in (tmp_path / "both").iterdir()) == ["v.png", "w.png"]


def test_what_the_sheet_says_of_the_preparation(tmp_path):
    visual = VisualConfig("volumes", tokens=24, features=30, grid=GRID, volume=(8, 24, 21), prepare=PrepareConfig("m3d"))
    path = phantom(tmp_path / "v.nii")
    said = dict(view_input.of_prepared(path, prepare(path, visual), visual).facts)
    assert said["Preset"] == "m3d" and "does not depend" in said["Hounsfield rule"] and "−1000 to 299 HU" in said["Window"]
    assert said["Orientation"] == "D grows to the head, H grows to the back, W grows to the left"
    assert said["In the file"] == "NIfTI, 10 × 12 × 14 voxels as D, H, W, cut to the foreground 8 × 7 × 10"
    windowed = replace(visual, prepare=PrepareConfig("hu_window", window=(-150.0, 250.0)))
    said = dict(view_input.of_prepared(path, prepare(path, windowed), windowed).facts)
    assert "−150 to 250 HU become" in said["Window"] and "gives air" in said["Hounsfield rule"]


def test_token_files_and_configs_that_encode(tmp_path, capsys):
    path = phantom(tmp_path / "v.nii.gz")
    rng = np.random.default_rng(7)
    write_npz(str(tmp_path / "v.npz"), rng.normal(size=(18, 3, 4, 5)).astype(np.float32), "haar x")
    out = ["--config", "btb3d", "--out", str(tmp_path / "s.png")]
    small = ["--encode.canvas", "32", "16", "17", "--encode.spacing", "2", "2", "4"]
    assert command.run([path, *out, *small]) == 0
    assert command.run([str(tmp_path / "v.npz"), *out, "--features"]) == 0
    assert command.run([path, *out, *small, "--features", "--tokens", str(tmp_path / "v.npz"), "--patch", "2,3,4"]) == 0
    for argv, why in (
        ([path, *out, "--features"], "has no image tower, its tokens stand in files; give the volume's with --tokens"),
        ([str(tmp_path / "v.npz"), *out], "give --features"),
        ([path, *out, "--patch", "0,0,0"], "--patch: shows tokens; give --features"),
        ([str(tmp_path / "v.npz"), *out, "--features", "--patch", "3,0,0"], "the grid has 3 x 4 x 5 patches"),
        ([str(tmp_path / "gone.nii"), *out], "gone.nii: no such file"),
        ([path, path, str(tmp_path / "gone.nii"), *out], "name a folder"),
        ([path, *out, "--slices", "-1"], "--slices is -1"),
    ):
        with pytest.raises(UserError, match=why):
            command.run(argv)
    with pytest.raises(UserError, match=r"1 of 2 volumes cannot be shown:\n.*gone\.nii: no such file"):
        command.run([path, str(tmp_path / "gone.nii"), *out[:2], *small, "--out", str(tmp_path / "f")])
    assert (tmp_path / "f" / "v.png").is_file()


def test_a_tower_without_weights(tmp_path, config):
    with pytest.raises(UserError, match="says nothing of the tower's weights; give their folder with --tower"):
        command.run([phantom(tmp_path / "v.nii"), *config, "--features"])
