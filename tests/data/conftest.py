"""A small data set on disk, shared by the tests that only read it."""

import shutil

import pytest
from small_data import make_records, make_volumes

from jaxmed.data import inputs


@pytest.fixture(autouse=True)
def nothing_told_yet(monkeypatch):
    """A process tells only so many notices, each once."""
    monkeypatch.setattr(inputs, "_NOTICES", inputs._Notices())


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    make_volumes(path / "tokens", 5)
    make_records(path / "r.json", 40, 5)
    return path


@pytest.fixture
def own(folder, tmp_path):
    """A copy that a test may spoil."""
    shutil.copytree(folder / "tokens", tmp_path / "tokens")
    shutil.copy(folder / "r.json", tmp_path / "r.json")
    return tmp_path
