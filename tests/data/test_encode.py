"""Folders of volumes to token files: layout, going on, problems, and the command."""

import json
import os

import nibabel
import numpy as np
import pytest

from jaxmed.cli import encode as command
from jaxmed.config import EncodeConfig, VisualConfig
from jaxmed.data import haar
from jaxmed.data.embeddings import load_tokens, read_header
from jaxmed.data.encode import encode_folder, find_volumes, same_preprocessing
from jaxmed.data.volumes import preprocess, read_volume
from jaxmed.errors import BadRecords, UserError

CONFIG = EncodeConfig(canvas=(24, 12, 8), spacing=(2.0, 2.0, 3.0), levels=(1, 2, 2))


def write(path, seed, shift=0, spacing=(2.0, 1.5, 4.0), shape=(22, 17, 9)):
    rng = np.random.default_rng(seed)
    hu = rng.normal(40, 30, shape)
    hu[: shape[0] // 2] = rng.normal(-1000, 15, (shape[0] // 2, *shape[1:]))
    os.makedirs(os.path.dirname(path), exist_ok=True)
    nibabel.Nifti1Image(np.rint(hu + shift).astype(np.int16), np.diag([*spacing, 1.0])).to_filename(path)
    return str(path)


@pytest.fixture
def folder(tmp_path):
    """Three volumes in CT-RATE's nesting."""
    for i in range(3):
        write(tmp_path / "in" / f"valid_{i}" / f"valid_{i}_a" / f"valid_{i}_a_1.nii.gz", i)
    return str(tmp_path / "in"), str(tmp_path / "out")


def test_files_hold_the_tokens_of_their_volume(folder):
    volumes, out = folder
    summary = encode_folder(volumes, out, CONFIG, processes=1)
    assert (summary.written, summary.present, summary.skipped) == (3, 0, ())
    assert sorted(os.listdir(out)) == [f"valid_{i}_a_1.nii_embedded.npz" for i in range(3)]
    for path in find_volumes(volumes):
        name = os.path.basename(path).replace(".nii.gz", ".nii_embedded.npz")
        want = haar.encode(preprocess(read_volume(path), CONFIG), CONFIG)
        with np.load(os.path.join(out, name), allow_pickle=False) as archive:
            assert archive["arr"].dtype == np.float32
            np.testing.assert_array_equal(archive["arr"], want[None])
            assert str(archive["encoder"]) == haar.signature(CONFIG)
    features = len(haar.band_names(CONFIG))
    tokens, grid = load_tokens(os.path.join(out, name), VisualConfig(tokens=12, features=features * 6, merge=(2, 3, 1)))
    assert grid == (2, 2, 3) and tokens.shape == (12, features * 6)


def test_processes_change_nothing(tmp_path, folder):
    volumes, out = folder
    for i in range(3, 10):
        write(tmp_path / "in" / f"more_{i}.nii", i)
    encode_folder(volumes, out, CONFIG, processes=1)
    encode_folder(volumes, out + "2", CONFIG, processes=2)
    assert sorted(os.listdir(out)) == sorted(os.listdir(out + "2")) and len(os.listdir(out)) == 10
    for name in os.listdir(out):
        with np.load(os.path.join(out, name)) as one, np.load(os.path.join(out + "2", name)) as two:
            np.testing.assert_array_equal(one["arr"], two["arr"])


def test_goes_on_where_it_stopped(folder):
    volumes, out = folder
    encode_folder(volumes, out, CONFIG, processes=1)
    kept, damaged = (os.path.join(out, f"valid_{i}_a_1.nii_embedded.npz") for i in (0, 1))
    before = os.stat(kept).st_mtime_ns
    with open(damaged, "r+b") as file:
        file.truncate(os.path.getsize(damaged) // 2)
    with open(damaged + ".123.partial", "wb") as file:
        file.write(b"half a file of a killed process")
    summary = encode_folder(volumes, out, CONFIG, processes=1)
    assert (summary.written, summary.present) == (1, 2)
    assert os.stat(kept).st_mtime_ns == before
    assert read_header(damaged).shape == haar.token_shape(CONFIG)


def test_tokens_of_two_encoders_never_lie_together(folder):
    volumes, out = folder
    encode_folder(volumes, out, CONFIG, processes=1)
    other = EncodeConfig(canvas=(24, 12, 8), spacing=(2.0, 2.0, 2.5), levels=(1, 2, 2))
    with pytest.raises(UserError, match="was written by haar3d"):
        encode_folder(volumes, out, other, processes=1)


def metadata(tmp_path, names, intercept=-1024):
    path = tmp_path / "metadata.csv"
    rows = [f'{name},1,{intercept},"[1.5, 1.5]",3.5' for name in names]
    path.write_text("\n".join(["VolumeName,RescaleSlope,RescaleIntercept,XYSpacing,ZSpacing", *rows]) + "\n")
    return str(path)


def test_metadata_gives_spacing_and_rescale(tmp_path):
    stored = write(tmp_path / "in" / "a.nii.gz", 1, shift=1024)
    table = metadata(tmp_path, ["a.nii.gz"])
    summary = encode_folder(str(tmp_path / "in"), str(tmp_path / "out"), CONFIG, table, processes=1)
    assert list(summary.readings.values()) == [1] and "CSV" in next(iter(summary.readings))
    plain = write(tmp_path / "plain" / "a.nii.gz", 1, spacing=(1.5, 1.5, 3.5))
    with np.load(tmp_path / "out" / "a.nii_embedded.npz") as archive:
        want = haar.encode(preprocess(read_volume(plain), CONFIG), CONFIG)
        np.testing.assert_allclose(archive["arr"][0], want, atol=1e-6)
    with pytest.raises(UserError, match=f"{stored}: no reading"):
        read_volume(stored)


def test_all_headers_are_checked_before_the_first_volume(tmp_path, folder):
    volumes, out = folder
    (tmp_path / "in" / "broken.nii.gz").write_bytes(b"nothing")
    write(tmp_path / "in" / "unlisted.nii", 5)
    table = metadata(tmp_path, [f"valid_{i}_a_1.nii.gz" for i in range(3)] + ["broken.nii.gz"], intercept=-8192)
    with pytest.raises(BadRecords) as caught:
        encode_folder(volumes, out, CONFIG, table, processes=1)
    assert [os.path.basename(p.where) for p in caught.value.problems] == ["broken.nii.gz", "unlisted.nii"]
    assert os.listdir(out) == []
    summary = encode_folder(volumes, out, CONFIG, table, on_bad_record="skip", processes=1)
    assert summary.written == 3 and len(summary.skipped) == 2
    with open(os.path.join(out, "skipped.jsonl"), encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    assert [os.path.basename(line["where"]) for line in lines] == ["broken.nii.gz", "unlisted.nii"]
    assert "not a readable NIfTI" in lines[0]["what"] and "no row" in lines[1]["what"]


def test_volume_without_air_stops_or_is_skipped(tmp_path, folder):
    volumes, out = folder
    bad = write(tmp_path / "in" / "aaa.nii.gz", 7, shift=500)
    with pytest.raises(BadRecords, match=r"aaa\.nii\.gz: no reading"):
        encode_folder(volumes, out, CONFIG, processes=1)
    summary = encode_folder(volumes, out, CONFIG, on_bad_record="skip", processes=1)
    assert [p.where for p in summary.skipped] == [bad] and summary.written == 3
    os.unlink(bad)
    encode_folder(volumes, out, CONFIG, processes=1)
    assert not os.path.exists(os.path.join(out, "skipped.jsonl"))


def test_names_must_differ_over_all_folders(tmp_path):
    write(tmp_path / "in" / "x" / "a.nii.gz", 1)
    write(tmp_path / "in" / "y" / "a.nii", 2)
    with pytest.raises(UserError, match=r"would both become a\.nii_embedded\.npz"):
        find_volumes(str(tmp_path / "in"))
    with pytest.raises(UserError, match="no such folder"):
        find_volumes(str(tmp_path / "nowhere"))
    os.makedirs(tmp_path / "empty")
    with pytest.raises(UserError, match=r"no \.nii"):
        find_volumes(str(tmp_path / "empty"))


CONFIG_FILE = """
from jaxmed.config import DecoderConfig, EncodeConfig, Experiment, ModelConfig, RopeConfig, VisualConfig

def get_config():
    decoder = DecoderConfig(vocab=40, width=16, layers=1, heads=2, kv_heads=1, head_dim=8, mlp=16, norm_eps=1e-5,
                            rope=RopeConfig(theta=1e4), max_positions=128)
    return Experiment(
        model=ModelConfig(decoder=decoder),
        visual=VisualConfig(tokens=18, features={features}, grid=(2, 3, 3), merge=(2, 2, 1)),
        encode=EncodeConfig(canvas=(24, 12, 8), spacing=(2.0, 2.0, 3.0), levels=(1, 2, 2)),
    )
"""


def test_command(tmp_path, folder, capsys):
    volumes, out = folder
    features = len(haar.band_names(CONFIG))
    config = tmp_path / "tiny.py"
    config.write_text(CONFIG_FILE.format(features=4 * features))
    assert command.run([str(config), "--volumes", volumes, "--out", out, "--processes", "1"]) == 0
    assert "3 volumes encoded" in capsys.readouterr().out
    assert command.run([str(config), "--volumes", volumes, "--out", out, "--hu", "header"]) == 0
    assert "3 were there already" in capsys.readouterr().out
    config.write_text(CONFIG_FILE.format(features=4 * features + 4))
    with pytest.raises(UserError, match=f"encode.bands gives {features} features"):
        command.run([str(config), "--volumes", volumes, "--out", out])


def test_a_signature_tells_whether_the_preprocessing_is_the_configs() -> None:
    published, other = EncodeConfig(), EncodeConfig(spacing=(0.75, 0.75, 3.0))
    assert same_preprocessing("", other), "an unsigned file says nothing"
    assert same_preprocessing("btb3d-16x16x8:0123456789ab z", published)
    assert not same_preprocessing("btb3d-16x16x8:0123456789ab", other)
    assert same_preprocessing("btb3d-8x8x8:0123456789ab spacing=0.75,0.75,3", other)
    assert same_preprocessing(haar.signature(other), other)
    assert not same_preprocessing(haar.signature(other), published)
