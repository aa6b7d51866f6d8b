"""Writes folders of our own form: config.json, what goes along, checkpoints/0/ with *every* parameter under `trainable` and a
`meta` that says so (`complete`). Parameters lie on the devices of a mesh; each process writes its slices, and any mesh restores
them.
"""

import contextlib
import functools
import json
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from jaxmed.checkpoint import manager
from jaxmed.checkpoint.adapter import text
from jaxmed.checkpoint.export_plan import Native, Plan
from jaxmed.checkpoint.load import Path
from jaxmed.checkpoint.tensor_files import Tensor
from jaxmed.checkpoint.values import Parameters
from jaxmed.config import LoraConfig, MeshConfig
from jaxmed.distributed import barrier, is_first
from jaxmed.errors import UserError
from jaxmed.nn.block import adapter_paths

STEP = os.path.join(manager.FOLDER, "0")
_CHUNK_BYTES = 1 << 26
_FILE_BYTES = 1 << 28
"""Written at once: Orbax's own 2 GB would all wait in memory"""
_GIGABYTE = 10**9


def write_native(plan: Plan, native: Native, folder: str, asked: MeshConfig) -> None:
    """Config, tokenizer and checkpoint into `folder`, which all processes see. Together on all of them."""
    mesh = native.mesh(asked)
    if is_first():
        with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as file:
            file.write(native.config)
        plan.write_beside(folder)
        os.makedirs(os.path.join(folder, STEP, "meta"))
        with open(os.path.join(folder, STEP, "meta", "metadata"), "w", encoding="utf-8") as file:
            json.dump(META | native.meta, file)
    barrier("folder of the converted model")
    with jax.set_mesh(mesh):
        values = native.values(mesh)
        _save(os.path.join(folder, STEP, "trainable"), values)


def parameter_rows(values: Parameters, path: Path, dtype: np.dtype | None, merged: LoraConfig | None = None) -> list[Tensor]:
    """A parameter's rows of the table: one a tensor of theirs. `merged`: adapters that are merged into it."""
    shape, stored = values.shapes[path], values.stored(path)
    layers = range(shape.shape[0]) if values.is_stacked(path) else (0,)
    kinds = {values.dtype(path, layer) for layer in layers} if stored else {np.dtype(np.float32)}
    made = dtype or functools.reduce(jnp.promote_types, kinds)
    pair = adapter_paths(path, values.shapes) if merged else None
    rows = []
    for layer in layers if stored and values.trained_by(path) is None else (0,):
        origin = values.origin(path, layer)
        rule, sources = origin.rule, [origin.file]
        if merged and pair:
            rule += f" + merged LoRA, {merged.alpha:g} / {merged.rank} * B A in float32"
            sources += [values.origin(half, layer).file for half in pair]
        whole = origin.whole or not values.is_stacked(path)
        size = shape.shape if whole else values.shape(path)
        named = text(path) if whole else f"{text(path)}[{layer}]"
        rows.append(Tensor(origin.name, size, np.dtype(made), _no_values, named, rule, tuple(filter(None, sources))))
    return rows


def _no_values() -> np.ndarray:
    raise ValueError("parameters of a run are written by Orbax, from their devices")


META = {"step": 0, "total_steps": 0, "complete": True, "base": "", "base_fingerprint": "", "data": "", "encoder": ""}
"""Of what was never trained here"""


def _save(path: str, values: dict[str, jax.Array]) -> None:
    """By Orbax, in chunks that another mesh can read a part of; about as much on its way at a time as the largest takes."""
    _check_finite(values)
    largest = max(array.nbytes for array in values.values())
    # weights hardly get smaller by compression, which would hold them twice
    handler = ocp.PyTreeCheckpointHandler(save_concurrent_gb=1 + math.ceil(largest / _GIGABYTE), use_compression=False)
    chunks = {name: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES) for name in values}
    try:
        with contextlib.closing(ocp.Checkpointer(handler)) as writer:
            arguments = ocp.args.PyTreeSave(item=values, save_args=chunks, ocdbt_target_data_file_size=_FILE_BYTES)
            writer.save(os.path.abspath(path), args=arguments)
    except Exception as error:
        raise manager.disk_error(error, os.path.dirname(os.path.dirname(path))) from error


@jax.jit
def _finite(array: jax.Array) -> jax.Array:
    return jnp.isfinite(array).all()


def _check_finite(values: dict[str, jax.Array]) -> None:
    """Files' values are tested as they are read; a merge, or another dtype, can still make infinities."""
    bad = [name for name, array in values.items() if jnp.issubdtype(array.dtype, jnp.floating) and not bool(_finite(array))]
    if bad:
        raise UserError(f"{', '.join(bad)}: values that are not finite in this dtype; give another --dtype, or sound weights")
