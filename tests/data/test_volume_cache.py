"""Prepared volumes on disk: nothing old is used again, filling goes on where it stopped, one bad volume is told."""

import ast
import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from scans import edited, lps_affine, phantom, save_dicom, save_nifti

from jaxmed.config import PrepareConfig, VisualConfig
from jaxmed.data import volume_cache
from jaxmed.data.inputs import read_input
from jaxmed.data.prepare import prepare
from jaxmed.data.volume_cache import fill_cache, place_of, prepared
from jaxmed.errors import BadRecords, Notice, UserError

HU = phantom()


def visual(folder, volume=(4, 5, 6), **fields):
    settings = {"preset": "hu_window", "window": (-160.0, 240.0), "cache": str(folder)} | fields
    return VisualConfig(kind="volumes", volume=volume, prepare=PrepareConfig(**settings))


@pytest.fixture
def scan(tmp_path):
    return save_nifti(tmp_path / "scan.nii.gz", HU, lps_affine())


@pytest.fixture
def counted(monkeypatch):
    """Paths that were prepared and not taken from the cache."""
    seen = []
    monkeypatch.setattr(volume_cache, "prepare", lambda path, visual: seen.append(path) or prepare(path, visual))
    return seen


def test_a_volume_is_prepared_once(tmp_path, scan, counted):
    config = visual(tmp_path / "cache")
    first, second = prepared(scan, config), prepared(scan, config)
    assert counted == [scan]
    np.testing.assert_array_equal(first.values, second.values)
    assert (first.frame, first.notices) == (second.frame, second.notices)
    np.testing.assert_array_equal(read_input(scan, config).values, prepare(scan, config).values)
    assert np.load(place_of(scan, config)).shape == (4, 5, 6)
    assert sorted(name.rpartition(".")[2] for name in os.listdir(tmp_path / "cache")) == ["json", "npy"]


def test_threads_parse_headers_one_at_a_time(tmp_path, scan, monkeypatch):
    """CPython 3.11 counts the recursion of its parser for all threads together, and fails where two parse at once."""
    config = visual(tmp_path / "cache")
    wanted = prepared(scan, config).values
    inside, most, parse = [], [], ast.literal_eval

    def slow(text):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.005)
        inside.pop()
        return parse(text)

    monkeypatch.setattr(ast, "literal_eval", slow)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: prepared(scan, config).values, range(16)))
    assert len(most) == 16 and max(most) == 1
    np.testing.assert_array_equal(found[-1], wanted)


def test_whatever_changes_nothing_old_is_used_again(tmp_path, scan, counted, monkeypatch):
    cache = tmp_path / "cache"
    config = visual(cache)
    prepared(scan, config)
    table = tmp_path / "m.csv"
    head = "VolumeName,RescaleSlope,RescaleIntercept,XYSpacing,ZSpacing\nscan.nii.gz,1,-8192,1,2\n"
    table.write_text(head)
    changed = [
        visual(cache, window=(-160.0, 241.0)),
        visual(cache, crop=False),
        visual(cache, preset="m3d"),
        visual(cache, axes="zyx"),
        visual(cache, hu="header"),
        visual(cache, metadata=str(table)),
        visual(cache, volume=(4, 6, 5)),
    ]
    for number, other in enumerate(changed, 2):
        want = prepare(scan, other).values
        np.testing.assert_array_equal(prepared(scan, other).values, want)
        assert len(counted) == number
    table.write_text(head + "other.nii.gz,1,0,1,2\n")  # another volume's row
    prepared(scan, changed[5])
    prepared(scan, visual(cache, augment="intensity"))
    assert len(counted) == 8
    table.write_text(head.replace("-8192", "-8190"))
    os.utime(table, ns=(1, 1))
    prepared(scan, changed[5])
    assert len(counted) == 9
    save_nifti(scan, HU + 3, lps_affine())
    os.utime(scan, ns=(2, 2))
    np.testing.assert_array_equal(prepared(scan, config).values, prepare(scan, config).values)
    assert len(counted) == 10
    monkeypatch.setattr(volume_cache, "VERSION", "next")
    prepared(scan, config)
    assert len(counted) == 11


def test_one_changed_slice_of_a_series_is_seen(tmp_path, counted):
    folder = save_dicom(tmp_path / "d", HU)
    config = visual(tmp_path / "cache")
    before = prepared(folder, config).values
    path = os.path.join(folder, sorted(os.listdir(folder))[4])
    edited(path, RescaleIntercept=-1000)
    assert np.abs(prepared(folder, config).values - before).max() > 0.01 and len(counted) == 2


def test_damaged_arrays_are_made_again(tmp_path, scan, counted):
    config = visual(tmp_path / "cache")
    want = prepared(scan, config).values
    place = place_of(scan, config)
    with open(place, "r+b") as file:
        file.truncate(200)
    np.testing.assert_array_equal(prepared(scan, config).values, want)
    os.unlink(place.removesuffix(".npy") + ".json")
    np.testing.assert_array_equal(prepared(scan, config).values, want)
    assert len(counted) == 3


def volumes(folder):
    """Eight volumes; number 3 is air, number 7 is missing."""
    paths = [str(folder / f"v{i}.nii") for i in range(8)]
    for number, path in enumerate(paths[:7]):
        save_nifti(path, HU + number if number != 3 else np.full((4, 5, 6), -1000, np.int16), lps_affine())
    return paths


def test_filling_in_two_processes_goes_on_and_lists_what_cannot_be_used(tmp_path, capfd):
    paths, config = volumes(tmp_path), visual(tmp_path / "cache")
    np.save(tmp_path / "ready.npy", np.zeros((4, 5, 6), np.float32))
    some = fill_cache(paths[:2], config, processes=1, progress=False)
    assert (some.written, some.present, some.problems) == (2, 0, ()) and capfd.readouterr().err == ""
    every = [*paths, paths[0], str(tmp_path / "ready.npy")]
    filled = fill_cache(every, config, processes=2, on_bad_record="skip")
    assert (filled.written, filled.present) == (4, 3)
    assert [(p.where, p.what.split(":")[0]) for p in filled.problems] == [
        (paths[7], "no such file; check the folder of the volumes"),
        (paths[3], "nothing but air"),
    ]
    assert "Preparing volumes" in capfd.readouterr().err
    for number in (0, 1, 2, 4, 5, 6):
        np.testing.assert_array_equal(np.load(place_of(paths[number], config)), prepare(paths[number], config).values[..., 0])
    assert len(filled.lines()) == 3 and "4 prepared" in filled.lines()[0]
    with pytest.raises(BadRecords, match=r"v7\.nii: no such file"):
        fill_cache(paths, config, progress=False)
    with pytest.raises(BadRecords, match=r"v3\.nii: nothing but air"):
        fill_cache(paths[:7], config, 1, progress=False)
    assert not [name for name in os.listdir(tmp_path / "cache") if name.endswith(".part")]


def test_notices_are_counted(tmp_path):
    folders = [save_dicom(tmp_path / name, HU) for name in ("a", "b")]
    filled = fill_cache(folders, visual(tmp_path / "cache"), 1, progress=False)
    assert list(filled.notices.values()) == [2] and "2 x slices of 5 mm" in filled.lines()[1]


def test_no_folder_and_one_that_cannot_be_written(tmp_path, scan):
    with pytest.raises(UserError, match=r"set visual\.prepare\.cache"):
        fill_cache([scan], visual(""))
    (tmp_path / "file").write_text("")
    config = visual(tmp_path / "file" / "cache")
    for rule in ("stop", "skip"):  # no volume's fault, so none is left out
        with pytest.raises(UserError, match=r"prepared volumes cannot be kept there .*; free space, or give another"):
            fill_cache([scan], config, 1, False, rule)
    with pytest.warns(Notice, match=r"prepared volumes cannot be kept there .*; going on without it"):
        np.testing.assert_array_equal(read_input(scan, config).values, prepare(scan, config).values)


def test_what_a_killed_process_left_is_cleared_away(tmp_path, scan):
    config = visual(tmp_path / "cache")
    place = place_of(scan, config)
    (tmp_path / "cache").mkdir()
    for name, hours in (("killed", 30), ("running", 1)):
        (tmp_path / "cache" / f"{name}.part").write_bytes(b"half")
        os.utime(tmp_path / "cache" / f"{name}.part", (time.time() - 3600 * hours,) * 2)
    assert fill_cache([scan], config, 1, False).written == 1
    assert sorted(os.listdir(tmp_path / "cache")) == sorted(
        [os.path.basename(place), os.path.basename(place).replace(".npy", ".json"), "running.part"]
    )


def test_many_different_notices_are_not_listed_each():
    filled = volume_cache.Filled(30, 0, (), {f"hole after {n}.png": 1 for n in range(29)} | {"overlap": 7}, 1.0)
    lines = filled.lines()
    assert len(lines) == 22 and lines[1] == "volumes: 7 x overlap" and "10 other notices" in lines[-1]
