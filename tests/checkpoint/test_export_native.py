"""The native form: every parameter of a model in one checkpoint, the same bits on any mesh, and a start for training."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from small_runs import BASE, GOLDEN, ROPE, golden_experiment, run_from_scratch, save_run
from tiny_llama import save_llama

import jaxmed
from jaxmed.api import resolve
from jaxmed.checkpoint import load, manager
from jaxmed.checkpoint.adapter import chain, run_experiment
from jaxmed.checkpoint.export_folder import write_export
from jaxmed.checkpoint.hf_io import open_folder
from jaxmed.checkpoint.orbax_export import mesh_for, plan_native
from jaxmed.checkpoint.values import Values
from jaxmed.cli.validate import resolve as resolve_run
from jaxmed.config import Experiment, LoraConfig, MeshConfig
from jaxmed.errors import UserError
from jaxmed.sharding import make_mesh
from jaxmed.train import loop
from jaxmed.train.init import blueprint, flatten, materialise

ZERO3 = str(GOLDEN / "llava_lora_z3" / "checkpoint-10")
IMAGE = str(GOLDEN / "embeddings" / "valid_34_b_1.nii_embedded.npz")
PROMPT = "<image>\nDescribe the lungs.<report_generation>"
AUTO, ONE, ODD = MeshConfig(), MeshConfig(data=1), MeshConfig(data=1, fsdp=3, context=1, tensor=2)


pytestmark = pytest.mark.usefixtures("compiled_quickly")


def source(folder: str = ZERO3, base: str = BASE) -> Experiment:
    return resolve(folder, base, "float32", {"visual.tokens": 30})


def convert(out: Path, dtype=None, merge: bool = False, folder: str = ZERO3, base: str = BASE, mesh=AUTO) -> str:
    plan = plan_native(source(folder, base) if folder == ZERO3 else resolve(folder, base, "float32", {}), dtype, merge)
    write_export(plan, folder, str(out), 0, mesh, lambda text: None)
    return str(out)


def on_devices(mesh: MeshConfig, monkeypatch) -> None:
    """Conversion takes all devices of a job; here as many as the mesh has."""
    count = mesh.data * mesh.fsdp * mesh.context * mesh.tensor
    found = jax.devices()[:count]
    monkeypatch.setattr(jax, "devices", lambda *_: found)


def parameters(experiment: Experiment, config: MeshConfig) -> dict[str, jax.Array]:
    """Every parameter, float32, on a mesh."""
    count = config.data * config.fsdp * config.context * config.tensor
    mesh = make_mesh(config, jax.devices()[:count])
    data = dataclasses.replace(experiment.data, batch=config.data * config.fsdp, microbatches=1, buckets=(2 * config.context,))
    with jax.set_mesh(mesh):
        plan = blueprint(dataclasses.replace(experiment, data=data), mesh)
        found = materialise(plan.experiment, flatten(plan.trainable) | flatten(plan.frozen), complete=True)
    return {"/".join(map(str, path)): array for path, array in found.items()}


def assert_same(one: dict[str, jax.Array], two: dict[str, jax.Array]) -> None:
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_array_equal(np.asarray(one[name]), np.asarray(two[name]), err_msg=name)


@pytest.fixture(scope="module")
def native(tmp_path_factory) -> str:
    return convert(tmp_path_factory.mktemp("native") / "model")


def test_folder_needs_no_other(native, tmp_path):
    moved = shutil.copytree(native, tmp_path / "moved")
    found = run_experiment(str(moved))
    assert (found.model.base, found.model.adapter, found.model.tokenizer) == ("", "", "")
    assert (found.lora.rank, found.lora.alpha) == (3, 7.0) and found.train.train_embed_tokens
    assert_same(parameters(source(), ONE), parameters(resolve(str(moved), "", "float32", {}), ONE))
    ours, theirs = (
        jaxmed.load(str(moved), dtype="float32"),
        jaxmed.load(ZERO3, BASE, dtype="float32", overrides={"visual.tokens": 30}),
    )
    got, want = (model.logits([IMAGE], [PROMPT])[0] for model in (ours, theirs))
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert ours.tokenizer.fingerprint == theirs.tokenizer.fingerprint and ours.engine.limits == theirs.engine.limits


def test_written_on_one_mesh_and_read_on_another(tmp_path, monkeypatch):
    save_llama(tmp_path / "llama", tie_word_embeddings=False, intermediate_size=62)
    monkeypatch.setattr(load, "_PIECE_BYTES", 3000)  # so that a few rows, or one layer, are read at a time
    llama = str(tmp_path / "llama")
    with monkeypatch.context() as patch:
        on_devices(ODD, patch)
        odd = resolve(convert(tmp_path / "odd", folder=llama, base="", mesh=ODD), "", "float32", {})
    whole = parameters(resolve(llama, "", "float32", {}), ONE)
    assert_same(whole, parameters(odd, ONE))
    split = parameters(odd, MeshConfig(data=1, fsdp=2, context=2, tensor=2))
    assert_same(whole, split)
    up = split["decoder/blocks/mlp/up/weight"]
    assert up.sharding.shard_shape(up.shape) == (up.shape[0], up.shape[1] // 2, up.shape[2] // 2)


def test_every_device_that_divides_is_used_where_no_mesh_was_asked_for():
    assert dict(mesh_for(source(), MeshConfig()).shape)["fsdp"] == 1  # 143 rows of the MLP, which its adapters split
    plain = dataclasses.replace(source(), lora=LoraConfig(rank=0))
    assert dict(mesh_for(plain, MeshConfig()).shape)["fsdp"] == 2  # of 8 devices, for a width of 54


def test_dtypes_are_the_files_or_the_one_asked_for(native, tmp_path):
    leaves = manager.trainable_leaves(native, 0)
    assert {leaf.dtype.name for leaf in leaves.values()} == {"float32"}
    half = convert(tmp_path / "half", np.dtype(ml_dtypes.bfloat16))
    assert {leaf.dtype.name for leaf in manager.trainable_leaves(half, 0).values()} == {"bfloat16"}
    assert run_experiment(half).model.dtype == "bfloat16"
    array = Values(resolve(half, "", "float32", {})).read(("decoder", "blocks", "mlp", "up", "weight"), 2)
    stored = open_folder(BASE).arrays["model.layers.2.mlp.up_proj.weight"]
    assert array.tobytes() == stored.astype(ml_dtypes.bfloat16).tobytes()
    with pytest.raises(UserError, match=r"--out .* exists already"):
        convert(tmp_path / "half")


def test_merged_weights_are_rounded_once(tmp_path):
    """The base's float32 is not rounded before the adapter is added."""
    merged = Values(resolve(convert(tmp_path / "half", ml_dtypes.bfloat16, merge=True), "", "float32", {}))
    source_of = Values(source())
    for name in ("q", "o"):
        path = ("decoder", "blocks", "attn", name)
        w, a, b = (source_of.read((*path, part), 1) for part in ("weight", "lora_a", "lora_b"))
        lora = source_of.experiment.lora
        exact = w + lora.alpha / lora.rank * (b.astype(np.float64) @ a)
        twice = (w.astype(ml_dtypes.bfloat16) + lora.alpha / lora.rank * (b.astype(np.float64) @ a)).astype(ml_dtypes.bfloat16)
        got = merged.read((*path, "weight"), 1)
        assert got.dtype == ml_dtypes.bfloat16 and np.mean(got == exact.astype(ml_dtypes.bfloat16)) > 0.999
        assert np.mean(got == twice) < 0.98


def test_adapters_are_merged_when_asked_for(tmp_path, monkeypatch):
    run_from_scratch(tmp_path / "whole", {"rope": ROPE})
    experiment = dataclasses.replace(
        run_experiment(str(tmp_path / "whole")), lora=LoraConfig(rank=3, alpha=7.0, targets=("k", "up"))
    )
    save_run(tmp_path / "run", experiment)
    mesh = MeshConfig(data=1, fsdp=2, context=1, tensor=2)
    on_devices(mesh, monkeypatch)
    merged = convert(tmp_path / "merged", merge=True, folder=str(tmp_path / "run"), base="", mesh=mesh)
    monkeypatch.undo()
    assert run_experiment(merged).lora == LoraConfig(rank=0)
    assert not any("lora" in name for name in manager.trainable_leaves(merged, 0))
    values, apart = (Values(resolve(folder, "", "float32", {})) for folder in (merged, str(tmp_path / "run")))
    for path in (("decoder", "blocks", "attn", "k"), ("decoder", "blocks", "mlp", "up")):
        weight, a, b = (apart.read((*path, name), 2).astype(np.float64) for name in ("weight", "lora_a", "lora_b"))
        np.testing.assert_allclose(values.read((*path, "weight"), 2), weight + 7 / 3 * b @ a, rtol=1e-5, atol=1e-6)
    untouched = ("decoder", "blocks", "attn", "v", "weight")
    np.testing.assert_array_equal(values.read(untouched, 1), apart.read(untouched, 1))
    got, want = (jaxmed.load(f, dtype="float32").logits([None], ["Which lobe?"])[0] for f in (merged, str(tmp_path / "run")))
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())


def test_training_goes_on_without_the_base(native, tmp_path):
    asked = golden_experiment()
    model = dataclasses.replace(asked.model, base="", adapter=native, tokenizer="")
    asked = dataclasses.replace(asked, model=model, train=dataclasses.replace(asked.train, steps=1))
    experiment, _ = resolve_run(asked, {"lora.dropout"})
    assert experiment.lora.rank == 3 and experiment.model.base == ""
    run = str(tmp_path / "run")
    loop.fit(experiment, run, jax.devices()[:1])
    assert list(chain(run)) == [run, native]
    before, after = (parameters(resolve(folder, "", "float32", {}), ONE) for folder in (native, run))
    changed = {name for name in before if not np.array_equal(np.asarray(before[name]), np.asarray(after[name]))}
    assert "projector/layers/0/weight" in changed and "decoder/blocks/mlp/up/lora_b" in changed
    assert not any(name.endswith("attn/q/weight") for name in changed)
    with pytest.raises(UserError, match="holds a converted model"):
        loop.fit(run_experiment(native), native, jax.devices()[:1])


def test_manifest_has_a_row_a_tensor(native):
    manifest = json.loads(Path(native, "manifest.json").read_text())
    rows = {row["ours"]: row for row in manifest["tensors"]}
    row = rows["decoder/blocks/attn/q/weight[2]"]
    assert row["theirs"] == "model.layers.2.self_attn.q_proj.weight" and row["shape"] == [54, 54]
    assert row["sources"][0].startswith(BASE) and set(row["sources"]) <= manifest["files"].keys()
    assert manifest["format"] == "orbax" and manifest["base"]["folder"] == BASE and manifest["projector"]
    assert "Vocabulary" in rows["decoder/embed/table"]["rule"]


def test_values_that_are_not_finite_leave_nothing(tmp_path):
    with pytest.raises(UserError, match=r"decoder/blocks/attn/k/weight.*not finite"):
        plan = plan_native(resolve(ZERO3, BASE, "float32", {"lora.alpha": 1e9}), np.dtype(np.float16), True)
        write_export(plan, ZERO3, str(tmp_path / "out"), 0, AUTO, lambda text: None)
    assert list(tmp_path.iterdir()) == []
