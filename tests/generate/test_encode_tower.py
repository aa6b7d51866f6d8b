"""Token files of a 3-D tower: training from them equals training from volumes, resuming, problems, the command."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import nibabel
import numpy as np
import pytest
import tyro

from jaxmed import api
from jaxmed.checkpoint.encoder_folders import open_encoder
from jaxmed.checkpoint.manager import Checkpoints
from jaxmed.cli import common, train
from jaxmed.cli import encode as command
from jaxmed.cli.configured import configured
from jaxmed.cli.validate import given_flags, resolve
from jaxmed.config import LoraConfig, MeshConfig, PrepareConfig, to_json
from jaxmed.data.dataset import scan
from jaxmed.data.embeddings import read_header
from jaxmed.data.tokenizer import Tokenizer
from jaxmed.errors import BadRecords, UserError
from jaxmed.generate import encode_tower
from jaxmed.generate.tower import Tower, check_signature, of_encoder
from jaxmed.sharding import make_mesh, replicated
from jaxmed.types import TrainState

VIT3D = Path(__file__).parents[1] / "golden" / "vit3d"
LAMED, CLIP = str(VIT3D / "lamed_merged"), str(VIT3D / "m3d_clip")
VOLUMES = VIT3D / "data" / "M3D_Cap_npy"
HEADS = {"vision.heads": 3}
QUESTION = "What does the scan show?"


@pytest.fixture(scope="module")
def experiment():
    return api.resolve(LAMED, "", "float32", HEADS)


@pytest.fixture(scope="module")
def tower(experiment):
    return Tower(experiment, "float32", devices=jax.devices()[:2])


@pytest.fixture(scope="module")
def tokens(tower, tmp_path_factory):
    out = tmp_path_factory.mktemp("tokens")
    return out, encode_tower.encode_folder(str(VOLUMES), str(out), tower)


def names():
    return sorted(str(path.relative_to(VOLUMES)) for path in VOLUMES.rglob("*.npy"))


def test_training_from_tokens_equals_training_from_volumes(tokens):
    out, summary = tokens
    assert summary.written == len(names()) == 4
    records = []
    for number, name in enumerate(names()):
        turns = [("human", f"<image>{QUESTION}"), ("gpt", f"Finding {number}, no effusion.")]
        records.append({"id": name, "image": name, "conversations": [{"from": who, "value": text} for who, text in turns]})
    runs, ran = [], []
    for kind, folder in (("volumes", VOLUMES), ("embeddings", out)):
        overrides = HEADS | {"visual.kind": kind, "train.train_tower": "false"}
        model = api.load(LAMED, mesh=make_mesh(MeshConfig(), jax.devices()[:1]), dtype="float32", overrides=overrides)
        runs.append(model.loss(records, gradients=True, folder=str(folder)))
        ran.append("tower" in model._halves[1])
    assert ran == [True, False]
    volumes, embeddings = runs
    assert volumes.token_count == embeddings.token_count > 20
    np.testing.assert_allclose(embeddings.loss, volumes.loss, rtol=1e-6)
    assert volumes.gradients.keys() == embeddings.gradients.keys()
    projector = [name for name in volumes.gradients if "mm_projector" in name]
    assert len(projector) == 4
    for name in projector:
        scale = np.abs(volumes.gradients[name]).max()
        np.testing.assert_allclose(embeddings.gradients[name], volumes.gradients[name], atol=1e-5 * scale)
        assert scale > 1e-4


def test_files_stay_and_another_tower_is_refused(tokens, tower, experiment, tmp_path):
    out, _ = tokens
    shutil.copytree(out, tmp_path / "t")
    first, second, *_ = sorted((tmp_path / "t").rglob("*.npz"))
    before = first.stat().st_mtime_ns
    second.write_bytes(second.read_bytes()[:200])
    again = encode_tower.encode_folder(str(VOLUMES), str(tmp_path / "t"), tower)
    assert (again.written, again.present) == (1, 3) and first.stat().st_mtime_ns == before
    assert read_header(str(second)) == replace(read_header(str(out / second.relative_to(tmp_path / "t"))), path=str(second))
    # other heads are another tower, though every tensor is the same
    heads = replace(experiment.model.tower, heads=4)
    other = Tower(replace(experiment, model=replace(experiment.model, tower=heads)), "float32", devices=jax.devices()[:1])
    with pytest.raises(UserError, match=r"was written by vit3d-.*, this is vit3d-"):
        encode_tower.encode_folder(str(VOLUMES), str(tmp_path / "t"), other)


def test_signature_says_how_volumes_were_prepared(tower):
    def signed(**fields):
        return encode_tower.preparation(replace(tower.visual, prepare=replace(tower.visual.prepare, **fields)))

    assert encode_tower.signature(tower) == f"vit3d-{tower.fingerprint} m3d@2 8x24x21"
    assert signed(preset="hu_window", window=(-160.0, 240.0)) == "hu_window@2 8x24x21 window=-160,240"
    # what makes no difference to a preset, or to any volume, makes none to the signature
    assert signed(window=(-5.0, 5.0), cache="x", augment="intensity") == signed()


def test_half_the_space(tokens, tower, tmp_path):
    out, _ = tokens
    summary = encode_tower.encode_folder(str(VOLUMES), str(tmp_path), tower, store="float16")
    assert summary.written == 4
    for path in tmp_path.rglob("*.npz"):
        full, half = (np.load(p)["arr"] for p in (out / path.relative_to(tmp_path), path))
        assert half.dtype == np.float16 and full.dtype == np.float32 and half.shape == (1, 36, 4, 6, 7)
        np.testing.assert_allclose(half, full, rtol=1e-3, atol=1e-6)


def test_a_contrastive_folder_gives_patches_without_the_class_token():
    found = open_encoder(CLIP, {"vision.heads": 5, "text.heads": 3})
    made = Tower(of_encoder(CLIP, {"vision.heads": 5, "text.heads": 3}), "float32", devices=jax.devices()[:1])
    model = api.load(CLIP, dtype="float32", overrides={"vision.heads": 5, "text.heads": 3})
    path = str(VOLUMES / names()[0])
    tokens = made(model.preprocess(path)[None])
    assert tokens.shape == (1, 24, 30) and found.tower.select_feature == "cls_patch"
    np.testing.assert_allclose(tokens[0], model.tower_features([path])[0][1:], atol=1e-5)


def test_problems_are_told_together_and_the_rest_goes_on(tower, tmp_path):
    volumes, out = tmp_path / "v", tmp_path / "o"
    (volumes / "sub").mkdir(parents=True)
    shutil.copy(VOLUMES / names()[0], volumes / "sub" / "good.npy")
    np.save(volumes / "thin.npy", np.zeros((1, 8, 24, 20), np.float32))
    np.save(volumes / "nan.npy", np.full((1, 8, 24, 21), np.nan, np.float32))
    nibabel.save(nibabel.Nifti1Image(np.full((9, 8, 7), -1000, np.int16), np.eye(4)), volumes / "air.nii.gz")
    with pytest.raises(BadRecords, match=r"thin.npy: shape \(1, 8, 24, 20\)"):
        encode_tower.encode_folder(str(volumes), str(out), tower)
    summary = encode_tower.encode_folder(str(volumes), str(out), tower, on_bad_record="skip")
    assert summary.written == 1 and (out / "sub" / "good.nii_embedded.npz").is_file()
    told = {Path(p.where).name: p.what for p in summary.skipped}
    assert told.keys() == {"thin.npy", "nan.npy", "air.nii.gz"} and "nothing but air" in told["air.nii.gz"]
    assert len((out / "skipped.jsonl").read_text().splitlines()) == 3
    shutil.copy(volumes / "nan.npy", volumes / "air.npy")
    with pytest.raises(UserError, match=r"would both become air\.nii_embedded\.npz"):
        encode_tower.names_below(str(volumes))


def test_the_command(tmp_path, capsys):
    flags = ["--volumes", str(VOLUMES), "--out", str(tmp_path / "t"), "--set", "vision.heads=3"]
    assert command.run([LAMED, *flags]) == 0
    said = capsys.readouterr()
    assert "4 volumes encoded" in said.out and "preparation of 4: prepared before" in said.out
    assert f"--visual.kind embeddings --data.embeddings {tmp_path / 't'} --no-train.train-tower" in said.out
    assert "Each volume: 8 x 24 x 21 voxels (m3d) to tokens (1, 36, 4, 6, 7), 0.024 MB as float32" in said.err
    with pytest.raises(UserError, match=r"was written by vit3d-.* m3d@2.*, this is vit3d-.* hu_window@2"):
        command.run([LAMED, *flags, "--visual.prepare.preset", "hu_window"])
    with pytest.raises(UserError, match="--encoder, --codes belong to BTB3D's encoder"):
        command.run([LAMED, *flags, "--encoder", "x.ckpt", "--codes"])
    with pytest.raises(UserError, match="--tower, --store belong to a config with an image tower, which btb3d has not"):
        command.run(["btb3d", *flags[:4], "--tower", CLIP, "--store", "float16"])
    with pytest.raises(UserError, match="has no image tower"):
        command.run([str(VIT3D / "base"), *flags[:4]])


def made_run(folder, experiment, encoder):
    """A run that was trained on tokens, without the training: a projector's bias is all that it holds."""
    folder.mkdir()
    (folder / "config.json").write_text(to_json(experiment))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    trainable = {"projector": {"layers": {"0": {"bias": jax.device_put(np.zeros(48, np.float32), replicated(mesh, 1))}}}}
    checkpoints = Checkpoints(str(folder), 1)
    checkpoints.save(
        TrainState(jax.device_put(np.int32(3), replicated(mesh)), trainable, trainable), {"step": 3, "encoder": encoder}
    )
    checkpoints.close()
    return str(folder)


def test_what_goes_on_from_a_run_on_tokens(experiment, tower, tmp_path):
    records = tmp_path / "r.json"
    records.write_text("[]")
    # as a config and a tower folder would have it: the language model is not the whole LaMed, which has a tower itself
    model = replace(experiment.model, base=str(VIT3D / "base"), tower_folder=CLIP, tokenizer=LAMED)
    data = replace(experiment.data, records=str(records))
    tuned = replace(experiment.train, train_tower=True)
    given = replace(experiment, model=model, data=data, train=tuned, lora=LoraConfig(rank=4))
    on_tokens = replace(given, visual=replace(given.visual, kind="embeddings"), model=replace(model, tower_folder=""))
    run = made_run(tmp_path / "run", on_tokens, encode_tower.signature(tower))

    on, _ = resolve(replace(given, model=replace(model, adapter=run)), ())
    assert on.has_tower and on.visual.kind == "volumes" and on.visual.encoder == ""
    tokens = replace(on_tokens, model=replace(on_tokens.model, adapter=run), train=replace(tuned, train_tower=False))
    on, _ = resolve(tokens, ("visual.kind",))
    assert not on.has_tower and on.visual.encoder == encode_tower.signature(tower)
    with pytest.raises(UserError, match=r"train\.train_tower: visual\.kind is embeddings"):
        resolve(replace(tokens, train=tuned), ("visual.kind",))

    # the tower that it saw is known by its signature, wherever it lies now
    found = configured(run, "", LAMED, {}, [], "encode").experiment
    assert found.model.tower_folder == LAMED and found.visual.encoder == encode_tower.signature(tower)
    check_signature(tower, found, "run")
    with pytest.raises(UserError, match=r"run: was trained on tokens of vit3d-.*, this tower is vit3d-"):
        heads = replace(found.model.tower, heads=4)
        check_signature(Tower(replace(found, model=replace(found.model, tower=heads)), "float32"), found, "run")


def test_what_encode_says_is_what_training_takes(tmp_path, capsys):
    """A shipped config with a folder of another size: its folder decides, and the flags that are printed suffice."""
    out = str(tmp_path / "tokens")
    line = ["vit3d_align", "--volumes", str(VOLUMES), "--out", out, "--tower", CLIP, "--set", "vision.heads=5"]
    assert command.run(line) == 0
    flags = capsys.readouterr().out.splitlines()[-1].partition("frozen: ")[2].split()
    turns = [{"from": "human", "value": "Report."}, {"from": "gpt", "value": "No effusion."}]
    rows = [{"id": name, "image": name, "conversations": turns} for name in names()]
    (tmp_path / "r.json").write_text(json.dumps(rows))
    flags += ["--model.base", str(VIT3D / "base"), "--data.records", str(tmp_path / "r.json")]
    args = common.parse(train.Args, [*flags, "--out", "x"], prog="", description="", default=asked_of("vit3d_align"))
    found, _ = resolve(args.experiment, given_flags(flags))
    assert (found.visual.kind, found.visual.features, found.visual.grid) == ("embeddings", 30, (2, 4, 3))
    assert not found.has_tower and found.visual.tokens == 24
    assert len(scan(found, Tokenizer.from_folder(found.model.base, found.model.added_tokens), found.data.records).samples) == 4


def asked_of(config):
    return train.Args(common.load_experiment(config), out=tyro.MISSING)


def test_a_run_says_how_volumes_are_prepared_and_not_how_they_are_varied(experiment, tmp_path):
    prepare = PrepareConfig(preset="hu_window", window=(-160.0, 240.0), augment="none", cache="theirs")
    made_run(tmp_path / "run", replace(experiment, visual=replace(experiment.visual, prepare=prepare)), "")
    own = PrepareConfig(preset="amos_challenge", augment="intensity", cache=str(tmp_path), index=2)
    asked = common.load_experiment("vit3d_amos")
    data = replace(asked.data, records=str(VIT3D / "case.json"))
    model = replace(asked.model, base=str(VIT3D / "base"), adapter=str(tmp_path / "run"))
    asked = replace(asked, model=model, data=data, visual=replace(asked.visual, prepare=own))
    found = resolve(asked, frozenset())[0].visual.prepare
    assert (found.preset, found.window) == ("hu_window", (-160, 240))
    assert (found.augment, found.cache, found.index) == ("intensity", str(tmp_path), 2)
    # reports of regions are longer than what the alignment was trained on
    longer = replace(asked, data=replace(data, max_length=1024, buckets=(1024,)))
    assert resolve(longer, frozenset())[0].data.max_length == 1024 != experiment.data.max_length


def test_a_whole_model_is_no_base_of_a_config():
    with pytest.raises(UserError, match=r"lamed_merged: is a whole model, .* in the config's place"):
        configured("vit3d_amos", LAMED, "", {}, [], "view")
