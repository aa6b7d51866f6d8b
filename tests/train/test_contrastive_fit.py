"""Contrastive pretraining as a run: what its folder holds, going on, where weights start, and who reads it afterwards."""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from cubes import VOLUME, write
from safetensors.numpy import save_file

import jaxmed
from jaxmed.checkpoint import manager
from jaxmed.checkpoint.encoder_sources import open_bert
from jaxmed.checkpoint.hf_io import open_folder
from jaxmed.cli.validate import resolve
from jaxmed.config import (
    ContrastiveConfig,
    DataConfig,
    Experiment,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    ProjectorConfig,
    TextEncoderConfig,
    TrainConfig,
    VisualConfig,
)
from jaxmed.errors import UserError
from jaxmed.models.presets import NO_DECODER, TINY
from jaxmed.models.presets_towers import VIT3D
from jaxmed.sharding import make_mesh
from jaxmed.train.init import blueprint, flatten, start
from jaxmed.train.loop import fit
from jaxmed.train.writer import read_rows

GOLDEN = Path(__file__).parents[1] / "golden" / "vit3d"
TOWER = dataclasses.replace(
    VIT3D, image=VOLUME, patch=(4, 16, 16), width=16, layers=2, heads=4, mlp=20, select_feature="cls_patch"
)


def experiment(folder: Path) -> Experiment:
    """Batches of six in two chunks, the last of an epoch not full."""
    return Experiment(
        model=ModelConfig(NO_DECODER, tower=TOWER, dtype="float32", tokenizer=str(folder / "tokenizer")),
        visual=VisualConfig("volumes", tokens=TOWER.tokens, features=16, grid=TOWER.grid, volume=VOLUME),
        lora=LoraConfig(rank=0),
        optim=OptimConfig(learning_rate=2e-3, weight_decay=0.1, warmup_ratio=0.2),
        train=TrainConfig(epochs=2.0, seed=5, trainable="all", train_tower=True, save_every=3, keep=0, eval_every=4),
        data=DataConfig(
            records=str(folder / "few.json"),
            eval_records=str(folder / "few.json"),
            volumes=str(folder / "volumes"),
            batch=6,
            microbatches=2,
            max_length=13,
        ),
        task="contrastive",
        contrastive=ContrastiveConfig(
            TextEncoderConfig(vocab=32, width=24, layers=1, heads=3, mlp=28, positions=16), features=12, dropout=0.2
        ),
    )


@pytest.fixture(scope="module", autouse=True)
def compiled_quickly_and_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("programs")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.config.update("jax_compilation_cache_dir", None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seventeen pairs of cubes and captions, two of them with the same words."""
    folder = tmp_path_factory.mktemp("cubes")
    rows = json.loads(write(folder).read_text())[:17]
    rows[3]["text"] = rows[0]["text"]
    (folder / "few.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "clip"
    assert fit(experiment(folder), str(out), jax.devices()[:1]).steps == 6
    return out


def arrays(run: Path, step: int) -> dict[str, np.ndarray]:
    found = {}
    for item in ("trainable", "opt"):
        with manager.ocp.StandardCheckpointer() as reader:
            values = reader.restore(run.absolute() / "checkpoints" / str(step) / item)
        found |= {f"{item}/{name}": np.asarray(x) for name, x in values.items()}
    return found


def test_the_folder_of_a_run(run: Path):
    rows = read_rows(str(run / "metrics.jsonl"))
    steps, evaluations = ([row for row in rows if ("loss" in row) == wanted] for wanted in (True, False))
    shared = {"step", "loss", "learning_rate", "grad_norm", "data_wait", "seconds"}
    assert all(set(row) == shared | {"accuracy", "pairs", "pairs_per_second"} for row in steps)
    assert sorted(row["pairs"] for row in steps) == [5, 5, 6, 6, 6, 6]
    assert [row["step"] for row in evaluations] == [4, 6] and all(row["eval_pairs"] == 17 for row in evaluations)
    assert all(row["eval_i2t_same_r1"] >= row["eval_i2t_r1"] for row in evaluations)
    assert evaluations[0]["eval_t2i_r10"] <= 1 and (run / "tokenizer" / "tokenizer.json").exists()
    assert steps[0]["learning_rate"] == 0 and steps[2]["learning_rate"] == pytest.approx(2e-3)


def test_going_on_equals_not_stopping(run: Path, folder: Path, tmp_path: Path):
    """Bit for bit: order, dropout, sentences and moments."""
    again = tmp_path / "again"
    shutil.copytree(run, again)
    shutil.rmtree(again / "checkpoints" / "6")
    assert fit(experiment(folder), str(again), jax.devices()[:1]).resumed_from == 3
    wanted, found = arrays(run, 6), arrays(again, 6)
    assert wanted.keys() == found.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    losses = [[r["loss"] for r in read_rows(str(out / "metrics.jsonl")) if "loss" in r] for out in (run, again)]
    assert losses[0] == losses[1]


def test_it_loads_as_a_model_and_finds_what_the_run_found(run: Path, folder: Path):
    model = jaxmed.load(str(run), dtype="float32", mesh=make_mesh(MeshConfig(1), jax.devices()[:1]))
    rows = json.loads((folder / "few.json").read_text())
    images, texts = [str(folder / "volumes" / row["image"]) for row in rows], [row["text"] for row in rows]
    plain, same = (model.retrieval(images, texts, identity=identity) for identity in (False, True))
    last = read_rows(str(run / "metrics.jsonl"))[-1]
    for k in (1, 5, 10):
        assert plain[f"i2t_r{k}"] == pytest.approx(last[f"eval_i2t_r{k}"])
        assert same[f"t2i_r{k}"] == pytest.approx(last[f"eval_t2i_same_r{k}"])
    assert plain.ranking_i2t.shape == (17, 17)
    with pytest.raises(UserError, match="17 images for 16 texts"):
        model.retrieval(images, texts[:-1])


def test_its_tower_is_a_models(run: Path, folder: Path):
    """The run decides the tower's sizes; its weights are what the model starts from, and a flag that disagrees is refused."""
    model = ModelConfig(TINY, projector=ProjectorConfig("spp"), tower_folder=str(run), dtype="float32", tower=VIT3D)
    asked = Experiment(
        dataclasses.replace(model, tokenizer=str(folder / "tokenizer")),
        VisualConfig("volumes", tokens=2048, features=768, grid=(8, 16, 16)),
        LoraConfig(rank=0),
        train=TrainConfig(steps=1, trainable="all", remat="none"),
        data=DataConfig(records=str(folder / "few.json"), volumes=str(folder / "volumes"), batch=1, buckets=(64,)),
    )
    found, _ = resolve(asked, ())
    assert found.model.tower == dataclasses.replace(TOWER, select_feature="patch")
    assert (found.visual.volume, found.visual.grid, found.visual.tokens) == (VOLUME, (2, 2, 2), 8)
    with jax.set_mesh(mesh := make_mesh(MeshConfig(1), jax.devices()[:1])):
        plan = blueprint(found, mesh)
        _, frozen = start(plan)
    saved = arrays(run, 6)
    towers = {"/".join(map(str, path)): np.asarray(x) for path, x in flatten(frozen).items() if path[0] == "tower"}
    assert len(towers) == sum(name.startswith("trainable/tower/") for name in saved)
    for name, value in towers.items():
        np.testing.assert_array_equal(value, saved[f"trainable/{name}"], err_msg=name)
    other = dataclasses.replace(asked, model=dataclasses.replace(asked.model, tower=dataclasses.replace(VIT3D, width=32)))
    with pytest.raises(UserError, match=r"--model\.tower\.width 32 disagrees"):
        resolve(other, {"model.tower.width"})


def test_weights_start_from_folders(folder: Path):
    """BERT from its own folder, the tower and all else from M3D-CLIP's."""
    asked = experiment(folder)
    places = {"records": f"{GOLDEN}/data/M3D_Cap_npy/M3D_Cap.json:train", "eval_records": "", "volumes": str(GOLDEN / "data")}
    asked = dataclasses.replace(asked, data=dataclasses.replace(asked.data, **places))
    clip, bert = str(GOLDEN / "m3d_clip"), str(GOLDEN / "bert_tiny")
    model = dataclasses.replace(asked.model, base=clip, tokenizer="")
    both = dataclasses.replace(
        asked, model=model, contrastive=dataclasses.replace(asked.contrastive, text_folder=bert, dropout=0.0)
    )
    found, notices = resolve(both, ())
    assert (found.model.tower.width, found.contrastive.text.mlp, found.contrastive.features) == (30, 44, 30)
    assert found.model.tokenizer == bert and notices[0] == f"tower: 5 fields from {bert} and {clip}"
    with jax.set_mesh(mesh := make_mesh(MeshConfig(1), jax.devices()[:1])):
        values = {"/".join(map(str, path)): np.asarray(x) for path, x in flatten(start(blueprint(found, mesh))[0]).items()}
    clip_tensors, bert_tensors = open_folder(clip).arrays, open_folder(bert).arrays
    np.testing.assert_array_equal(values["logit_scale"], clip_tensors["logit_scale"])
    np.testing.assert_array_equal(values["tower/norm/scale"], clip_tensors["vision_encoder.norm.weight"])
    name = "encoder.layer.1.output.dense.weight"
    assert not np.array_equal(bert_tensors[name], clip_tensors[f"language_encoder.{name}"])
    np.testing.assert_array_equal(values["text/blocks/mlp/down/weight"][1], bert_tensors[name])
    with pytest.raises(UserError, match="is no M3D-CLIP model"):
        resolve(dataclasses.replace(asked, model=dataclasses.replace(model, base=str(GOLDEN / "base"))), ())
    with pytest.raises(UserError, match="no tokenizer"):
        resolve(dataclasses.replace(asked, model=dataclasses.replace(asked.model, tokenizer="")), ())


def test_old_bert_files(tmp_path: Path):
    """LayerNorm's parameters are gamma and beta there, `bert.` stands before all, and heads stand beside."""
    tensors = {}
    for name, array in open_folder(str(GOLDEN / "bert_tiny")).arrays.items():
        for new, old in ((".weight", ".gamma"), (".bias", ".beta")):
            if "LayerNorm" in name:
                name = name.replace(new, old)
        tensors[f"bert.{name}"] = np.array(array)
    tensors["cls.predictions.bias"] = np.zeros(131, np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    found, wanted = open_bert(str(tmp_path)), open_bert(str(GOLDEN / "bert_tiny"))
    assert set(found.names()) - set(wanted.names()) == {"language_encoder.cls.predictions.bias"}
    for name in wanted.names():
        np.testing.assert_array_equal(found.arrays[name], wanted.arrays[name])
    assert found.where("language_encoder.embeddings.LayerNorm.weight").startswith(str(tmp_path / "model.safetensors"))
    with pytest.raises(UserError, match="holds no BERT"):
        open_bert(str(GOLDEN / "base"))
