"""Orbax checkpoints: exact, on any mesh, with integer keys, and honest about damage and full disks."""

import errno
import json
import math
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.checkpoint import manager
from jaxmed.checkpoint.manager import Checkpoints, complete_steps, disk_error, named, newest, restore_part
from jaxmed.config import MeshConfig, OptimConfig
from jaxmed.errors import UserError
from jaxmed.sharding import Rules, make_mesh, replicated
from jaxmed.train.optim import make_optimizer
from jaxmed.types import TrainState

RULES = Rules()


def mesh_of(*shape: int) -> jax.sharding.Mesh:
    return make_mesh(MeshConfig(*shape), jax.devices()[: math.prod(shape)])


def make_state(mesh: jax.sharding.Mesh, seed: int) -> TrainState:
    """Integer keys as nnx.List gives them, parameters in several optimizer groups, one of them fixed."""
    rng = np.random.default_rng(seed)

    def place(shape: tuple[int, ...], *axes: str | None) -> jax.Array:
        return jax.device_put(rng.standard_normal(shape, np.float32), RULES.sharding(mesh, *axes))

    layers = {i: {"weight": place((8, 24), "embed", None), "bias": place((8,), "embed")} for i in range(2)}
    trainable = {
        "decoder": {"blocks": {"q": {"lora_a": place((3, 5, 16), None, None, "embed")}}},
        "projector": {"layers": layers, "norm_mean": place((7, 24), None, None)},
    }
    opt_state = jax.jit(make_optimizer(OptimConfig(), 9, trainable).init)(trainable)
    opt_state = jax.tree.map(lambda x: x + 0.25 if x.ndim else x + 3, opt_state)
    return TrainState(jax.device_put(jnp.int32(seed), replicated(mesh)), trainable, opt_state)


def shapes(state: TrainState) -> TrainState:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_equal(one: TrainState, two: TrainState) -> None:
    ours, theirs = (jax.tree_util.tree_flatten_with_path(s)[0] for s in (one, two))
    assert [path for path, _ in ours] == [path for path, _ in theirs]
    for (path, a), (_, b) in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=str(path))


def save(run: Path, mesh: jax.sharding.Mesh, steps: list[int], keep: int = 0) -> None:
    checkpoints = Checkpoints(str(run), keep)
    for step in steps:
        checkpoints.save(make_state(mesh, step), {"step": step, "config": {"a": [1, "x"]}})
    checkpoints.wait()
    checkpoints.close()


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 4, 1, 2), (2, 2, 1, 2)], ids=str)
def test_any_mesh_restores_what_another_saved(tmp_path: Path, shape: tuple[int, ...]) -> None:
    writes, reads = mesh_of(2, 2, 1, 2), mesh_of(*shape)
    with jax.set_mesh(writes):
        save(tmp_path, writes, [4])
    with jax.set_mesh(reads):
        expected = make_state(reads, 4)
        checkpoints = Checkpoints(str(tmp_path), 0)
        state, meta = checkpoints.restore(shapes(expected), pytest.fail)
        checkpoints.close()
        assert_equal(state, expected)
        places = [x.sharding for x in jax.tree.leaves(state)]
        assert places == [x.sharding for x in jax.tree.leaves(expected)]
    assert meta == {"step": 4, "config": {"a": [1, "x"]}}
    assert set(state.trainable["projector"]["layers"]) == {0, 1}


def test_the_state_may_be_donated_while_it_is_saved(tmp_path: Path) -> None:
    mesh = mesh_of(2, 2, 1, 2)
    with jax.set_mesh(mesh):
        overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
        state, expected = make_state(mesh, 6), make_state(mesh, 6)
        checkpoints = Checkpoints(str(tmp_path), 0)
        checkpoints.save(state, {"step": 6})
        for _ in range(20):
            state = overwrite(state)
        checkpoints.wait()
        found, _ = checkpoints.restore(shapes(expected), pytest.fail)
        checkpoints.close()
        assert_equal(found, expected)


def test_old_checkpoints_go(tmp_path: Path) -> None:
    mesh = mesh_of(1, 1, 1, 1)
    with jax.set_mesh(mesh):
        save(tmp_path, mesh, [2, 4, 6, 8], keep=2)
    assert complete_steps(str(tmp_path / "checkpoints")) == [6, 8]
    assert newest(str(tmp_path)) == 8


def data_files(step: Path) -> list[Path]:
    """Files whose loss nothing can make good."""
    wanted = [p for p in sorted(step.rglob("*")) if p.is_file() and p.name != "commit_success.txt"]
    return [p for p in wanted if p.parent.name == "d" or p.name in ("metadata", "manifest.ocdbt")]


@pytest.mark.parametrize("harm", ["truncate", "empty", "remove"])
def test_a_damaged_newest_checkpoint_falls_back(tmp_path: Path, harm: str) -> None:
    mesh = mesh_of(1, 1, 1, 1)
    with jax.set_mesh(mesh):
        save(tmp_path, mesh, [3, 5])
        for file in data_files(tmp_path / "checkpoints" / "5"):
            if harm == "remove":
                file.unlink()
            else:
                os.truncate(file, file.stat().st_size // 2 if harm == "truncate" else 0)
        notices: list[str] = []
        checkpoints = Checkpoints(str(tmp_path), 3)
        state, meta = checkpoints.restore(shapes(make_state(mesh, 0)), notices.append)
        assert meta["step"] == 3 and len(notices) == 1 and "checkpoint 5" in notices[0]
        assert_equal(state, make_state(mesh, 3))
        assert (tmp_path / "checkpoints" / "damaged-5").is_dir()
        # the step may be saved again, and is then the newest
        checkpoints.save(make_state(mesh, 5), {"step": 5})
        checkpoints.wait()
        checkpoints.close()
    assert complete_steps(str(tmp_path / "checkpoints")) == [3, 5]


def test_each_damaged_array_file_is_noticed(tmp_path: Path) -> None:
    """Half of any one file missing is enough."""
    mesh = mesh_of(1, 1, 1, 1)
    with jax.set_mesh(mesh):
        save(tmp_path, mesh, [1, 2])
        abstract = shapes(make_state(mesh, 0))
        step = tmp_path / "checkpoints" / "2"
        merged = [p for p in data_files(step) if "ocdbt.process" not in str(p) or p.parent.name == "d"]
        for file in merged:
            whole = file.read_bytes()
            file.write_bytes(whole[: len(whole) // 2])
            notices: list[str] = []
            checkpoints = Checkpoints(str(tmp_path), 0)
            found = checkpoints.restore(abstract, notices.append)
            checkpoints.close()
            file_now = tmp_path / "checkpoints" / "damaged-2" / file.relative_to(step)
            if notices:
                assert found[1]["step"] == 1
                file_now.write_bytes(whole)
                (tmp_path / "checkpoints" / "damaged-2").rename(step)
            else:  # a file that Orbax does not need: what was read is right all the same
                assert_equal(found[0], make_state(mesh, 2))
                file.write_bytes(whole)


def test_another_models_checkpoint_is_no_damage(tmp_path: Path) -> None:
    mesh = mesh_of(1, 1, 1, 1)
    with jax.set_mesh(mesh):
        save(tmp_path, mesh, [5])
        other = shapes(make_state(mesh, 0))
        other.trainable["projector"]["norm_mean"] = jax.ShapeDtypeStruct((9, 24), jnp.float32, sharding=replicated(mesh, 2))
        checkpoints = Checkpoints(str(tmp_path), 3)
        with pytest.raises(UserError, match=r"another model.*projector/norm_mean: \(7, 24\) there, \(9, 24\)"):
            checkpoints.restore(other, pytest.fail)
        checkpoints.abandon()
    assert complete_steps(str(tmp_path / "checkpoints")) == [5]


def test_an_unfinished_save_is_not_a_checkpoint(tmp_path: Path) -> None:
    """What a kill during a save leaves behind: a folder under a temporary name."""
    mesh = mesh_of(1, 1, 1, 1)
    with jax.set_mesh(mesh):
        save(tmp_path, mesh, [5])
        folder = tmp_path / "checkpoints"
        torn = [folder / "7.orbax-checkpoint-tmp", folder / "9.orbax-checkpoint-tmp"]
        for name in torn:
            (name / "trainable").mkdir(parents=True)
            (name / "trainable" / "manifest.ocdbt").write_bytes(b"half")
        assert newest(str(tmp_path)) == 5
        checkpoints = Checkpoints(str(tmp_path), 3)
        _, meta = checkpoints.restore(shapes(make_state(mesh, 0)), pytest.fail)
        assert meta["step"] == 5
        checkpoints.save(make_state(mesh, 7), {"step": 7})
        checkpoints.wait()
        checkpoints.close()
    assert complete_steps(str(folder)) == [5, 7]
    assert not any(name.exists() for name in torn)


def test_a_part_in_another_dtype(tmp_path: Path) -> None:
    mesh = mesh_of(1, 4, 1, 1)
    with jax.set_mesh(mesh):
        save(tmp_path, mesh, [5])
        expected = make_state(mesh, 5).trainable["projector"]["layers"][1]["weight"]
        wanted = {"projector/layers/1/weight": jax.ShapeDtypeStruct((8, 24), jnp.bfloat16, sharding=expected.sharding)}
        found = restore_part(str(tmp_path), 5, wanted)
    assert found.keys() == wanted.keys()
    np.testing.assert_array_equal(found["projector/layers/1/weight"], expected.astype(jnp.bfloat16))
    assert manager.trainable_shapes(str(tmp_path), 5)["projector/norm_mean"] == (7, 24)


def test_names_are_paths() -> None:
    assert list(named({"layers": {0: 1.0, 1: {"w": 2.0}}, "list": [3.0]})) == ["layers/0", "layers/1/w", "list/0"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        ValueError("UNKNOWN: Error writing: [OS error 28: ENOSPC No space left]"),
    ],
    ids=["os", "tensorstore"],
)
def test_a_full_disk_is_one_line(tmp_path: Path, error: Exception) -> None:
    (tmp_path / "12").mkdir()
    wrapped = RuntimeError("save failed")
    wrapped.__cause__ = error
    told = disk_error(wrapped, str(tmp_path))
    assert isinstance(told, UserError) and "disk is full" in str(told) and "checkpoint 12 is complete" in str(told)
    assert "\n" not in str(told)
    other = RuntimeError("something else")
    assert disk_error(other, str(tmp_path)) is other


def test_metadata_is_plain_json(tmp_path: Path) -> None:
    """Other tools may read it without Orbax."""
    mesh = mesh_of(1, 1, 1, 1)
    with jax.set_mesh(mesh):
        save(tmp_path, mesh, [5])
    text = (tmp_path / "checkpoints" / "5" / "meta" / "metadata").read_text()
    assert json.loads(text) == manager.read_meta(str(tmp_path / "checkpoints"), 5)
