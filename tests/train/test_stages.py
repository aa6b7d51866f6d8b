"""ViT3D-LLaMA3's two stages, as their configs have them but small: what each trains, what goes from one to the next, meshes."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxmed.checkpoint import manager
from jaxmed.cli import train as command
from jaxmed.cli.common import load_experiment
from jaxmed.cli.validate import resolve
from jaxmed.config import Experiment, MeshConfig
from jaxmed.errors import UserError
from jaxmed.sharding import device_bytes, make_mesh
from jaxmed.train.init import blueprint, flatten
from jaxmed.train.loop import fit

GOLDEN = Path(__file__).parents[1] / "golden/vit3d/base"
ADDED = 4
ROWS = 175
"""Of the base's vocabulary"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight prepared volumes with a sentence each."""
    folder = tmp_path_factory.mktemp("cap")
    rng = np.random.default_rng(11)
    entries = []
    for i in range(8):
        np.save(folder / f"{i}.npy", rng.random((1, 8, 16, 12), np.float32))
        (folder / f"{i}.txt").write_text(f"study_findings: mass number {i} in the {'left' if i % 2 else 'right'} lung.")
        entries.append({"image": f"{i}.npy", "text": f"{i}.txt"})
    write_tower(folder / "vit")
    write_base(folder / "base")
    (folder / "cap.json").write_text(json.dumps({"train": entries}))
    return folder


pytestmark = pytest.mark.usefixtures("compiled_quickly")


def write_base(folder: Path) -> None:
    """The golden case's language model with an MLP that divides over the meshes."""
    shutil.copytree(GOLDEN, folder)
    tensors = load_file(folder / "model.safetensors")
    for name, x in tensors.items():
        if ".mlp." in name:
            tensors[name] = np.pad(x, ((0, 0), (0, 3)) if "down_proj" in name else ((0, 3), (0, 0)))
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text()) | {"intermediate_size": 56}
    (folder / "config.json").write_text(json.dumps(config))


def write_tower(folder: Path, width: int = 32, mlp: int = 40, layers: int = 2) -> None:
    """A ViT3D alone, as M3D names its tensors."""
    rng = np.random.default_rng(3)
    shapes = {
        "cls_token": (1, 1, width),
        "patch_embedding.position_embeddings": (1, 64, width),
        "patch_embedding.patch_embeddings.1.weight": (width, 24),
        "patch_embedding.patch_embeddings.1.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    for i in range(layers):
        shapes |= {f"blocks.{i}.{norm}.{end}": (width,) for norm in ("norm1", "norm2") for end in ("weight", "bias")}
        shapes |= {f"blocks.{i}.attn.qkv.weight": (3 * width, width), f"blocks.{i}.attn.out_proj.weight": (width, width)}
        shapes |= {f"blocks.{i}.attn.out_proj.bias": (width,), f"blocks.{i}.mlp.linear1.weight": (mlp, width)}
        shapes |= {f"blocks.{i}.mlp.linear1.bias": (mlp,), f"blocks.{i}.mlp.linear2.weight": (width, mlp)}
        shapes |= {f"blocks.{i}.mlp.linear2.bias": (width,)}
    folder.mkdir()
    save_file({n: rng.normal(0, 0.1, s).astype(np.float32) for n, s in shapes.items()}, folder / "model.safetensors")
    config = {"vision_tower": "vit3d", "image_size": [8, 16, 12], "patch_size": [2, 4, 3], "image_channel": 1}
    (folder / "config.json").write_text(json.dumps(config))


def small(name: str, data: Path, **train: object) -> Experiment:
    """A shipped config with a small tower."""
    config = load_experiment(name)
    tower = dataclasses.replace(config.model.tower, image=(8, 16, 12), patch=(2, 4, 3), width=32, layers=2, heads=4, mlp=40)
    visual = dataclasses.replace(
        config.visual, volume=tower.image, tokens=64, grid=(4, 4, 4), features=32,
        prepare=dataclasses.replace(config.visual.prepare, augment="intensity"),
    )  # fmt: skip
    model = dataclasses.replace(
        config.model, base=str(data / "base"), tower=tower, tower_folder=str(data / "vit"), dtype="float32"
    )
    sizes = {"batch": 8, "buckets": (96,), "supervised": 48, "max_length": 96}
    records = {"records": f"{data}/cap.json:train", "volumes": str(data)}
    return dataclasses.replace(
        config,
        model=model,
        visual=visual,
        train=dataclasses.replace(config.train, remat="none", **train),
        data=dataclasses.replace(config.data, **sizes, **records),
    )


def held(run: Path) -> dict[str, np.ndarray]:
    """What a run's newest checkpoint holds."""
    shapes = manager.trainable_shapes(str(run), manager.newest(str(run)))
    wanted = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for name, x in wanted.items()}
    found = manager.restore_part(str(run), manager.newest(str(run)), wanted)
    return {name: np.asarray(x) for name, x in found.items()}


@pytest.fixture(scope="module")
def aligned(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first stage, three updates (the first has rate 0)."""
    run = tmp_path_factory.mktemp("align") / "run"
    experiment = small("vit3d_align", data, steps=3)
    fit(resolve(experiment, ["model.tower.heads"])[0], str(run), jax.devices()[:1])
    return run


def test_the_first_stage_trains_projector_and_all_embeddings(aligned: Path):
    parts = {name.split("/")[0] if "embed" not in name else "embed" for name in held(aligned)}
    assert parts == {"projector", "embed"}
    assert {"decoder/embed/table", "decoder/embed/added"} <= held(aligned).keys()


def second(data: Path, aligned: Path, **train: object) -> Experiment:
    config = small("vit3d_m3d", data, steps=1, **train)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, adapter=str(aligned)))
    return resolve(config, ["model.tower.heads"])[0]


@pytest.mark.parametrize("keep", [True, False])
def test_the_second_stage_begins_where_the_first_ended(data: Path, aligned: Path, tmp_path: Path, keep: bool):
    """Its first update has rate 0, so its first checkpoint is what it began with."""
    fit(second(data, aligned, keep_embed_tokens=keep), str(tmp_path / "run"), jax.devices()[:1])
    first, now = held(aligned), held(tmp_path / "run")
    trained = {name.split("/")[0] for name in now}
    assert trained == {"decoder", "projector", "tower"}
    assert {"decoder/head/weight", "decoder/embed/table"} <= now.keys()
    assert sum("lora_" in name for name in now) == 14
    np.testing.assert_array_equal(now["projector/layers/0/weight"], first["projector/layers/0/weight"])
    table, before = now["decoder/embed/table"], first["decoder/embed/table"]
    assert np.array_equal(table, before) == keep
    if not keep:  # the base's own, as upstream's second stage has it by mistake
        base = table_of_base()
        np.testing.assert_array_equal(table[:ROWS], base)
        np.testing.assert_allclose(now["decoder/embed/added"], np.tile(base.mean(0), (ADDED, 1)), atol=1e-6)


def table_of_base() -> np.ndarray:
    return load_file(GOLDEN / "model.safetensors")["model.embed_tokens.weight"]


def test_losing_the_embeddings_needs_a_table_of_its_own(data: Path):
    with pytest.raises(UserError, match="train_embed_tokens"):
        small("vit3d_m3d", data, keep_embed_tokens=False, train_embed_tokens=False)


def test_upstream_exact_stands_for_a_flag():
    flags = ["--out", "x", "--upstream-exact", "stage1_embeddings"]
    assert command.without_defects(flags) == ["--out", "x", "--train.no-keep-embed-tokens"]
    with pytest.raises(UserError, match="stage2; known are stage1_embeddings"):
        command.without_defects(["--upstream-exact=stage2"])


@pytest.mark.parametrize(("rows", "embed", "held_rows"), [(True, False, True), (False, False, False), (False, True, True)])
def test_which_embeddings_are_trained(data: Path, rows: bool, embed: bool, held_rows: bool):
    experiment = small("vit3d_m3d", data, train_added_rows=rows, train_embed_tokens=embed)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        trained = flatten(blueprint(experiment, mesh).trainable)
    assert (("decoder", "embed", "added") in trained) == held_rows
    assert (("decoder", "embed", "table") in trained) == embed


MESHES = [(8, 1, 1, 1), (2, 2, 1, 2), (1, 4, 2, 1)]


@pytest.fixture(scope="module")
def on_one_device(data: Path, aligned: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return losses(data, aligned, tmp_path_factory.mktemp("one"), (1, 1, 1, 1))


def losses(data: Path, aligned: Path, folder: Path, shape: tuple[int, ...]) -> list[float]:
    experiment = dataclasses.replace(second(data, aligned), mesh=MeshConfig(*shape))
    experiment = dataclasses.replace(experiment, train=dataclasses.replace(experiment.train, steps=3))
    fit(experiment, str(folder / "run"), jax.devices()[: math.prod(shape)])
    rows = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_the_second_stage_gives_the_same_losses_on_every_mesh(
    data: Path, aligned: Path, tmp_path: Path, on_one_device: list[float], shape: tuple[int, ...]
):
    found = losses(data, aligned, tmp_path, shape)
    np.testing.assert_allclose(found, on_one_device, atol=1e-5, rtol=0)
    assert found[0] - found[2] > 1e-3  # something was learnt


@pytest.mark.parametrize("shape", [(2, 2, 1, 2), (1, 4, 2, 1)], ids=str)
def test_the_trained_tower_is_split_over_fsdp(data: Path, shape: tuple[int, ...]):
    experiment = small("vit3d_m3d", data)
    mesh = make_mesh(MeshConfig(*shape), jax.devices()[: math.prod(shape)])
    with jax.set_mesh(mesh):
        tower = blueprint(experiment, mesh).trainable["tower"]
    total = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tower))
    assert 1.0 <= device_bytes(tower) * shape[1] / total < 1.25  # the position table and norms are small and whole
