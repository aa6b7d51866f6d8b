"""For tests: a small CT phantom whose three axes cannot be confused, as NIfTI in any orientation and as a DICOM series."""

import nibabel
import numpy as np
import pydicom
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

SIDES = (0.75, 1.25, 2.5)
"""Millimetres along left, back and head"""


def phantom(shape=(14, 11, 9), seed=5):
    """[left, back, head] whole Hounsfield units: air around a body with a bright organ in one corner."""
    rng = np.random.default_rng(seed)
    hu = np.full(shape, -1000, np.int16)
    hu[2:12, 1:9, 1:8] = rng.integers(-120, 140, (10, 8, 7))
    hu[3:6, 2:4, 5:7] = 700
    return hu


def lps_affine(turn=None):
    """Indices of [left, back, head] -> NIfTI's millimetres (right, front, head)."""
    affine = np.diag([*SIDES, 1.0])
    if turn is not None:
        affine[:3, :3] = turn @ affine[:3, :3]
    affine[:3, 3] = [-31.5, 17.25, 240.0]
    return np.diag([-1, -1, 1, 1]) @ affine


def save_nifti(path, values, affine, slope=None, intercept=None):
    image = nibabel.Nifti1Image(values, affine)
    image.header.set_slope_inter(slope, intercept)
    nibabel.save(image, path)
    return str(path)


def turned(values, affine, code):
    """The same volume stored with its axes growing to `code`, such as RAS."""
    own, new = nibabel.io_orientation(affine), nibabel.orientations.axcodes2ornt(code)
    turn = nibabel.orientations.ornt_transform(own, new)
    stored = nibabel.orientations.apply_orientation(values, turn)
    return stored, affine @ nibabel.orientations.inv_ornt_aff(turn, values.shape)


def oblique(degrees=11.0):
    """A rotation about the body's long axis, then about the one to the left."""
    a = np.radians(degrees)
    about_z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    return about_x @ about_z


def save_dicom(folder, hu, turn=None, series=None, seed=1, change=None, encode=None, sides=SIDES, **tags):
    """[left, back, head] -> a folder of slices with shuffled names; slices overlap by SliceThickness.

    `change(dataset, k)` alters slice k before it is written, `encode(hu, k)` gives (stored numbers, slope, intercept).
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng, turn = np.random.default_rng(seed), np.eye(3) if turn is None else turn
    names = rng.permutation(hu.shape[2] * 7)[: hu.shape[2]]
    series = series or generate_uid()
    for k in range(hu.shape[2]):
        stored, slope, intercept = encode(hu[:, :, k], k) if encode else (hu[:, :, k].astype(np.int32) + 1024, 1.0, -1024.0)
        data = _dataset(str(folder / f"{names[k]:03d}.dcm"), series, k)
        data.Rows, data.Columns = hu.shape[1], hu.shape[0]
        origin = turn @ (np.array([0, 0, k]) * sides) + np.array([31.5, -17.25, 240.0])
        data.ImagePositionPatient = [f"{v:.10g}" for v in origin]
        data.ImageOrientationPatient = [f"{v:.10g}" for v in (*turn[:, 0], *turn[:, 1])]
        data.PixelSpacing = [sides[1], sides[0]]
        data.SliceThickness, data.RescaleSlope, data.RescaleIntercept = 2 * sides[2], slope, intercept
        data.PixelData = np.ascontiguousarray(stored.T).astype(np.uint16).tobytes()
        for name, value in tags.items():
            setattr(data, name, value)
        if change:
            change(data, k)
        data.save_as(data.filename, enforce_file_format=True)
    return str(folder)


def _dataset(path, series, k):
    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, CTImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    data = FileDataset(path, {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
    data.SeriesInstanceUID, data.SeriesDescription, data.SeriesNumber = series, "Lung 2.5", 4
    data.Modality, data.InstanceNumber, data.ImageType = "CT", k + 1, ["ORIGINAL", "PRIMARY", "AXIAL"]
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 12, 11, 0
    return data


def edited(path, **tags):
    """Changes elements of a file in place."""
    data = pydicom.dcmread(path)
    for name, value in tags.items():
        setattr(data, name, value)
    data.save_as(path)


def save_slices(folder, shapes, names, mode="L"):
    """PNG or JPEG slices, each of one grey level, 20, 29, ..."""
    folder.mkdir()
    for number, (shape, name) in enumerate(zip(shapes, names, strict=True)):
        Image.fromarray(np.full(shape, 20 + 9 * number, np.uint8)).convert(mode).save(folder / name)
    return str(folder)
