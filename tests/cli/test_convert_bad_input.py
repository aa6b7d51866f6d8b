"""Folders of whole vision-language models that are damaged: refused with every offender, and nothing is left half-written."""

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxmed.cli.main import run

GOLDEN = Path(__file__).parents[1] / "golden"
LAMED, MISTRAL = GOLDEN / "vit3d" / "lamed_merged", GOLDEN / "mistral_llava"
HEADS = ["--set", "vision.heads=3"]


def copied(source: Path, out: Path) -> Path:
    return Path(shutil.copytree(source, out, copy_function=shutil.copyfile))


def damaged(folder: Path, change) -> Path:
    """The folder with other tensors in its one file of weights."""
    path = folder / "model.safetensors"
    arrays = {name: np.array(x) for name, x in load_file(path).items()}
    change(arrays)
    save_file(arrays, path)
    return folder


def refused(source: Path, to: str, tmp_path: Path, capsys, *flags: str) -> str:
    """What is said; whatever was begun is gone."""
    before = set(os.listdir(tmp_path))
    out = str(tmp_path / "out")
    assert run(["convert", str(source), "--to", to, "--out", out, "--no-verify", *flags]) == 2
    assert set(os.listdir(tmp_path)) == before
    said = capsys.readouterr()
    assert said.out == ""
    return said.err


BLOCK = "model.vision_tower.vision_tower.blocks"


@pytest.mark.parametrize("to", ["orbax", "lamed"])
def test_tensors_that_do_not_fit_are_all_told(to, tmp_path, capsys):
    def change(arrays):
        del arrays[f"{BLOCK}.1.attn.qkv.weight"], arrays["model.mm_projector.projector.2.bias"]
        arrays[f"{BLOCK}.0.norm1.weight"] = np.ones(35, np.float32)
        arrays["model.layers.1.mlp.up_proj.weight"] = np.ones((53, 47), np.float32)
        arrays["model.something_else.weight"] = np.ones(3, np.float32)

    said = refused(damaged(copied(LAMED, tmp_path / "model"), change), to, tmp_path, capsys, *HEADS)
    for words in (
        f"{BLOCK}.1.attn.qkv.weight is missing (shape [108, 36])",
        "model.mm_projector.projector.2.bias is missing (shape [48])",
        f"{BLOCK}.0.norm1.weight: has shape [35], the model needs [36]",
        "model.layers.1.mlp.up_proj.weight: has shape [53, 47], the model needs [53, 48]",
        "model.something_else.weight: the model has no place for it",
    ):
        assert words in said, said


@pytest.mark.parametrize("to", ["orbax", "lamed"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_no_numbers(to, value, tmp_path, capsys):
    def change(arrays):
        arrays[f"{BLOCK}.2.mlp.linear1.weight"][3, 4] = value

    said = refused(damaged(copied(LAMED, tmp_path / "model"), change), to, tmp_path, capsys, *HEADS)
    assert f"{BLOCK}.2.mlp.linear1.weight" in said and str(tmp_path / "model") in said


def test_file_that_is_cut_off(tmp_path, capsys):
    folder = copied(LAMED, tmp_path / "model")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    assert "is cut off" in refused(folder, "lamed", tmp_path, capsys, *HEADS)


def test_shard_that_is_absent(tmp_path, capsys):
    folder = copied(MISTRAL / "llava_mistral_base", tmp_path / "model")
    (folder / "model-00002-of-00003.safetensors").unlink()
    said = refused(folder, "hf", tmp_path, capsys, "--tower", str(MISTRAL / "clip_small46"))
    assert "model-00002-of-00003.safetensors is missing" in said


class Payload:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_pickle_that_would_run_code(tmp_path, capsys):
    folder, trap = copied(GOLDEN / "vit3d" / "lamed_lora", tmp_path / "model"), tmp_path / "trap"
    (folder / "model_with_lora.bin").write_bytes(pickle.dumps({"model.embed_tokens.weight": Payload(trap)}, protocol=2))
    said = refused(folder, "orbax", tmp_path, capsys, *HEADS)
    assert "model_with_lora.bin" in said and not trap.exists()


def test_adapter_of_another_base(tmp_path, capsys):
    flags = ["--base", str(MISTRAL / "llava_mistral_short"), "--tower", str(MISTRAL / "clip_small46")]
    said = refused(MISTRAL / "llava_lora_mistral_tubes", "hf", tmp_path, capsys, *flags)
    assert "was not trained on the base" in said and "width 48 against 40" in said


def test_unknown_family_names_the_nearest(tmp_path, capsys):
    folder = copied(LAMED, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "lamed_lama"}))
    said = refused(folder, "lamed", tmp_path, capsys, *HEADS)
    assert "'lamed_lama' is not supported" in said and "lamed_llama" in said


def test_tied_head_that_is_stored_and_differs(tmp_path, capsys):
    folder = copied(LAMED, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    said = refused(folder, "orbax", tmp_path, capsys, *HEADS)
    assert "lm_head.weight: differs from model.embed_tokens.weight" in said


def test_tower_that_is_nowhere(tmp_path, capsys):
    def change(arrays):
        for name in [name for name in arrays if "vision_tower" in name]:
            del arrays[name]

    folder = damaged(copied(GOLDEN / "tinyllava" / "tinyllava_mini", tmp_path / "model"), change)
    said = refused(folder, "hf", tmp_path, capsys)
    assert "tower" in said and "--tower" in said
