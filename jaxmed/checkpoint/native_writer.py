"""Writes folders of our own form: config.json, what goes along, checkpoints/0/ with *every* parameter under `trainable` and a
`meta` that says so (`complete`). Parameters lie on the devices of a mesh; each process writes its slices, and any mesh restores
them.
"""

import contextlib
import json
import math
import os

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from jaxmed.checkpoint import manager
from jaxmed.checkpoint.export_plan import Native, Plan
from jaxmed.config import MeshConfig
from jaxmed.distributed import barrier, is_first
from jaxmed.errors import UserError

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
