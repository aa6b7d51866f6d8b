"""DICOM series written here: the same array as the NIfTI, whatever the file names; what is mended, what is refused."""

import os
import shutil

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import (
    ExplicitVRLittleEndian,
    JPEGLosslessSV1,
    JPEGLSLossless,
    MediaStorageDirectoryStorage,
    RLELossless,
    generate_uid,
)
from scans import edited, lps_affine, oblique, phantom, save_dicom, save_nifti, turned

from jaxmed.config import PrepareConfig, VisualConfig
from jaxmed.data.inputs import check_header, read_input
from jaxmed.data.prepare import prepare
from jaxmed.data.volume_sources import find_volumes, stamp
from jaxmed.errors import UserError

HU = phantom()
CONFIG = VisualConfig(kind="volumes", volume=(9, 11, 14), prepare=PrepareConfig(preset="amos_challenge"))


def asked(**fields):
    return VisualConfig(kind="volumes", volume=(5, 6, 7), prepare=PrepareConfig(**fields))


def files(folder):
    """In the order of the slices."""
    paths = [os.path.join(folder, name) for name in os.listdir(folder)]
    return sorted(paths, key=lambda path: pydicom.dcmread(path).InstanceNumber)


def refused(folder, words, config=CONFIG, by_head=True):
    with pytest.raises(UserError, match=words) as caught:
        prepare(folder, config)
    message = str(caught.value)
    assert message.startswith(folder) and "\n" not in message
    assert check_header(folder, config) == (message if by_head else "")
    return message


@pytest.mark.parametrize("turn", [None, oblique()], ids=["straight", "oblique"])
def test_a_series_equals_the_nifti(tmp_path, turn):
    folder = save_dicom(tmp_path / "d", HU, turn)
    names = [os.path.basename(path) for path in files(folder)]
    assert names not in (sorted(names), sorted(names, reverse=True))
    stored, affine = turned(HU, lps_affine(turn), "RAS")
    path = save_nifti(tmp_path / "n.nii.gz", stored, affine)
    for config in (CONFIG, asked(), asked(preset="hu_window", window=(-150.0, 250.0))):
        found, want = prepare(folder, config), prepare(path, config)
        np.testing.assert_array_equal(found.values, want.values)
        assert found.frame.axes == want.frame.axes == "SPL" and found.frame.box == want.frame.box
        np.testing.assert_allclose(found.frame.spacing, want.frame.spacing, rtol=1e-5)
    assert "slices of 5 mm every 2.5 mm overlap" in " ".join(found.notices)
    np.testing.assert_array_equal(read_input(folder, CONFIG).values, prepare(path, CONFIG).values)


def test_sagittal_slices_are_turned(tmp_path):
    """Slices along the patient's left, each [back, head] -> rows to the feet."""
    stored = HU.transpose(1, 2, 0)[:, ::-1]  # [back, feet, left]
    turn = np.array([[0, 0, 1], [1, 0, 0], [0, -1, 0]], float)
    folder = save_dicom(tmp_path / "d", np.ascontiguousarray(stored), turn)
    want = prepare(save_nifti(tmp_path / "n.nii", HU, lps_affine()), CONFIG)
    np.testing.assert_allclose(prepare(folder, CONFIG).values, want.values, atol=1e-6)


def test_every_slice_has_its_own_scaling(tmp_path):
    scalings = [(0.5, -1024.0), (1.0, -1100.0), (2.0, -1024.0)]

    def encode(hu, k):
        slope, intercept = scalings[k % 3]
        return (hu - intercept) / slope, slope, intercept

    even = (HU // 2) * 2
    folder = save_dicom(tmp_path / "d", even, encode=encode)
    path = save_nifti(tmp_path / "n.nii", even, lps_affine())
    window = asked(preset="hu_window", window=(-300.0, 300.0))
    want = prepare(path, window).values
    np.testing.assert_array_equal(prepare(folder, window).values, want)
    table = tmp_path / "nifti_alone.csv"  # the series speaks for itself where others need a table
    table.write_text("VolumeName,RescaleSlope,RescaleIntercept,XYSpacing,ZSpacing\nx.nii.gz,2,-8192,1,2\n")
    told = asked(preset="hu_window", window=(-300.0, 300.0), hu="csv", metadata=str(table))
    np.testing.assert_array_equal(prepare(folder, told).values, want)


def test_monochrome1_is_inverted_and_said(tmp_path):
    def encode(hu, k):
        return 4095 - (hu.astype(np.int32) + 1024), 1.0, -1024.0

    folder = save_dicom(tmp_path / "d", HU, encode=encode, PhotometricInterpretation="MONOCHROME1")
    found, want = prepare(folder, CONFIG), prepare(save_dicom(tmp_path / "e", HU), CONFIG)
    np.testing.assert_array_equal(found.values, want.values)
    assert found.frame.interval == (-1000, 700) and any("MONOCHROME1" in notice for notice in found.notices)
    # where the scaling gives Hounsfield units, it speaks of the display alone
    units = save_dicom(tmp_path / "f", HU, PhotometricInterpretation="MONOCHROME1")
    found = prepare(units, CONFIG)
    np.testing.assert_array_equal(found.values, want.values)
    assert any("MONOCHROME1: grey values are left as they are" in notice for notice in found.notices)


def test_two_series_are_named_or_one_is_chosen(tmp_path):
    folder = save_dicom(tmp_path / "d", HU, seed=1, SliceThickness=2.5)
    want = prepare(folder, CONFIG)
    for path in files(folder):
        os.rename(path, path.replace(".dcm", "_first"))
    save_dicom(tmp_path / "d", HU - 50, seed=2, SeriesDescription="Bone 1.0", SeriesNumber=11)
    message = refused(folder, "holds 2 series")
    assert '"Lung 2.5" (number 4) with 9 images' in message and '"Bone 1.0" (number 11)' in message
    uid = pydicom.dcmread(files(folder)[0]).SeriesInstanceUID
    assert uid in message
    for series in ("Lung 2.5", "4"):
        config = VisualConfig(kind="volumes", volume=CONFIG.volume, prepare=PrepareConfig("amos_challenge", series=series))
        np.testing.assert_array_equal(prepare(folder, config).values, want.values)
    refused(folder, "no series with the UID, number or description 'Liver'", asked(series="Liver"))


def test_what_a_folder_holds_beside_the_slices(tmp_path):
    folder = save_dicom(tmp_path / "d", HU)
    want = prepare(folder, CONFIG).values
    scout = pydicom.dcmread(files(folder)[0])
    scout.ImageType, scout.filename = ["ORIGINAL", "PRIMARY", "LOCALIZER"], str(tmp_path / "d" / "scout.dcm")
    scout.save_as(scout.filename)
    (tmp_path / "d" / "notes.txt").write_text("nothing")
    (tmp_path / "d" / ".hidden").write_text("nothing")
    found = prepare(folder, CONFIG)
    np.testing.assert_array_equal(found.values, want)
    assert "1 file(s) that are no DICOM image" in found.notices[0] and "scout.dcm" in found.notices[1]


def test_a_scout_and_a_dose_report_are_no_second_series(tmp_path):
    folder = save_dicom(tmp_path / "d", HU)
    want = prepare(folder, CONFIG).values
    for name, number, tags in (
        ("scout", 1, {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"], "ImageOrientationPatient": [1, 0, 0, 0, 0, -1]}),
        ("dose", 99, {"ImagePositionPatient": None, "ImageType": ["DERIVED", "SECONDARY"]}),
    ):
        path = os.path.join(folder, f"{name}.dcm")
        shutil.copy(files(folder)[0], path)
        edited(path, SeriesInstanceUID=generate_uid(), SeriesDescription=name, SeriesNumber=number, **tags)
    found = prepare(folder, CONFIG)
    np.testing.assert_array_equal(found.values, want)
    assert found.notices[0] == (
        'series that are no volume left out: "dose" (number 99) with 1 image(s), "scout" (number 1) with 1 image(s)'
    )
    edited(os.path.join(folder, "dose.dcm"), NumberOfFrames=7)  # that could be a volume
    refused(folder, "holds 3 series")


def test_pictures_and_dicomdir_beside_files_without_endings(tmp_path):
    folder = save_dicom(tmp_path / "d", HU)
    want = prepare(folder, CONFIG).values
    for number, path in enumerate(files(folder)):
        os.rename(path, os.path.join(folder, f"IM{number:04d}"))
    for number in (1, 2):
        Image.fromarray(np.full((4, 5), 9 * number, np.uint8)).save(os.path.join(folder, f"{number}.png"))
    for place in (folder, str(tmp_path)):
        meta = FileMetaDataset()
        meta.TransferSyntaxUID, meta.MediaStorageSOPInstanceUID = ExplicitVRLittleEndian, generate_uid()
        meta.MediaStorageSOPClassUID = MediaStorageDirectoryStorage
        path = os.path.join(place, "DICOMDIR")
        FileDataset(path, {}, file_meta=meta, preamble=b"\0" * 128).save_as(path, enforce_file_format=True)
    found = prepare(folder, CONFIG)
    np.testing.assert_array_equal(found.values, want)
    assert "3 file(s) that are no DICOM image are left out (1.png, 2.png, DICOMDIR)" in found.notices
    assert find_volumes(str(tmp_path)) == [folder]
    refused(str(tmp_path), "give the folder that holds the slices themselves")


def test_lost_repeated_and_uneven_slices(tmp_path):
    folder = save_dicom(tmp_path / "d", HU)
    want, paths = prepare(folder, CONFIG), files(folder)
    again = paths[3].replace(".dcm", "_again.dcm")
    edited(paths[3], SOPInstanceUID="1.2.3")
    os.link(paths[3], again)
    found = prepare(folder, CONFIG)
    np.testing.assert_array_equal(found.values, want.values)
    assert any("1 slice(s) are there twice" in notice for notice in found.notices)
    os.unlink(again)
    other = pydicom.dcmread(paths[3])
    other.PixelData = pydicom.dcmread(paths[4]).PixelData
    other.save_as(again)
    refused(folder, "are different slices at the same place", by_head=False)
    os.unlink(again)
    os.unlink(paths[6])
    last, following = os.path.basename(paths[5]), os.path.basename(paths[7])
    message = refused(folder, r"1 slice\(s\) lost: 5 mm")
    assert f"between {last} and {following}" in message
    for path in paths[7:]:
        os.unlink(path)
    edited(paths[5], ImagePositionPatient=[31.5, -17.25, 240.0 + 4.6 * 2.5])
    refused(folder, "1.5 to 2.5|2.5 to|slices are lost, or several stacks")
    edited(paths[5], ImagePositionPatient=[31.5, -17.25, 240.0 + 5.05 * 2.5])
    assert any("apart and taken as even" in notice for notice in prepare(folder, CONFIG).notices)


def test_slices_of_a_tilted_gantry_are_straightened(tmp_path):
    """Each slice shows the body shifted by one row more: moved back, the volume is the untilted one inside."""
    tilted = np.stack([np.roll(HU[:, :, k], k - 4, axis=1) for k in range(9)], axis=2)

    def lean(data, k):
        x, y, z = map(float, data.ImagePositionPatient)
        data.ImagePositionPatient = [x, y - (k - 4) * 1.25, z]  # the row of the first pixel lies further to the front

    # voxel j of slice k shows what lies at row j - (k - 4): the position says the same
    folder = save_dicom(tmp_path / "d", tilted, change=lean)
    want = prepare(save_dicom(tmp_path / "e", HU), CONFIG)
    found = prepare(folder, CONFIG)
    assert any("gantry tilted by 26.6 degrees" in notice for notice in found.notices)
    inside = np.s_[:, 4:7]
    np.testing.assert_allclose(found.values[inside], want.values[inside], atol=1e-6)


def test_compressed_files(tmp_path):
    folder = save_dicom(tmp_path / "d", HU)
    want, paths = prepare(folder, CONFIG), files(folder)
    for path in paths:
        data = pydicom.dcmread(path)
        data.compress(RLELossless)
        data.save_as(path)
    np.testing.assert_array_equal(prepare(folder, CONFIG).values, want.values)
    for syntax, words in ((JPEGLosslessSV1, "pylibjpeg-libjpeg"), (JPEGLSLossless, "pyjpegls")):
        data = pydicom.dcmread(paths[2])
        data.file_meta.TransferSyntaxUID = syntax
        data.save_as(paths[2])
        refused(folder, f"{os.path.basename(paths[2])}: compressed as .*; pip install .*{words}")


@pytest.mark.parametrize(
    ("tags", "words"),
    [
        ({"ImagePositionPatient": None}, "has no ImagePositionPatient"),
        ({"RescaleSlope": 0}, "RescaleSlope is 0"),
        ({"NumberOfFrames": 3}, "multi-frame"),
        ({"PhotometricInterpretation": "RGB", "SamplesPerPixel": 3}, "RGB pixels"),
        ({"PixelSpacing": [1.25, 0.8]}, "have pixels of"),
        ({"ImageOrientationPatient": [0, 1, 0, 1, 0, 0]}, "lie in different directions"),
        ({"ImageOrientationPatient": [0, 1, 0, 1, 1, 0]}, "no two directions at right angles"),
        ({"Rows": 7}, "have .* pixels"),
        ({"Rows": None}, "is an image and has no Rows"),
        ({"SeriesInstanceUID": None}, "is an image and has no SeriesInstanceUID"),
    ],
)
def test_a_slice_that_does_not_fit(tmp_path, tags, words):
    folder = save_dicom(tmp_path / "d", HU)
    edited(files(folder)[5], **tags)
    refused(folder, words)


def test_damaged_and_single_files(tmp_path):
    folder = save_dicom(tmp_path / "d", HU[:, :, :2])
    paths = files(folder)
    refused(paths[0], "one DICOM file is one slice")
    data = pydicom.dcmread(paths[0])
    data.PixelData = data.PixelData[:100]
    data.save_as(paths[0])
    refused(folder, "its pixels cannot be read", by_head=False)
    os.unlink(paths[0])
    refused(folder, "a series of one slice")
    with open(paths[0], "wb") as file:
        file.write(b"no DICOM at all")
    refused(folder, "not a readable DICOM file")


def test_slices_that_were_copied_in_part(tmp_path):
    folder = save_dicom(tmp_path / "d", np.kron(HU[:, :, :3], np.ones((8, 8, 1), np.int16)))
    path = files(folder)[1]
    os.truncate(path, 14 * 11 * 64)  # its head is there, and half of its pixels
    refused(folder, f"{os.path.basename(path)}: is cut short; copy it again")


def test_links_to_slices_that_are_not_there(tmp_path):
    folder = save_dicom(tmp_path / "d", HU)
    first, *_, last = files(folder)
    before = stamp(folder)
    os.rename(last, tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", last)
    assert check_header(folder, CONFIG) == ""
    os.unlink(tmp_path / "elsewhere")
    refused(folder, f"{os.path.basename(last)}: not a readable DICOM file .*No such file")
    gone = stamp(folder)
    os.unlink(first)
    assert len({before, gone, stamp(folder), (0, 0)}) == 4


def test_volumes_below_a_folder(tmp_path):
    series = save_dicom(tmp_path / "a" / "series", HU)
    bare = save_dicom(tmp_path / "b", HU)
    for path in files(bare):
        os.rename(path, path.removesuffix(".dcm"))
    nifti = save_nifti(tmp_path / "a" / "n.nii.gz", HU, lps_affine())
    assert find_volumes(str(tmp_path)) == sorted([series, bare, nifti])
    np.testing.assert_array_equal(prepare(bare, CONFIG).values, prepare(series, CONFIG).values)
    (tmp_path / "a" / "round").symlink_to(tmp_path)
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "study").symlink_to(bare)
    found = find_volumes(str(tmp_path / "linked")), find_volumes(str(tmp_path / "a"))
    assert found[0] == [str(tmp_path / "linked" / "study")]
    assert {os.path.realpath(path) for path in found[1]} == {series, bare, nifti}
    before = stamp(bare)
    edited(files(bare)[0], RescaleIntercept=-1023)
    assert stamp(bare) != before and stamp(series) == stamp(series)
