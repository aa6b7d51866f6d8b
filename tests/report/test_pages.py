"""The look that all pages share, the word differences, and slices turned by the affine."""

import base64
import io
import re

import nibabel
import numpy as np
import pytest
from PIL import Image

from jaxmed.errors import UserError
from jaxmed.report import page, slices
from jaxmed.report.difference import differences

ORIENTATIONS = [("R", "A", "S"), ("L", "P", "S"), ("S", "R", "P"), ("A", "I", "L")]


def pixels(uri: str) -> np.ndarray:
    head, data = uri.split(",")
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def test_differences_mark_words_and_keep_the_text():
    ours, theirs = differences("No  nodule,\n\nno effusion seen.", "no small nodule. No effusion")
    assert "".join(text for _, text in ours) == "No  nodule,\n\nno effusion seen."
    assert "".join(text for _, text in theirs) == "no small nodule. No effusion"
    assert [text for mark, text in ours if mark] == ["seen."]
    assert [text for mark, text in theirs if mark] == ["small"]


def test_neighbouring_marked_words_are_one_run():
    ours, _ = differences("heart is quite large now", "heart now")
    assert ours == [(False, "heart "), (True, "is quite large"), (False, " now")]
    assert differences("a\n\nb", "")[0] == [(True, "a"), (False, "\n\n"), (True, "b")]


def test_an_empty_text_differs_in_every_word():
    assert differences("", "a b") == ([], [(True, "a b")])


def test_pages_escape_texts_and_load_nothing():
    html = page.render("base.jinja", title="<script>x</script>", subtitle="", facts=[("A & B", "<i>")], notices=["n > m"])
    assert "&lt;script&gt;x" in html and "A &amp; B" in html and "&lt;i&gt;" in html and "n &gt; m" in html
    assert "default-src 'none'" in html
    assert not re.search(r"(src|href)=[\"'](?!data:)", html) and "@import" not in html and "url(" not in html


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0%"), (0.0004, "under 0.1%"), (0.0463, "4.6%"), (0.61, "61%"), (0.998, "over 99%"), (1, "100%")]
)
def test_shares_never_round_to_none_or_all(value, text):
    assert page.share(value) == text


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_slices_show_the_patients_right_on_the_left_whatever_the_file(tmp_path, codes):
    """A block that is right, anterior and superior stands at the upper left of the axial and coronal slice."""
    canonical = np.full((26, 34, 42), -1000.0, np.float32)  # R to L, A to P, S to I
    canonical[:15, :18, :22] = 400.0
    mm = np.array([1.5, 1.0, 2.0])
    turn = nibabel.orientations.ornt_transform(
        nibabel.orientations.axcodes2ornt(("L", "P", "I")), nibabel.orientations.axcodes2ornt(codes)
    )
    stored = np.ascontiguousarray(nibabel.orientations.apply_orientation(canonical, turn))
    zooms = np.empty(3)
    zooms[turn[:, 0].astype(int)] = mm
    affine = np.eye(4)
    for axis, code in enumerate(codes):
        row, sign = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}[code]
        affine[:3, axis] = 0
        affine[row, axis] = sign * zooms[axis]
    path = str(tmp_path / "v.nii.gz")
    nibabel.save(nibabel.Nifti1Image(stored, affine), path)
    assert nibabel.aff2axcodes(nibabel.load(path).affine) == codes
    views = {view.name: view for view in slices.pictures(stored, slices.orientation(path), tuple(zooms), (-1000, 400))}
    assert [view.sides for view in views.values()] == [("R", "L", "A", "P"), ("R", "L", "S", "I"), ("A", "P", "S", "I")]
    for name, across, down in (("axial", 0, 1), ("coronal", 0, 2), ("sagittal", 1, 2)):
        grey = pixels(views[name].uri)
        size = np.array(canonical.shape) * mm
        assert grey.shape[1] / grey.shape[0] == pytest.approx(size[across] / size[down], rel=0.02)
        h, w = grey.shape[0] // 4, grey.shape[1] // 4
        assert grey[h, w] > 250 and grey[3 * h, w] < 5 and grey[h, 3 * w] < 5 and grey[3 * h, 3 * w] < 5


def test_hounsfield_scaling_and_window():
    stored = np.full((9, 8, 7), 1124, np.int16)
    views = slices.pictures(stored, np.array([[0, 1], [1, 1], [2, 1]]), (1, 1, 1), (-1000.0, 400.0), (1.0, -1024.0))
    assert set(pixels(views[0].uri).ravel()) == {int((100 + 1000) * 255 / 1400)}


def test_volumes_are_found_flat_nested_and_by_the_token_files_name(tmp_path):
    nested = tmp_path / "valid_1" / "valid_1_a"
    nested.mkdir(parents=True)
    (nested / "valid_1_a_1.nii.gz").touch()
    (tmp_path / "valid_2_a_1.nii").touch()
    folder = slices.VolumeFolder(str(tmp_path))
    assert folder.find("valid_1_a_1.nii.gz") == str(nested / "valid_1_a_1.nii.gz")
    assert folder.find("valid_1_a_1.nii_embedded.npz") == str(nested / "valid_1_a_1.nii.gz")
    assert folder.find("valid_2_a_1.nii") == folder.find("valid_2_a_1.nii.gz") == str(tmp_path / "valid_2_a_1.nii")
    assert folder.find("valid_3_a_1.nii.gz") == ""
    with pytest.raises(UserError, match="no such folder"):
        slices.VolumeFolder(str(tmp_path / "none"))
