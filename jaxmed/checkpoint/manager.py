"""Checkpoints of a run: Orbax, written in the background, `checkpoints/STEP/` with three items.

- `trainable`, `opt`: flat dicts {path: array}, paths as `decoder/blocks/attn/q/lora_a`; any mesh restores what any mesh saved.
- `meta`: JSON with the step, the resolved config, the base's path and fingerprint, the encoder of the tokens.

A folder gets its final name when it is complete: whatever has a number for a name can be relied on, short of a broken disk.
"""

import contextlib
import errno
import json
import logging
import math
import os
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from jaxmed.distributed import all_agree, barrier, is_first
from jaxmed.errors import UserError
from jaxmed.types import TrainState

# Orbax logs its housekeeping, and every error in every thread that meets it; the errors are raised as well, and told once
logging.getLogger("absl").setLevel(logging.CRITICAL)

FOLDER = "checkpoints"
ITEMS = ("trainable", "opt", "meta")
_FULL = re.compile(r"No space left on device|ENOSPC|RESOURCE_EXHAUSTED.*disk|Disk quota exceeded", re.IGNORECASE)


class _Manager(ocp.CheckpointManager):
    """Orbax's, without its own questions about SIGTERM: asked out of turn, and by one process alone, they would shift the step
    at which all processes save (see `jaxmed.preemption`)."""

    def reached_preemption(self, step: int) -> bool:
        return False


class Checkpoints:
    """The checkpoints of one run, for writing. All processes call every method together."""

    def __init__(self, run: str, keep: int):
        self.folder = os.path.abspath(os.path.join(run, FOLDER))
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep or None, create=True, cleanup_tmp_directories=True, enable_async_checkpointing=True
        )
        try:
            os.makedirs(self.folder, exist_ok=True)
            self._manager = _Manager(self.folder, options=options, item_names=ITEMS)
        except (OSError, ValueError) as error:
            raise disk_error(error, self.folder) from error

    def save(self, state: TrainState, meta: dict[str, Any]) -> None:
        """Copies the state off the devices and returns; the writing goes on in the background."""
        args = ocp.args.Composite(
            trainable=ocp.args.StandardSave(named(state.trainable)),
            opt=ocp.args.StandardSave(named(state.opt_state)),
            meta=ocp.args.JsonSave(meta),
        )
        try:
            self._manager.save(meta["step"], args=args, force=True)
        except Exception as error:  # an earlier save's error comes out here too
            raise disk_error(error, self.folder) from error

    def restore(self, abstract: TrainState, notice: Callable[[str], None]) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest checkpoint that can be read; those that cannot are moved aside, each with a notice."""
        for step in reversed(complete_steps(self.folder)):
            try:
                found = self._read(step, abstract)
                error = ""
            except UserError:  # it can be read and is of another model: nothing is damaged
                raise
            except Exception as caught:  # whatever a damaged file raises in Orbax, tensorstore or json
                found, error = None, caught
            if all_agree(found is not None):
                return found
            self._set_aside(step)
            first_line = (str(error).splitlines() or ["unreadable in another process"])[0][:200]
            notice(f"checkpoint {step} cannot be read, going back to the one before; renamed to damaged-{step} ({first_line})")
        return None

    def _read(self, step: int, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        meta = read_meta(self.folder, step)
        path = os.path.join(self.folder, str(step))
        if meta.get("complete"):
            raise UserError(
                f"{self.folder}: holds a converted model, no run; go on from it by --model.adapter, in another --out"
            )
        trainable = restore_named(os.path.join(path, "trainable"), abstract.trainable)
        opt_state = restore_named(os.path.join(path, "opt"), abstract.opt_state)
        count = jax.device_put(jnp.int32(meta["step"]), abstract.step.sharding)
        return TrainState(count, trainable, opt_state), meta

    def _set_aside(self, step: int) -> None:
        if is_first():
            place, number = os.path.join(self.folder, f"damaged-{step}"), 1
            while os.path.exists(place):
                number += 1
                place = os.path.join(self.folder, f"damaged-{step}-{number}")
            os.rename(os.path.join(self.folder, str(step)), place)
        barrier(f"set-aside-{step}")
        self._manager.reload()

    def wait(self) -> None:
        """Until the last save is on disk; its errors come out here."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise disk_error(error, self.folder) from error

    def close(self) -> None:
        """Frees Orbax's threads, after `wait`."""
        self._manager.close()

    def abandon(self) -> None:
        """After an error elsewhere: lets a save that is under way finish, and keeps its own error from hiding the first."""
        with contextlib.suppress(Exception):
            self._manager.wait_until_finished()
        with contextlib.suppress(Exception):
            self._manager.close()


def complete_steps(folder: str) -> list[int]:
    """Steps of the complete checkpoints in `RUN/checkpoints`, ascending."""
    if not os.path.isdir(folder):
        return []
    return sorted(int(name) for name in os.listdir(folder) if name.isdecimal())


def newest(run: str) -> int:
    """The newest complete step of a run. UserError if it has none."""
    steps = complete_steps(os.path.join(run, FOLDER))
    if not steps:
        raise UserError(f"{run}: no complete checkpoint in {FOLDER}/; train until the first one is saved (--train.save-every)")
    return steps[-1]


def read_meta(folder: str, step: int) -> dict[str, Any]:
    """The metadata of a checkpoint in `RUN/checkpoints`."""
    with open(os.path.join(folder, str(step), "meta", "metadata"), encoding="utf-8") as file:
        return json.load(file)


def _unreadable(path: str, error: Exception) -> UserError:
    first_line = (str(error).splitlines() or [type(error).__name__])[0][:300]
    folder = os.path.dirname(path)
    return UserError(f"{path}: cannot be read ({first_line}); copy it again, or move {folder} away: the one before is taken")


def restore_part(run: str, step: int, wanted: dict[str, Any]) -> dict[str, Any]:
    """Some arrays {path: array} of a checkpoint's trainable half, in the dtypes and shardings of `wanted`.

    Orbax holds all that it is asked for in host memory at once, so it is asked for a gigabyte at a time.
    """
    path = os.path.abspath(os.path.join(run, FOLDER, str(step), "trainable"))
    abstract = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for name, x in wanted.items()}
    return {name: array for part in in_parts(abstract) for name, array in _restored(path, part).items()}


def in_parts(leaves: dict[Any, Any], size: int = 1 << 30) -> list[dict[Any, Any]]:
    """`leaves` in their order, as many together as have `size` bytes (a larger one stands alone)."""
    parts: list[dict[Any, Any]] = []
    room = -1
    for key, leaf in leaves.items():
        nbytes = math.prod(leaf.shape) * leaf.dtype.itemsize
        if not parts or nbytes > room:
            parts.append({})
            room = size
        parts[-1][key] = leaf
        room -= nbytes
    return parts


def _restored(path: str, abstract: dict[str, Any]) -> dict[str, Any]:
    args = ocp.args.PyTreeRestore(
        item=abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract), partial_restore=True
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        try:
            return reader.restore(path, args=args)
        except Exception as error:
            raise _unreadable(path, error) from error


def trainable_shapes(run: str, step: int) -> dict[str, tuple[int, ...]]:
    """{path: shape} of what a checkpoint's trainable half holds."""
    return {name: leaf.shape for name, leaf in trainable_leaves(run, step).items()}


def trainable_leaves(run: str, step: int) -> dict[str, jax.ShapeDtypeStruct]:
    """{path: shape and dtype} of what a checkpoint's trainable half holds."""
    path = os.path.abspath(os.path.join(run, FOLDER, str(step), "trainable"))
    with ocp.StandardCheckpointer() as reader:
        try:
            tree = reader.metadata(path).item_metadata.tree
            return {name: jax.ShapeDtypeStruct(tuple(leaf.shape), leaf.dtype) for name, leaf in tree.items()}
        except Exception as error:
            raise _unreadable(path, error) from error


def _shapes(reader: ocp.StandardCheckpointer, path: str) -> dict[str, tuple[int, ...]]:
    return {name: tuple(leaf.shape) for name, leaf in reader.metadata(path).item_metadata.tree.items()}


def named(tree: Any) -> dict[str, Any]:
    """A tree as a flat dict; list indices and integer keys become text."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def restore_named(path: str, abstract: Any) -> Any:
    """What `named` saved, as the tree `abstract`. UserError where it holds other names or shapes."""
    wanted = named(abstract)
    with ocp.StandardCheckpointer() as reader:
        saved = _shapes(reader, path)
        shapes = {name: tuple(leaf.shape) for name, leaf in wanted.items()}
        differ = sorted(name for name in saved.keys() | shapes.keys() if saved.get(name) != shapes.get(name))
        if differ:
            one = f"{differ[0]}: {saved.get(differ[0], 'absent')} there, {shapes.get(differ[0], 'absent')} in this model"
            raise UserError(f"{path}: is of another model; {len(differ)} arrays differ, the first {one}")
        found = reader.restore(path, wanted)
    structure = jax.tree.structure(abstract)
    return structure.unflatten([found[name] for name in named(abstract)])


def disk_error(error: BaseException, folder: str) -> BaseException:
    """A full disk as one line; any other error as it is."""
    seen: BaseException | None = error
    while seen is not None:
        if (isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT)) or _FULL.search(str(seen)):
            steps = complete_steps(folder)
            kept = f"checkpoint {steps[-1]} is complete" if steps else "no checkpoint is complete yet"
            return UserError(f"{folder}: the disk is full; {kept}. Free some space and run the same command again to go on")
        seen = seen.__cause__ or seen.__context__
    return error
